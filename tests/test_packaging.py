"""The package itself: its public API, its layers, and rules that hold for every module."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest

import promptlayer_exec

PACKAGE = Path(promptlayer_exec.__file__).parent
PUBLIC = [
    "Session",
    "Execution",
    "Snapshot",
    "Node",
    "NodeStatus",
    "NodeChange",
    "NodeTimes",
    "MainOutput",
    "StartRequest",
    "Outcome",
    "PollPolicy",
    "RetryPolicy",
    "Limiter",
    "Observer",
    "Event",
    "WatchStarted",
    "Polled",
    "RequestRetried",
    "Throttled",
    "WatchEnded",
    "ExecutionStarted",
    "PromptLayerExecError",
    "ConfigurationError",
    "SessionClosed",
    "RequestError",
    "ConnectionFailed",
    "RequestTimeout",
    "InvalidResponse",
    "ResponseTooLarge",
    "StatusError",
    "BadRequest",
    "Unauthorized",
    "Forbidden",
    "NotFound",
    "RateLimited",
    "ServerError",
    "UnprocessableEntity",
    "StartUnknown",
    "ExecutionTimeout",
    "ExecutionFailed",
    "InvalidOutput",
    "FieldError",
    "__version__",
]
# Lowest first: at run time a module may import only those above it in this list.
LAYERS = [
    "_version",
    "_tasks",
    "_errors",
    "_models",
    "_policies",
    "_events",
    "_json",
    "_outages",
    "_wire",
    "_throttle",
    "_redaction",
    "_settings",
    "_receiving",
    "_transport",
    "_watch",
    "_start",
    "_lifetime",
    "_opening",
    "_structuring",
    "_output",
    "_execution",
    "_fanout",
    "_session",
    "_integration",
]


def imports_of_ours(source: str, depth: int = 1) -> set[str]:
    """Return the modules of the package that a module imports at run time.

    Args:
        source: the module's text.
        depth: how many dots lead from it to the package.
    """
    found = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if ast.unparse(node.test) != "TYPE_CHECKING":
                self.generic_visit(node)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            module = node.module or ""
            if node.level == depth:
                module = f"promptlayer_exec.{module}".rstrip(".")
            if module == "promptlayer_exec":
                found.update(alias.name for alias in node.names)
            elif module.startswith("promptlayer_exec."):
                found.add(module.split(".")[1])

        def visit_Import(self, node: ast.Import) -> None:
            for alias in node.names:
                if alias.name.startswith("promptlayer_exec"):
                    found.add(alias.name.partition(".")[2].split(".")[0])

    Visitor().visit(ast.parse(source))
    return found


def upward_imports(module: str, source: str) -> set[str]:
    """Return the imports of a module that the layering forbids."""
    return imports_of_ours(source) - set(LAYERS[: LAYERS.index(module)])


def sources(module: str) -> list[Path]:
    """Return the files of a module, or of a package."""
    file = PACKAGE / f"{module}.py"
    return [file] if file.exists() else sorted((PACKAGE / module).glob("*.py"))


def test_the_public_api_is_exactly_the_contract_s() -> None:
    """`__all__` has exactly these names, in sorted order, and the package has each of them."""
    assert sorted(PUBLIC) == promptlayer_exec.__all__
    assert all(hasattr(promptlayer_exec, name) for name in PUBLIC)


def test_every_public_name_is_documented() -> None:
    """Each class has a docstring of its own, and so has each of its public methods."""
    for name in PUBLIC[:-1]:
        cls = getattr(promptlayer_exec, name)
        assert cls.__doc__, name
        for member, value in vars(cls).items():
            if inspect.isfunction(value) and not member.startswith("_"):
                assert value.__doc__, f"{name}.{member}"


def test_the_version_is_the_distribution_s() -> None:
    """Both come from one file."""
    assert promptlayer_exec.__version__ == metadata.version("promptlayer-exec")


def test_importing_the_package_imports_no_optional_dependency() -> None:
    """Nor does it import the modules that need one, or the simulator."""
    program = (
        "import sys, promptlayer_exec\n"
        "extras = {'typer', 'rich', 'pytest', 'fastapi', 'uvicorn', 'dbos', 'opentelemetry'}\n"
        "modules = ('cli', 'simulator', 'viewer', 'pytest_plugin')\n"
        "ours = {f'promptlayer_exec.{module}' for module in modules}\n"
        "print(sorted(sys.modules.keys() & (extras | ours)))\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert printed.stdout == "[]\n"


def test_every_module_has_its_layer() -> None:
    """Every private module is listed in `LAYERS`."""
    modules = {path.stem for path in PACKAGE.glob("_[a-z]*")}
    assert modules == set(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_modules_import_downwards_only(module: str) -> None:
    """So there is no cycle, and a lower module can be understood without the higher ones."""
    for file in sources(module):
        assert upward_imports(module, file.read_text()) <= {module}, file.name


def test_a_planted_cycle_is_found() -> None:
    """The check above can fail, and ignores imports for type checking."""
    for planted in ("from promptlayer_exec._session import Session", "from ._session import S"):
        late = f"def late():\n    {planted}"
        assert upward_imports("_errors", late) == {"_session"}
    typed = "if TYPE_CHECKING:\n    from promptlayer_exec._session import Session"
    assert upward_imports("_errors", typed) == set()


def test_the_simulator_shares_no_code_with_the_client() -> None:
    """So it can prove the client wrong."""
    for path in (PACKAGE / "simulator").glob("*.py"):
        assert imports_of_ours(path.read_text(), depth=2) == set(), path.name
    assert imports_of_ours("from .._wire import Request", depth=2) == {"_wire"}


def test_the_command_line_uses_the_public_api() -> None:
    """Apart from the modules that it runs, it is a program like any user's."""
    for path in (PACKAGE / "cli").glob("*.py"):
        used = imports_of_ours(path.read_text(), depth=2)
        assert used <= {*PUBLIC, "simulator", "dbos", "viewer"}, path.name


def test_the_viewer_uses_the_public_api() -> None:
    """Its page is in the wheel."""
    for path in (PACKAGE / "viewer").glob("*.py"):
        assert imports_of_ours(path.read_text(), depth=2) <= {*PUBLIC}, path.name
    page = {path.name for path in (PACKAGE / "viewer" / "page").iterdir()}
    assert {"index.html", "viewer.css", "viewer.js"} <= page


def test_only_the_transport_imports_aiohttp() -> None:
    """Other modules import aiohttp for annotations only."""
    users = set()
    modules = [(name, file) for name in LAYERS for file in sources(name)]
    for module, file in modules:
        tree = ast.parse(file.read_text())
        typed = [node for node in tree.body if isinstance(node, ast.If)]
        names = [
            alias.name
            for node in tree.body
            if isinstance(node, ast.Import) and node not in typed
            for alias in node.names
        ]
        if "aiohttp" in names:
            users.add(module)
    assert users == {"_transport"}


def test_a_missing_extra_is_named() -> None:
    """The error on importing a module without its extra says what to install."""
    program = """
        import sys, traceback
        modules = {
            "dbos": "dbos", "fastapi": "sse_starlette", "opentelemetry": "opentelemetry",
            "viewer": "uvicorn",
        }
        sys.modules |= dict.fromkeys(modules.values())
        for module in modules:
            try:
                __import__(f"promptlayer_exec.{module}")
            except ModuleNotFoundError:
                assert f"pip install 'promptlayer-exec[{module}]'" in traceback.format_exc()
            else:
                raise AssertionError(module)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)
