"""The structure of the package: cycles of imports, and names that stand for one thing."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import promptlayer_exec

PACKAGE = Path(promptlayer_exec.__file__).parent
# Both are honest: an error has the last snapshot, and a handle has its session.
MOST_CYCLES = 2
# Every package has these two.
IN_EVERY_PACKAGE = {"__init__", "__main__"}


def module_name(path: Path) -> str:
    """Return the dotted name of a file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported_modules(source: str, *, types: bool) -> Iterator[str]:
    """Yield the modules of the package that a module imports, also late, and also for `types`."""
    nodes: list[ast.AST] = [ast.parse(source)]
    for node in nodes:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
            nodes.extend(node.orelse)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                module = submodule if submodule in MODULES else node.module
                if module in MODULES:
                    yield module
        else:
            nodes.extend(ast.iter_child_nodes(node))


def import_graph(*, types: bool) -> dict[str, set[str]]:
    """Return which modules each module imports."""
    graph = {}
    for name, path in MODULES.items():
        source = path.read_text(encoding="utf-8")
        graph[name] = set(imported_modules(source, types=types)) - {name}
    return graph


def cycles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the groups of modules of which each imports, by way of others, each."""
    left = {name: set(imports) for name, imports in graph.items()}
    found = []
    while True:
        try:
            TopologicalSorter(left).prepare()
        except CycleError as error:
            start = error.args[1][0]
            reached = reachable(left, start)
            group = {name for name in reached if start in reachable(left, name)}
            found.append(group)
            for name in group:
                left[name] -= group
        else:
            return found


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """Return all modules that a module imports, directly or by way of others."""
    found: set[str] = set()
    new = set(graph[start])
    while new:
        found |= new
        new = {imported for name in new for imported in graph[name]} - found
    return found


def test_modules_do_not_import_each_other_in_cycles_at_run_time() -> None:
    """No module imports itself by way of others, not even late."""
    assert cycles(import_graph(types=False)) == []


def test_two_cycles_remain_with_imports_for_types() -> None:
    """A third would need a good reason."""
    found = cycles(import_graph(types=True))
    assert len(found) <= MOST_CYCLES, found


def test_a_cycle_is_found_as_one_group() -> None:
    """Also if it is entered from outside, and next to another one."""
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": {"e"}, "e": {"d"}}
    assert sorted(map(sorted, cycles(graph))) == [["b", "c"], ["d", "e"]]


def test_no_class_name_stands_for_two_things() -> None:
    """Two classes with one name could not be told apart in conversation."""
    names = Counter(
        node.name
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_no_file_name_stands_for_two_modules() -> None:
    """The path is never needed to say which module is meant, and an underscore does not count."""
    stems = (path.stem for path in MODULES.values() if path.stem not in IN_EVERY_PACKAGE)
    names = Counter(stem.lstrip("_") for stem in stems)
    assert [name for name, count in names.items() if count > 1] == []
