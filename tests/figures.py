"""Print the figures of the project, and fail where one misses its bound.

They are the lines of each package, the attributes of the widest classes, the private names of other
packages that are used, and the caps of dependencies below their next major version.

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
MOST_LINES = {"core": 8_300, "whole": 21_040, "tests": 36_000}
MOST_ATTRIBUTES = 15
# Why a class of the core may have more attributes; one that no longer does comes off the list.
WIDE = {"Settings": "only declares what a session can be given; each is a public argument"}
# What `dbos` still uses, as "folder: name"; what they no longer do comes off the list.
LEFT: set[str] = set()
LEFT_CAPS: set[str] = set()
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


def count_lines(paths: Iterable[Path]) -> int:
    """Return the lines of some files."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def attributes(cls: ast.ClassDef) -> set[str]:
    """Return the attributes of a class: its fields, its slots, and what its methods assign."""
    found = set()
    for node in cls.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)) if "ClassVar" not in unparse(node):
                found.add(name)
            case ast.Assign(targets=[ast.Name(id="__slots__")]):
                texts = [it.value for it in ast.walk(node.value) if isinstance(it, ast.Constant)]
                found.update(text for text in texts if isinstance(text, str))
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=func)):
                if re.fullmatch(r"(attrs\.|attr\.)?(field|ib)", unparse(func)):
                    found.add(name)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                found.update(assigned(node))
    return found


def assigned(tree: ast.AST) -> set[str]:
    """Return the attributes of `self` and `cls` that some code assigns."""
    stores = [node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)]
    attributes = [node for node in stores if isinstance(node, ast.Attribute)]
    return {node.attr for node in attributes if unparse(node.value) in {"self", "cls"}}


def widths(paths: Iterable[Path]) -> list[tuple[int, str]]:
    """Return the number of attributes and the name of each class, the widest first."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return sorted(((len(attributes(cls)), cls.name) for cls in classes), reverse=True)


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
    """Print all figures, and then what misses its bound; return the exit code."""
    missed = []
    package = ROOT / PACKAGE
    files, core = sorted(package.rglob("*.py")), core_files(package)
    folders = sorted({path.parent for path in files} - {package})
    lines = {"core": count_lines(core)}
    lines |= {f"  {it.name}": count_lines(it.glob("*.py")) for it in folders}
    lines |= {"whole": count_lines(files), "tests": count_lines((ROOT / "tests").rglob("*.py"))}
    _print("lines of Python", (f"{count:6} {name}" for name, count in lines.items()))
    missed += [
        f"{name}: {lines[name]} lines, more than {most}"
        for name, most in MOST_LINES.items()
        if lines[name] > most
    ]

    widest = widths(core)
    _print("widest classes of the core", (f"{count:6} {name}" for count, name in widest[:10]))
    wide = {name for count, name in widest if count > MOST_ATTRIBUTES}
    missed += [f"class {name} has over {MOST_ATTRIBUTES} attributes" for name in wide - WIDE.keys()]

    texts = {path.relative_to(package): path.read_text(encoding="utf-8") for path in files}
    own = own_names(map(ast.parse, texts.values())) | {path.stem for path in package.rglob("_*")}
    found = {
        f"{path.parts[0]}: {name}": f"{path}:{line} uses a private name of others: {code}"
        for path, text in texts.items()
        for line, name, code in uses(text, own)
    }
    left = sorted(LEFT & found.keys())
    _print("private names of other packages", [f"  left: {'; '.join(left) or 'none'}"])
    missed += [found[use] for use in found.keys() - LEFT]

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras, groups = project["project"]["optional-dependencies"], project["dependency-groups"]
    lists = (project["project"]["dependencies"], *extras.values(), *groups.values())
    capped = caps(it for each in lists for it in each if isinstance(it, str))
    left = sorted(LEFT_CAPS & capped)
    _print("caps below the next major version", [f"  left: {', '.join(left) or 'none'}"])
    missed += [f"{name} is capped below its next major version" for name in capped - LEFT_CAPS]

    gone = (WIDE.keys() - wide) | (LEFT - found.keys()) | (LEFT_CAPS - capped)
    missed += [f"{name} misses no bound any more: take it off its list" for name in gone]
    _print("missed", (f"  {line}" for line in sorted(missed)))
    return 1 if missed else 0


def _print(title: str, lines: Iterable[str]) -> None:
    sys.stdout.write("\n".join([f"{title}:", *lines, ""]))


if __name__ == "__main__":
    sys.exit(main())
