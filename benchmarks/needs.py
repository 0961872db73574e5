"""Ends a benchmark at once, with one line, if something that it needs is missing."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

# A module that only an extra of this package installs, or another package for a benchmark.
MODULES = {"cli": "typer", "dbos": "dbos", "redis": "redis", "starts": "psycopg"}
# The names of a program, the last of which Debian's package has.
PROGRAMS = {"redis": ("valkey-server", "redis-server"), "postgresql": ("initdb",)}
DEBIAN_POSTGRESQL = "/usr/lib/postgresql"  # whose programs are on no PATH


def find_program(name: str) -> str | None:
    """Return the path of a program, or None."""
    debian = sorted(Path(DEBIAN_POSTGRESQL).glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(debian[-1]) if debian else None)


def need(*, extras: str = "", packages: str = "", programs: str = "") -> None:
    """Exit unless everything is there; each argument has names with spaces between them."""
    missing = []
    lacking = [it for it in extras.split() if find_spec(MODULES.get(it, it)) is None]
    if lacking:
        missing.append(f'the extra: python -m pip install -e ".[{",".join(lacking)}]"')
    lacking = [it for it in packages.split() if find_spec(it) is None]
    if lacking:
        missing.append(f"another package: python -m pip install {' '.join(lacking)}")
    lacking = [it for it in programs.split() if not any(map(find_program, PROGRAMS.get(it, (it,))))]
    if lacking:
        missing.append(f"a program, which Debian has in: {' '.join(lacking)}")
    if missing:
        sys.exit(f"{sys.argv[0]} needs {', and '.join(missing)}")
