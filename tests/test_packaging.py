"""The package itself: its layers, and rules that hold for every module."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import promptlayer_exec
import pytest_promptlayer_exec

PACKAGE = Path(promptlayer_exec.__file__).parent
# Lowest first, one line for each layer: at run time a module imports its own layer and those above
# it in this list. `_push` and `_http` do not know each other: the session brings them together.
LAYERS = [
    {"_version", "_install"},
    {"_values"},
    {"_structuring"},
    {"_api"},
    {"webhooks"},
    {"_engine"},
    {"_push", "_http"},
    {"_session"},
    {"_integration"},
    {"_database", "_uvicorn"},  # need an extra, so only the next one imports them, and late
    {"_doctor"},  # compares a server with what all of the above expect
]
# A snapshot structures its own output, and a workflow's definition checks inputs.
UPWARD = {"_values": {"_structuring"}}
APART = {"_push": {"_http"}, "_http": {"_push"}}


INTEGRATIONS = [
    "cli",
    "dbos",
    "fastapi",
    "mcp",
    "opentelemetry",
    "pytest_plugin",
    "redis",
    "starts",
    "viewer",
]
# The private names that integrations may use.
ALLOWED = {
    "os._exit",  # public, in spite of its name
    *("self.error._asdict", "attempt.error._asdict"),  # public methods of every NamedTuple
}


def run_time_imports(source: str) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports of a module that are not for type checking alone."""
    nodes: list[ast.AST] = [ast.parse(source)]
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes.extend(ast.iter_child_nodes(node))


def imports_of_ours(source: str) -> set[str]:
    """Return the modules of the package that a module imports at run time."""
    found = set()
    for node in run_time_imports(source):
        module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            module = f"promptlayer_exec.{module}".rstrip(".")
        if isinstance(node, ast.Import) or module == "promptlayer_exec":
            names = [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
        else:
            names = [module]
        ours = (name.split(".") for name in names)
        found.update(parts[1] for parts in ours if parts[0] == "promptlayer_exec" and parts[1:])
    return found


def upward_imports(module: str, source: str) -> set[str]:
    """Return the imports of a module that the layering forbids."""
    (number,) = (n for n, layer in enumerate(LAYERS) if module in layer)
    allowed = set().union(*LAYERS[: number + 1]) - APART.get(module, set())
    allowed |= UPWARD.get(module, set())
    return imports_of_ours(source) - allowed


def sources(module: str) -> list[Path]:
    """Return the files of a module, or of a package."""
    if module == "pytest_plugin":
        return [PACKAGE / "pytest_plugin.py", Path(pytest_promptlayer_exec.__file__)]
    file = PACKAGE / f"{module}.py"
    return [file] if file.exists() else sorted((PACKAGE / module).glob("*.py"))


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


def test_every_module_has_its_layer() -> None:
    """Every private module is listed in `LAYERS`, and the public modules that they use."""
    modules = {path.stem for path in PACKAGE.glob("_[a-z]*")}
    assert {*modules, "webhooks"} == set().union(*LAYERS)


@pytest.mark.parametrize("module", sorted(set().union(*LAYERS)))
def test_modules_import_downwards_only(module: str) -> None:
    """So there is no cycle, and a lower module can be understood without the higher ones."""
    for file in sources(module):
        assert upward_imports(module, file.read_text()) == set(), file.name


def test_a_planted_cycle_is_found() -> None:
    """The check above can fail, and ignores imports for type checking."""
    for planted in (
        "from promptlayer_exec._session.session import Session",
        "from ._session import S",
    ):
        late = f"def late():\n    {planted}"
        assert upward_imports("_values", late) == {"_session"}
    typed = "if TYPE_CHECKING:\n    from promptlayer_exec._session.session import Session"
    assert upward_imports("_values", typed) == set()


def test_the_simulator_shares_no_code_with_the_client() -> None:
    """So it can prove the client wrong."""
    for path in (PACKAGE / "simulator").glob("*.py"):
        assert imports_of_ours(path.read_text()) <= {"simulator"}, path.name
    assert imports_of_ours("from promptlayer_exec._api.runs import Request") == {"_api"}


def is_private(name: str) -> bool:
    """Return True if a name is private by its underscore; `__doc__` and `_value_` are not."""
    return name.startswith("_") and not name.endswith("_")


def imported_names(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    """Return the full name of each module or object that a statement imports.

    Args:
        node: the statement.
        package: the full name of the package that it is in.
    """
    names = [alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        return names
    parents = package.split(".")[: 1 - node.level or None] if node.level else []
    return [".".join(filter(None, [*parents, node.module, name])) for name in names]


def private_uses(integration: str, source: str) -> set[str]:
    """Return the private names that a module of an integration uses, except its own.

    These are private modules and objects of this package that it imports, other than those of the
    integration, of `_integration`, `_database` and `_doctor`, and private attributes of any object
    other than `self` and `cls`.

    Args:
        integration: a name of `INTEGRATIONS`.
        source: the module's text.
    """
    own = f"promptlayer_exec.{integration}"
    package = own if (PACKAGE / integration).is_dir() else "promptlayer_exec"
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in imported_names(node, package):
                parts = name.split(".")
                seams = (["_integration"], ["_database"], ["_doctor"], ["_uvicorn"])
                is_seam = parts[1:2] in seams
                is_own = name.startswith(f"{own}.") or is_seam
                if parts[0] == "promptlayer_exec" and not is_own and any(map(is_private, parts)):
                    found.add(name)
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                found.add(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            match node.args:
                case [it, ast.Constant(value=str(name)), *_] if is_private(name):
                    found.add(f"{ast.unparse(it)}.{name}")
    return found


@pytest.mark.parametrize("integration", INTEGRATIONS)
def test_integrations_use_the_public_api_and_one_seam(integration: str) -> None:
    """Beyond the public API they import `_integration` only, and reach into no other object."""
    for file in sources(integration):
        assert private_uses(integration, file.read_text()) <= ALLOWED, file.name


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        (
            "from promptlayer_exec._session.session import Session",
            "promptlayer_exec._session.session.Session",
        ),
        ("from promptlayer_exec import _session", "promptlayer_exec._session"),
        ("import promptlayer_exec._session.session", "promptlayer_exec._session.session"),
        ("from promptlayer_exec.dbos._store import Store", "promptlayer_exec.dbos._store.Store"),
        ("from .._session import Session", "promptlayer_exec._session.Session"),
        ("from .. import _session", "promptlayer_exec._session"),
        (
            "if TYPE_CHECKING:\n    import promptlayer_exec._api.runs as w",
            "promptlayer_exec._api.runs",
        ),
        ("session._limiters.append(1)", "session._limiters"),
        ("self.session._start()", "self.session._start"),
        ("getattr(session, '_start')()", "session._start"),
    ],
)
def test_a_planted_private_use_is_found(planted: str, found: str) -> None:
    """The check above can fail, for every way to write an import or an access."""
    assert private_uses("viewer", planted) == {found}


def test_a_planted_private_use_is_found_in_a_single_module() -> None:
    """Relative imports start at the package there."""
    planted = "from ._session import Session"
    assert private_uses("opentelemetry", planted) == {"promptlayer_exec._session.Session"}


@pytest.mark.parametrize(
    "allowed",
    [
        "from promptlayer_exec import Session, __version__",
        "from promptlayer_exec.simulator import Simulator",
        "from promptlayer_exec._integration import node_dict",
        "from promptlayer_exec import _integration",
        "from promptlayer_exec.viewer._board import Board",
        "from ._board import Board",
        "from . import _board",
        "self._board = cls._make(session.__class__, status._value_)",
        "getattr(session, _NAME)",
    ],
)
def test_public_and_own_names_are_not_private_uses(allowed: str) -> None:
    """The check above finds nothing else."""
    assert private_uses("viewer", allowed) == set()


def test_the_viewer_s_page_is_in_the_package() -> None:
    """The wheel has its files, and not only the Python modules."""
    page = {path.name for path in (PACKAGE / "viewer" / "page").iterdir()}
    assert {"index.html", "viewer.css", "viewer.js"} <= page


def test_only_http_push_doctor_and_a_setting_import_aiohttp() -> None:
    """The engine knows no HTTP, and `Session(http=...)` is checked; others may for annotations."""
    users = set()
    for module in set().union(*LAYERS):
        for file in sources(module):
            for node in run_time_imports(file.read_text()):
                names = [alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                if any(name.split(".")[0] == "aiohttp" for name in names):
                    users.add(module)
    assert users == {"_http", "_push", "_engine", "_doctor"}


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
