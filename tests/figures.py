"""Print the figures of the project, and fail for what it must not use.

The figures are the size of each package and how much air its code has. The script fails only for
private names of other packages, and for caps of dependencies below their next major version.

Usage: python tests/figures.py
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from ast import unparse
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "promptlayer_exec"
APART = {"redis.py", "opentelemetry.py", "pytest_plugin.py"}  # need an extra, as sub-packages do
LONG = 15  # lines, from which on a function needs paragraphs
Function = ast.FunctionDef | ast.AsyncFunctionDef
# Documented, in spite of their names.
DOCUMENTED = {"os._exit", "_asdict", "_fields", "_make", "_replace"}
# As good as private, in spite of their names: in no `__all__` and in no documentation.
UNDOCUMENTED = {"SendTimeoutError", "server_state"}
# Functions of other packages that may return our objects, and modules whose types are nobody's.
PASSING = {"cast", "copy", "deepcopy", "evolve", "replace", "shield", "wait_for"}
ABSTRACT = {"typing", "typing_extensions", "collections.abc"}


def core_files(package: Path) -> list[Path]:
    """Return the modules of the core: what a session needs, and no extra."""
    modules = [path for path in package.glob("*.py") if path.name not in APART]
    return sorted([*modules, *package.glob("_*/**/*.py")])


def air(texts: Iterable[str]) -> str:
    """Return the row of the table for some modules, without its name."""
    lines = long = airy = constants = conditionals = 0
    for text in texts:
        tree, text_lines = ast.parse(text), text.splitlines()
        nodes = list(ast.walk(tree))
        functions = [node for node in nodes if isinstance(node, Function) and is_long(node)]

        lines += len(text_lines)
        long += len(functions)
        airy += sum(has_paragraphs(function, text_lines) for function in functions)
        constants += sum(map(count_constants, tree.body))
        conditionals += sum(isinstance(node, ast.IfExp) for node in nodes)

    share = f"{airy / long:.0%}" if long else "-"
    thousands = max(lines, 1) / 1000
    return row(lines, share, f"{constants / thousands:.1f}", f"{conditionals / thousands:.1f}")


def row(*cells: object) -> str:
    """Return the cells of a row of the table, each in its column."""
    return "".join(f"{cell!s:>14}" for cell in cells)


def is_long(function: Function) -> bool:
    """Return whether a function needs paragraphs."""
    return function.end_lineno is not None and function.end_lineno - function.lineno + 1 >= LONG


def has_paragraphs(function: Function, lines: list[str]) -> bool:
    """Return whether a function has a blank line in its body, after the docstring."""
    has_docstring = ast.get_docstring(function, clean=False) is not None
    body = function.body[1:] if has_docstring else function.body
    if not body:
        return False
    return any(not line.strip() for line in lines[body[0].lineno - 1 : function.end_lineno])


def count_constants(statement: ast.stmt) -> int:
    """Return how many constants a statement of a module defines: names in capitals, no types."""
    match statement:
        case ast.Assign(targets=targets, value=value):
            pass
        case ast.AnnAssign(target=target, value=ast.expr() as value, annotation=annotation):
            if unparse(annotation).endswith("TypeAlias"):
                return 0
            targets = [target]
        case _:
            return 0

    if isinstance(value, ast.Call) and re.search(r"(TypeVar|ParamSpec)\w*$", unparse(value.func)):
        return 0
    stored = [node for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    return sum(re.fullmatch(r"_*[A-Z][A-Z0-9_]*", node.id) is not None for node in stored)


def assigned(tree: ast.AST) -> set[str]:
    """Return the attributes of `self` and `cls` that some code assigns."""
    stores = [node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)]
    attributes = [node for node in stores if isinstance(node, ast.Attribute)]
    return {node.attr for node in attributes if unparse(node.value) in {"self", "cls"}}


def is_private(name: str) -> bool:
    """Return True if a name begins with an underscore and does not end with one."""
    return name.startswith("_") and not name.endswith("_")


def own_names(trees: Iterable[ast.AST]) -> set[str]:
    """Return the private names that some modules define, as attributes or otherwise."""
    found = set()
    for tree in trees:
        found |= assigned(tree)
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    found.add(node.name)
                case ast.Name(ctx=ast.Store()):
                    found.add(node.id)
    return set(filter(is_private, found))


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt | ast.expr, str, str]]:
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


def is_foreign(expr: ast.expr | None, foreign: set[str]) -> bool:
    """Return True if an expression or an annotation is an object or a type of another package."""
    match expr:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in PASSING:
            return False
        case ast.BinOp(left=left, right=right):
            return is_foreign(left, foreign) or is_foreign(right, foreign)
        case ast.Call(func=inner) | ast.Await(value=inner) | ast.Subscript(value=inner):
            return is_foreign(inner, foreign)
        case ast.Attribute(value=inner):
            return unparse(expr) in foreign or is_foreign(inner, foreign)
    return isinstance(expr, ast.Name) and expr.id in foreign


def foreign_names(tree: ast.AST) -> set[str]:
    """Return the variables, also of the form `self.name`, that are always objects of others."""
    foreign = {name for _, path, name in imports(tree) if path.rpartition(".")[0] not in ABSTRACT}
    for _ in range(3):  # as one variable may be assigned from another
        bound: dict[str, list[bool]] = defaultdict(list)
        for node in ast.walk(tree):
            match node:
                case ast.arg():
                    bound[node.arg].append(is_foreign(node.annotation, foreign))
                case ast.AnnAssign():
                    for start in ("", "self."):  # it may be a field
                        name = start + unparse(node.target)
                        bound[name].append(is_foreign(node.annotation, foreign))
                case ast.Assign():
                    for target in node.targets:
                        bound[unparse(target)].append(is_foreign(node.value, foreign))
                case ast.withitem(optional_vars=ast.Name(id=name)):
                    bound[name].append(is_foreign(node.context_expr, foreign))
        foreign |= {name for name, every in bound.items() if all(every)}
    return foreign


def uses(source: str, own: set[str]) -> list[tuple[int, str, str]]:
    """Return the private names of others that a module uses: the line, the name and the code.

    An attribute is another package's if its name is not in `own`, or its object is another's.
    """
    tree = ast.parse(source)
    foreign = foreign_names(tree)
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    derived = [cls for cls in classes if any(is_foreign(base, foreign) for base in cls.bases)]
    within = {node for cls in derived for node in ast.walk(cls)}
    found: list[tuple[int, str, str]] = []
    for statement, path, _ in imports(tree):
        if any(is_private(part) or part in UNDOCUMENTED for part in path.split(".")):
            found.append((statement.lineno, path, unparse(statement)))
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=name):
                pass
            case ast.Call(func=ast.Name(id=func), args=[value, ast.Constant(value=str(name)), *_]):
                if func not in {"getattr", "setattr", "hasattr", "delattr"}:
                    continue
            case _:
                continue
        is_object = is_foreign(value, foreign) or (unparse(value) == "super()" and node in within)
        if name in UNDOCUMENTED or (is_private(name) and (is_object or name not in own)):
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


def main() -> int:
    """Print the figures, and then what must not be there; return the exit code."""
    package = ROOT / PACKAGE
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    missed = sorted([*foreign_uses(package, texts), *capped_requirements()])

    lines = [*table(package, texts), "missed:", *(f"  {line}" for line in missed)]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 1 if missed else 0


def table(package: Path, texts: dict[Path, str]) -> Iterator[str]:
    """Yield the rows for the package, its core, its sub-packages, and the tests."""
    yield f"airy: the functions of at least {LONG} lines that have a blank line in their body"
    yield "constants, conditionals: those of modules, and conditional expressions, per 1,000 lines"
    yield row("lines", "airy", "constants", "conditionals")

    yield f"{air(texts.values())}  {PACKAGE}"
    yield f"{air(texts[path] for path in core_files(package))}    core"
    for folder in sorted({path.parent for path in texts} - {package}):
        within = [text for path, text in texts.items() if path.parent == folder]
        yield f"{air(within)}    {folder.relative_to(package).as_posix()}"

    tests = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    yield f"{air(tests)}  tests"


def foreign_uses(package: Path, texts: dict[Path, str]) -> Iterator[str]:
    """Yield what to say of each private name of another package that is used."""
    own = own_names(map(ast.parse, texts.values())) | {path.stem for path in package.rglob("_*")}
    for path, text in texts.items():
        name = path.relative_to(package).as_posix()
        for line, _, code in uses(text, own):
            yield f"{name}:{line} uses a private name of others: {code}"


def capped_requirements() -> Iterator[str]:
    """Yield what to say of each requirement that is capped below its next major version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras, groups = project["project"]["optional-dependencies"], project["dependency-groups"]
    lists = (project["project"]["dependencies"], *extras.values(), *groups.values())
    requirements = (entry for entries in lists for entry in entries if isinstance(entry, str))
    for name in sorted(caps(requirements)):
        yield f"{name} is capped below its next major version"


if __name__ == "__main__":
    sys.exit(main())
