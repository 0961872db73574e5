"""Ends a benchmark at once, with one line, if something that it needs is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

# A module that only an extra of this package installs, or another package for a benchmark.
MODULES = {
    "cli": "typer",
    "dbos": "dbos",
    "redis": "redis",
    "starts": "psycopg",
    "viewer": "uvicorn",
}
# The programs of Debian's packages, one of which is enough.
PROGRAMS = {
    "postgresql": ("initdb",),
    "redis-server": ("redis-server", "valkey-server"),
    "util-linux": ("taskset",),
    "valgrind": ("valgrind",),
}
DEBIAN_POSTGRESQL = "/usr/lib/postgresql"  # whose programs are on no PATH


def find_program(name: str) -> str | None:
    """Return the path of a program, or None."""
    debian = sorted(Path(DEBIAN_POSTGRESQL).glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(debian[-1]) if debian else None)


def need(*, extras: str = "", packages: str = "", debian: str = "") -> None:
    """Exit unless everything is there; each argument has names with spaces between them."""
    missing = []
    lacking = [it for it in extras.split() if find_spec(MODULES.get(it, it)) is None]
    if lacking:
        missing.append(f'the extra: python -m pip install -e ".[{",".join(lacking)}]"')
    lacking = [it for it in packages.split() if find_spec(it) is None]
    if lacking:
        missing.append(f"another package: python -m pip install {' '.join(lacking)}")
    lacking = [it for it in debian.split() if not any(map(find_program, PROGRAMS[it]))]
    if lacking:
        missing.append(f"a program of Debian: apt-get install {' '.join(lacking)}")
    if missing:
        sys.exit(f"{sys.argv[0]} needs {', and '.join(missing)}")


def need_in(python: str | None, modules: str) -> None:
    """Exit unless another Python, if there is one, has some modules."""
    if python is None:
        return
    program = f"import {', '.join(modules.split())}"
    try:
        subprocess.run([python, "-c", program], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"{sys.argv[0]} needs a Python that can {program}, and {python} cannot")
