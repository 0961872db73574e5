"""What is installed, and what the environment sets."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from promptlayer_exec._doctor.examination import Examination
from promptlayer_exec._doctor.report import Finding, broken_rule, failed, ok
from promptlayer_exec._engine.settings import DEFAULT_BASE_URL
from promptlayer_exec._integration import settings
from promptlayer_exec._session.session import Session
from promptlayer_exec._values.errors import ConfigurationError
from promptlayer_exec._version import __version__

# For each extra, what it needs beyond the core. The report shows the version of the first one.
_EXTRAS = {
    "cli": ("typer", "rich"),
    "dbos": ("dbos",),
    "fastapi": ("fastapi", "sse-starlette"),
    "mcp": ("mcp",),
    "opentelemetry": ("opentelemetry-api",),
    "redis": ("redis",),
    "speed": ("msgspec",),
    "starts": ("sqlalchemy", "psycopg"),
    "viewer": ("uvicorn", "platformdirs", "sqlalchemy"),
}
_VARIABLES = (
    "PROMPTLAYER_API_KEY",
    "PROMPTLAYER_BASE_URL",
    "PROMPTLAYER_EXEC_DB",
    "PROMPTLAYER_EXEC_PUSH",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


async def check_versions(_: Examination) -> Finding:
    python = f"{platform.python_implementation()} {platform.python_version()}"
    system = f"{platform.system()} {platform.machine()}"
    aiohttp = f"aiohttp {_version('aiohttp')}"
    return ok(f"promptlayer-exec {__version__}, {python}, {aiohttp}, {system}")


async def check_extras(_: Examination) -> Finding:
    installed, missing = [], []
    for extra, distributions in _EXTRAS.items():
        versions = [_version(distribution) for distribution in distributions]
        if None in versions:
            missing.append(extra)
        else:
            installed.append(f"{extra} ({distributions[0]} {versions[0]})")

    text = ", ".join(installed) or "none"
    if missing:
        text += f"; not installed: {', '.join(missing)}"
    return ok(text)


async def check_environment(examination: Examination) -> Finding:
    """Name the variables that are set. Their values may be secret."""
    try:
        # Key and base URL have their own checks.
        examination.settings = settings(Session("unused", base_url=DEFAULT_BASE_URL))
    except ConfigurationError as error:
        return failed(broken_rule(error), "Correct the variable.")

    names = [name for name in _VARIABLES if os.environ.get(name) or os.environ.get(name.lower())]
    return ok(f"set: {', '.join(names)}" if names else "no variable of this package is set")
