"""The script that finds private names of other packages, and caps of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("dependencies.py")
OWN = {"_ours"}


def load() -> Any:
    """Return the script as a module; tests/ is no package."""
    spec = spec_from_file_location("dependencies", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


dependencies = load()


def found(source: str) -> list[str]:
    """Return the private names of others that a module uses."""
    return [name for _, name, _ in dependencies.uses(source, OWN)]


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        ("from aiohttp import _websocket", "aiohttp._websocket"),
        ("from aiohttp._websocket import reader", "aiohttp._websocket.reader"),
        ("import aiohttp._websocket as it", "aiohttp._websocket"),
        ("import importlib; importlib.import_module('a._b')", "a._b"),
        ("from concurrent.futures import _base", "concurrent.futures._base"),
        ("from sse_starlette.sse import SendTimeoutError", "sse_starlette.sse.SendTimeoutError"),
        ("import atexit; atexit._run_exitfuncs()", "_run_exitfuncs"),
        ("def f(server): server.server_state", "server_state"),
        ("def f(it): it._theirs", "_theirs"),
        ("def f(it): it._theirs = 1", "_theirs"),
        ("def f(it): getattr(it, '_theirs')", "_theirs"),
        ("class A(B):\n def f(self): self._theirs", "_theirs"),
        ("class A(B):\n def f(self): super()._theirs()", "_theirs"),
        ("import a\nclass A(a.B):\n def _ours(self): super()._ours()", "_ours"),
    ],
)
def test_a_planted_private_name_is_found(planted: str, name: str) -> None:
    """An import, an attribute, a string, and what a class of ours inherits."""
    assert found(planted) == [name]


@pytest.mark.parametrize(
    "allowed",
    [
        "from promptlayer_exec._session.session import Session, _ours",
        "from ._session import _ours",
        "import os; os._exit(0)",
        "def f(it): it._asdict(), it.__class__, it._value_, it._ours",
        "class A:\n def f(self): self._ours = other._ours",
        "class A(B):\n def _ours(self): super()._ours()",
        "def f(it): getattr(it, '_ours')",
    ],
)
def test_our_own_and_documented_names_are_not_found(allowed: str) -> None:
    """Otherwise the list would be of no use."""
    assert found(allowed) == []


@pytest.mark.parametrize(
    ("requirement", "is_found"),
    [
        ("a>=3.4,<3.5", True),
        ("a>=0.7,<0.8", True),
        ("a[b]<=2", True),
        ("a==1.2.3", True),
        ("a~=1.2.3", True),
        ("a>=4,<4", True),
        ("a>=0.7,<1", False),
        ("a>=3.14.1,<4", False),
        ("a>=2.3,<3.0", False),
        ("a~=1.2", False),
        ("a>=3; python_version < '3.12'", False),
    ],
)
def test_a_cap_below_the_next_major_version_is_found(requirement: str, is_found: bool) -> None:
    """A cap at the next major version is none."""
    assert dependencies.caps([requirement]) == ({"a"} if is_found else set())


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a project with nothing that it must not use, and a copy of the script."""
    for folder in ("tests", "promptlayer_exec"):
        (tmp_path / folder).mkdir()
    shutil.copy(SCRIPT, tmp_path / "tests")
    (tmp_path / "promptlayer_exec" / "a.py").write_text("A = 1\n")
    (tmp_path / "pyproject.toml").write_text(
        "[project]\ndependencies = ['a<2']\noptional-dependencies = {}\n[dependency-groups]\n"
    )
    return tmp_path


def run(project: Path) -> tuple[int, str]:
    """Return the exit code of the script, and what it prints."""
    command = [sys.executable, str(project / "tests" / "dependencies.py")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.stdout == ""
    return ended.returncode, ended.stderr


def test_nothing_is_printed_for_a_project_that_uses_public_names_only(project: Path) -> None:
    """Its exit code is 0."""
    assert run(project) == (0, "")


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        (
            "promptlayer_exec/a.py",
            "it._theirs\n",
            "promptlayer_exec/a.py:2 uses a private name of another package: it._theirs\n",
        ),
        (
            "pyproject.toml",
            "test = ['b>=2,<2.5']",
            "b is capped below its next major version: allow all of the current one\n",
        ),
    ],
)
def test_a_private_name_or_a_cap_is_exit_code_1(
    project: Path, path: str, text: str, said: str
) -> None:
    """The script says which, and where."""
    with (project / path).open("a") as file:
        file.write(text)
    assert run(project) == (1, said)
