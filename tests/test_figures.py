"""The script that measures how much air code has, and finds private names of other packages."""

from __future__ import annotations

import shutil
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
        "from promptlayer_exec._session.session import Session, _ours",
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


def columns(text: str) -> list[str]:
    """Return the figures of a module: lines, airy functions, constants and conditionals."""
    cells: list[str] = figures.air([text]).split()
    return cells


LINES = "    x = 1\n" * 13
DOCUMENTED = '    """Text.\n\n    More.\n    """\n\n'


@pytest.mark.parametrize(
    ("function", "share"),
    [
        (f"def f():\n{LINES}\n    y = 1\n", "100%"),
        (f"async def f():\n{LINES}\n    y = 1\n", "100%"),
        (f"class A:\n  def f():\n{LINES}\n    y = 1\n", "100%"),
        (f"def f():\n{DOCUMENTED}{LINES}\n    y = 1\n", "100%"),
        (f"def f():\n{LINES}    y = 1\n", "0%"),
        (f"def f():\n{LINES}    y = 1\n\n\nx = 1\n", "0%"),
        (f"def f():\n{DOCUMENTED}{LINES}", "0%"),
        (f"def f():\n{LINES}    y = 1\ndef g():\n{LINES}\n    y = 1\n", "50%"),
        (f"def f():\n{LINES}", "-"),
        (f"@decorated\ndef f():\n{LINES}", "-"),
    ],
)
def test_a_long_function_has_air_if_a_line_in_its_body_is_blank(function: str, share: str) -> None:
    """Fifteen lines from `def` are long. The docstring, and what follows it, does not count."""
    assert columns(function)[1] == share


@pytest.mark.parametrize(
    ("statement", "count"),
    [
        ("A = 1", 1),
        ("_A_2 = __B = 1", 2),
        ("A, (B, c) = 1, (2, 3)", 2),
        ("A: Final = 1", 1),
        ("A: int", 0),
        ("Hook = a = 1", 0),
        ("T = TypeVar('T')", 0),
        ("P = typing.ParamSpec('P')", 0),
        ("JSON: TypeAlias = int", 0),
        ("def f(): A = 1", 0),
        ("class C: A = 1", 0),
    ],
)
def test_a_constant_is_a_name_in_capitals_that_a_module_assigns(statement: str, count: int) -> None:
    """Types and type variables are none."""
    assert columns(statement)[2] == f"{count * 1000}.0"


def test_conditional_expressions_are_counted_at_any_depth() -> None:
    """They are shown per 1,000 lines, as constants are; statements with `if` are none."""
    assert columns("x = f(a if b else (c if d else e))\nif x:\n pass\n\n")[3] == "500.0"
    assert columns("")[2:] == ["0.0", "0.0"]


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
    """Return a project with nothing that it must not use, and a copy of the script."""
    for folder in ("tests", "promptlayer_exec/_push", "promptlayer_exec/cli"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "tests")
    (tmp_path / "promptlayer_exec" / "a.py").write_text("A = 1\n")
    (tmp_path / "promptlayer_exec" / "redis.py").write_text("\n\n")
    (tmp_path / "promptlayer_exec" / "_push" / "b.py").write_text("\n\n\n")
    (tmp_path / "promptlayer_exec" / "cli" / "c.py").write_text("\n\n\n\n")
    (tmp_path / "pyproject.toml").write_text(
        "[project]\ndependencies = ['a<2']\noptional-dependencies = {}\n[dependency-groups]\n"
    )
    return tmp_path


def run(project: Path) -> tuple[int, list[str]]:
    """Return the exit code of the script, and the lines that it prints."""
    command = [sys.executable, str(project / "tests" / "figures.py")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.stderr == ""
    return ended.returncode, ended.stdout.splitlines()


def test_every_package_has_a_row(project: Path) -> None:
    """So have the whole, and its core: the modules that need no extra."""
    code, lines = run(project)
    assert (code, lines[-1]) == (0, "missed:")
    rows = [line.split() for line in lines[3:-1]]
    assert [(name, count) for count, *_, name in rows[:-1]] == [
        ("promptlayer_exec", "10"),
        ("core", "4"),
        ("_push", "3"),
        ("cli", "4"),
    ]
    assert rows[0][1:4] == ["-", "100.0", "0.0"]
    assert rows[-1][-1] == "tests"


def test_nothing_is_too_long_or_too_wide(project: Path) -> None:
    """Neither lines nor the attributes of a class are bounded."""
    fields = "".join(f" a{number}: int\n" for number in range(100))
    text = f"class A:\n{fields}" + "\n" * 100_000
    (project / "promptlayer_exec" / "a.py").write_text(text)
    assert run(project)[0] == 0


@pytest.mark.parametrize(
    ("path", "text", "missed"),
    [
        (
            "promptlayer_exec/a.py",
            "it._theirs\n",
            "a.py:2 uses a private name of others: it._theirs",
        ),
        ("pyproject.toml", "test = ['b>=2,<2.5']", "b is capped below its next major version"),
    ],
)
def test_a_private_name_or_a_cap_is_exit_code_1(
    project: Path, path: str, text: str, missed: str
) -> None:
    """The script says which, and where."""
    with (project / path).open("a") as file:
        file.write(text)
    code, lines = run(project)
    assert (code, lines[-2:]) == (1, ["missed:", f"  {missed}"])
