"""The script that counts lines and attributes, and finds private names of other packages."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("figures.py")
OWN = {"_ours", "_connector"}


def load() -> Any:
    """Return the script as a module; tests/ is no package."""
    spec = spec_from_file_location("figures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


figures = load()


def found(source: str) -> list[str]:
    """Return the private names of others that a module uses."""
    return [name for _, name, _ in figures.uses(source, OWN)]


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
        ("import uvicorn; uvicorn.Server(1)._connector", "_connector"),
        (
            "from a import A; b = A(); c = b.c\nasync def f(): (await c.d())._connector",
            "_connector",
        ),
        ("import aiohttp\ndef f(it: aiohttp.A | None): it._connector", "_connector"),
        ("import a\nclass A:\n it: a.A\n def f(self): self.it._connector", "_connector"),
        ("import aiohttp\ndef f(it: aiohttp.A): setattr(it, '_connector', 1)", "_connector"),
    ],
)
def test_a_planted_private_name_is_found(planted: str, name: str) -> None:
    """An import, an attribute and a string are found, even where a name of ours is the same."""
    assert found(planted) == [name]


@pytest.mark.parametrize(
    "allowed",
    [
        "from promptlayer_exec._session import Session, _ours",
        "from ._session import _ours",
        "import os; os._exit(0)",
        "def f(it): it._asdict(), it.__class__, it._value_, it._ours",
        "class A:\n def f(self): self._ours = other._ours",
        "class A(B):\n def _ours(self): super()._ours()",
        "from typing import Any\ndef f(it: Any): getattr(it, '_ours')",
        "import attrs\ndef f(it): attrs.evolve(it)._ours",
    ],
)
def test_our_own_and_documented_names_are_not_found(allowed: str) -> None:
    """Otherwise the list would be of no use."""
    assert found(allowed) == []


@pytest.mark.parametrize(
    "body",
    [
        "a: int\n b: str = ''\n c = attrs.field()\n d: ClassVar[int] = 1",
        "__slots__ = ('a', 'b', 'c')",
        "def f(self):\n  self.a, self.b = 1, 2\n  self.c: int = 3\n  it.d = self.e",
        "__slots__ = ('a', 'b')\n async def f(self):\n  self.a = self.c = 1",
    ],
)
def test_the_width_of_a_class_is_the_number_of_its_attributes(body: str, tmp_path: Path) -> None:
    """Fields, slots and what methods assign count once each."""
    (tmp_path / "a.py").write_text(f"class Narrow: pass\nclass Wide:\n {body}\n")
    assert figures.widths([tmp_path / "a.py"]) == [(3, "Wide"), (0, "Narrow")]


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
    assert figures.caps([requirement]) == ({"a"} if is_found else set())


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a project that misses no bound, with a copy of the script."""
    for folder in ("tests", "promptlayer_exec/_push"):
        (tmp_path / folder).mkdir(parents=True)
    lists = "WIDE, LEFT, LEFT_CAPS = {}, {'_push: _theirs'}, {'a'}\n\n\ndef main()"
    script = SCRIPT.read_text(encoding="utf-8").replace("def main()", lists, 1)
    (tmp_path / "tests" / "figures.py").write_text(script, encoding="utf-8")
    (tmp_path / "promptlayer_exec" / "a.py").write_text("class A: pass\n")
    (tmp_path / "promptlayer_exec" / "_push" / "b.py").write_text("it._theirs\n")
    (tmp_path / "pyproject.toml").write_text(
        "[project]\ndependencies = ['a<1.5']\noptional-dependencies = {}\n[dependency-groups]\n"
    )
    return tmp_path


def run(project: Path) -> tuple[int, list[str]]:
    """Return the exit code of the script, and what it says of missed bounds."""
    command = [sys.executable, str(project / "tests" / "figures.py")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.stderr == ""
    return ended.returncode, ended.stdout.splitlines()


def test_a_project_within_its_bounds_is_exit_code_0(project: Path) -> None:
    """What is left is printed by name."""
    code, lines = run(project)
    assert (code, lines[-1]) == (0, "missed:")
    assert "  left: _push: _theirs" in lines
    assert "  left: a" in lines


@pytest.mark.parametrize(
    ("path", "text", "missed"),
    [
        (
            "promptlayer_exec/a.py",
            "\n" * (figures.MOST_LINES["core"] - 1),
            f"core: {figures.MOST_LINES['core'] + 1} lines, more than",
        ),
        ("tests/a.py", "\n" * (figures.MOST_LINES["tests"] + 1), "tests: "),
        (
            "promptlayer_exec/a.py",
            "class B:\n" + "".join(f" a{number}: int\n" for number in range(16)),
            "class B has over 15 attributes",
        ),
        (
            "promptlayer_exec/a.py",
            "it._theirs\n",
            "a.py:2 uses a private name of others: it._theirs",
        ),
        ("promptlayer_exec/_push/b.py", None, "_push: _theirs misses no bound any more"),
        ("pyproject.toml", "test = ['b>=2,<2.5']", "b is capped below its next major version"),
    ],
)
def test_a_missed_bound_is_exit_code_1(
    project: Path, path: str, text: str | None, missed: str
) -> None:
    """So is a name that is on a list for nothing."""
    file = project / path
    before = file.read_text() if text is not None and file.exists() else ""
    file.write_text(before + (text or ""))
    code, lines = run(project)
    assert (code, lines[-2]) == (1, "missed:")
    assert lines[-1].strip().startswith(missed)
