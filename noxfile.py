"""All checks of the project: `python -m nox` runs them, on each Python that is there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "types", "tests", "coverage"]
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True


def _is_there(version: str) -> bool:
    """Tell whether an interpreter runs: some version managers leave names that do not."""
    command = shutil.which(f"python{version}")
    return (
        command is not None
        and subprocess.run([command, "-c", ""], capture_output=True, check=False).returncode == 0
    )


PYTHONS = [version for version in ("3.11", "3.12", "3.13") if _is_there(version)] or None


def _install(session: nox.Session, group: str, *packages: str) -> None:
    project = nox.project.load_toml("pyproject.toml")
    session.install(*nox.project.dependency_groups(project, group), *packages)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the suite on the built wheel, with branch coverage; arguments go to pytest."""
    _install(session, "test", ".[cli]")
    # The wheel is what is tested, so the checkout must not be found before it.
    environment = {
        "PYTHONSAFEPATH": "1",
        "COVERAGE_FILE": str(Path.cwd() / f".coverage.{session.python}"),
    }
    session.run("coverage", "run", "-m", "pytest", *session.posargs, env=environment)


@nox.session
def coverage(session: nox.Session) -> None:
    """Demand full branch coverage of the rooms behind the face, and 90 % of the rest."""
    _install(session, "test")
    session.run("coverage", "combine")
    rooms = "promptlayer_exec/_*.py"
    session.run("coverage", "report", f"--include={rooms}", "--fail-under=100")
    session.run("coverage", "report", f"--omit={rooms}", "--fail-under=90")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    _install(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package, and of code as its users write it."""
    _install(session, "types", "nox", "pytest", ".[cli]")
    session.run("mypy", "promptlayer_exec", "tests/typing", "noxfile.py")
