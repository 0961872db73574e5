"""Fail if the package uses a private name of another package, or caps one below a major version.

ruff finds most private names. It sees neither those that a class inherits, nor the modules that an
import names, and it does not look at the modules that use private names of each other.

Usage: python tests/dependencies.py
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from ast import unparse
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "promptlayer_exec"
# Documented, in spite of their names.
DOCUMENTED = {"os._exit", "_asdict", "_fields", "_make", "_replace"}
# As good as private, in spite of their names: in no `__all__` and in no documentation.
UNDOCUMENTED = {"SendTimeoutError", "server_state"}


def is_private(name: str) -> bool:
    """Return True if a name begins with an underscore and does not end with one."""
    return name.startswith("_") and not name.endswith("_")


def own_names(trees: Iterable[ast.AST]) -> set[str]:
    """Return the private names that some modules define, as attributes or otherwise."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                found.add(name)
    return set(filter(is_private, found))


def imports_of_others(tree: ast.AST) -> Iterator[tuple[ast.stmt | ast.expr, str, str]]:
    """Yield each import from another package: its node, what it imports, and the name it binds."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                found = [(it.name, it.asname or it.name.partition(".")[0]) for it in node.names]
            case ast.ImportFrom(level=0):
                found = [(f"{node.module}.{it.name}", it.asname or it.name) for it in node.names]
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
                is_import = unparse(func).endswith(("import_module", "__import__"))
                found = [(name, "")] if is_import else []
            case _:
                continue
        yield from ((node, path, name) for path, name in found if path.split(".")[0] != PACKAGE)


def overrides_of_others(tree: ast.AST) -> set[ast.AST]:
    """Return all nodes within classes that derive from a class of another package."""
    others = {name for _, _, name in imports_of_others(tree)}
    return {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(unparse(base).partition(".")[0] in others for base in node.bases)
        for inner in ast.walk(node)
    }


def uses(source: str, own: set[str]) -> list[tuple[int, str, str]]:
    """Return the private names of others that a module uses: the line, the name and the code.

    A name is another package's if it is not in `own`, or if a class calls it on its `super()` of
    another package.
    """
    tree = ast.parse(source)
    found: list[tuple[int, str, str]] = []
    for statement, path, _ in imports_of_others(tree):
        if any(is_private(part) or part in UNDOCUMENTED for part in path.split(".")):
            found.append((statement.lineno, path, unparse(statement)))

    overrides = overrides_of_others(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=name):
                pass
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"),
                args=[value, ast.Constant(value=str(name)), *_],
            ):
                pass
            case _:
                continue
        is_inherited = node in overrides and unparse(value) == "super()"
        if name in UNDOCUMENTED or (is_private(name) and (is_inherited or name not in own)):
            found.append((node.lineno, name, unparse(node)))
    return [use for use in found if DOCUMENTED.isdisjoint(use[1:])]


def caps(requirements: Iterable[str]) -> set[str]:
    """Return the names of the packages that are capped below their next major version."""
    found = set()
    for requirement in requirements:
        versions = requirement.partition(";")[0]
        least = re.search(r">=\s*(\d+)", versions)
        for operator, version in re.findall(r"(<=|<|~=|===?)\s*([\d.]+)", versions):
            first, *rest = (int(part) for part in version.strip(".").split("."))
            is_next = operator == "<" and not any(rest) and (not least or first > int(least[1]))
            if not is_next and not (operator == "~=" and len(rest) == 1):
                found.update(re.findall(r"^[\w.-]+", requirement))
    return found


def foreign_uses(package: Path) -> Iterator[str]:
    """Yield what to say of each private name of another package that is used."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    own = own_names(map(ast.parse, texts.values())) | {path.stem for path in package.rglob("_*")}
    for path, text in texts.items():
        name = path.relative_to(package.parent).as_posix()
        for line, _, code in uses(text, own):
            yield f"{name}:{line} uses a private name of another package: {code}"


def capped_requirements(project: Path) -> Iterator[str]:
    """Yield what to say of each requirement that is capped below its next major version."""
    table = tomllib.loads(project.read_text(encoding="utf-8"))
    extras, groups = table["project"]["optional-dependencies"], table["dependency-groups"]
    lists = (table["project"]["dependencies"], *extras.values(), *groups.values())
    requirements = (entry for entries in lists for entry in entries if isinstance(entry, str))
    for name in sorted(caps(requirements)):
        yield f"{name} is capped below its next major version: allow all of the current one"


if __name__ == "__main__":
    found = [*foreign_uses(ROOT / PACKAGE), *capped_requirements(ROOT / "pyproject.toml")]
    sys.exit("\n".join(found) or None)
