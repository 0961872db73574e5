"""The package itself: what it is installed with, and names that stand for one thing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
from collections import Counter
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import promptlayer_exec

PACKAGE = Path(promptlayer_exec.__file__).parent
# Every package has these two.
IN_EVERY_PACKAGE = {"__init__", "__main__"}


def test_the_version_is_the_distribution_s() -> None:
    """Both come from one file."""
    assert promptlayer_exec.__version__ == metadata.version("promptlayer-exec")


def test_importing_the_package_imports_no_optional_dependency() -> None:
    """Nor does it import the modules that need one, or the simulator."""
    program = (
        "import sys, promptlayer_exec\n"
        "extras = {'typer', 'rich', 'pytest', 'fastapi', 'uvicorn', 'dbos', 'mcp'}\n"
        "extras |= {'opentelemetry', 'redis'}\n"
        "modules = ('cli', 'mcp', 'simulator', 'viewer', 'pytest_plugin')\n"
        "ours = {f'promptlayer_exec.{module}' for module in modules}\n"
        "print(sorted(sys.modules.keys() & (extras | ours)))\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert printed.stdout == "[]\n"


def test_the_viewer_s_page_is_in_the_package() -> None:
    """The wheel has its files, and not only the Python modules."""
    page = {path.name for path in (PACKAGE / "viewer" / "page").iterdir()}
    assert {"index.html", "viewer.css", "viewer.js"} <= page


def test_the_bill_of_materials_has_every_dependency() -> None:
    """The wheel comes with it, where PEP 770 says, and it names what each extra requires."""
    distribution = metadata.distribution("promptlayer-exec")
    (file,) = [each for each in distribution.files or [] if each.parent.name == "sboms"]
    assert file.parts[0].endswith(".dist-info")
    bill = json.loads(file.read_text(encoding="utf-8"))
    root = bill["metadata"]["component"]
    assert (root["name"], root["version"]) == ("promptlayer-exec", promptlayer_exec.__version__)
    ranges = {each["name"]: each["versionRange"] for each in bill["components"]}
    requirements = [Requirement(line) for line in distribution.requires or []]
    expected = {canonicalize_name(each.name): each.specifier for each in requirements}
    assert ranges.keys() == expected.keys()
    for name, specifier in expected.items():
        assert set(ranges[name].removeprefix("vers:pypi/").split("|")) == set(map(str, specifier))


def test_a_missing_extra_is_named() -> None:
    """The error on importing a module without its extra says what to install."""
    program = """
        import sys, traceback
        modules = {
            "dbos": "dbos", "fastapi": "sse_starlette", "opentelemetry": "opentelemetry",
            "mcp": "mcp", "viewer": "uvicorn", "starts": "sqlalchemy",
        }
        sys.modules |= dict.fromkeys(modules.values())
        for module in modules:
            try:
                __import__(f"promptlayer_exec.{module}")
            except ModuleNotFoundError:
                assert f'python -m pip install ".[{module}]"' in traceback.format_exc()
            else:
                raise AssertionError(module)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)


def test_only_postgresql_needs_its_driver(tmp_path: Path) -> None:
    """The viewer has a SQLite file, and installs no driver."""
    program = """
        import asyncio, pathlib, sys
        sys.modules["psycopg"] = None
        from promptlayer_exec import ConfigurationError
        from promptlayer_exec.starts import SQLStartStore
        from promptlayer_exec.viewer import History

        async def search():
            history = History(pathlib.Path(sys.argv[1]), server="http://a")
            assert (await history.search())["entries"] == []
            await history.aclose()

        asyncio.run(search())
        try:
            SQLStartStore("postgresql://app@db/app")
        except ConfigurationError as error:
            assert 'python -m pip install ".[starts]"' in str(error)
        else:
            raise AssertionError("no error")
    """
    arguments = ["-c", textwrap.dedent(program), str(tmp_path / "history.sqlite")]
    subprocess.run([sys.executable, *arguments], check=True, timeout=60)


def test_no_class_name_stands_for_two_things() -> None:
    """Two classes with one name could not be told apart in conversation.

    Synchronous code has the session and the handle of asynchronous code.
    """
    names = Counter(
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        if path.name != "sync.py" or node.name not in {"Execution", "Session"}
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_no_file_name_stands_for_two_modules() -> None:
    """The path is never needed to say which module is meant, and an underscore does not count."""
    stems = (path.stem for path in PACKAGE.rglob("*.py") if path.stem not in IN_EVERY_PACKAGE)
    names = Counter(stem.lstrip("_") for stem in stems)
    assert [name for name, count in names.items() if count > 1] == []
