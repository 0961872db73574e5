"""The public API, name by name: what is there, annotated and documented.

`python tests/test_public_api.py` renews `tests/public_api.txt`, for a reviewer to read.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from inspect import get_annotations as annotations
from pathlib import Path
from typing import Any

import attrs
import pytest

import promptlayer_exec

SNAPSHOT = Path(__file__).with_name("public_api.txt")
# Modules without a public API of their own: a command, a plugin, a page, and a setting.
NOT_PUBLIC = ("cli", "push", "pytest_plugin", "viewer")
MODULES = [
    "promptlayer_exec",
    *sorted(
        f"promptlayer_exec.{module.name}"
        for module in pkgutil.iter_modules(promptlayer_exec.__path__)
        if not module.name.startswith("_") and module.name not in NOT_PUBLIC
    ),
]


def public(module: str) -> Iterator[tuple[str, Any]]:
    """Yield the public names of a module, and what they are."""
    public_names = sorted(importlib.import_module(module).__all__)
    for name in public_names:
        yield f"{module}.{name}", getattr(sys.modules[module], name)


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield the methods and properties that a class defines itself, as plain functions."""
    for name, value in vars(cls).items():
        if name.startswith("_") and name != "__call__":
            continue
        if isinstance(value, staticmethod | classmethod):
            yield name, value.__func__
        elif isinstance(value, property):
            yield name, value.fget
        elif inspect.isfunction(value):
            yield name, value


def written(it: Any) -> str:
    """Return a signature, without the ways to write a type that depend on Python's version."""
    text = re.sub(r"ForwardRef\('(\w+)'\)", r"\1", str(inspect.signature(it)))
    return re.sub(r"Optional\[(\w+)\]", r"\1 | None", text)


def describe(name: str, it: Any) -> Iterator[str]:
    """Yield the lines that describe a public name."""
    if not callable(it):
        yield f"{name}: {type(it).__name__}"
        return
    if not inspect.isclass(it):
        yield f"{name}{written(it)}"
        return
    bases = ", ".join(base.__name__ for base in it.__bases__ if base is not object)
    yield f"class {name}({bases})"
    if issubclass(it, enum.Enum):
        yield "".join(f" {member.name}={member.value}" for member in it)
    elif not getattr(it, "_is_protocol", False):
        yield f"    {written(it)}"
    if attrs.has(it):
        # As written: the fields' own types may have been resolved by cattrs meanwhile.
        types = {k: v for base in reversed(it.__mro__) for k, v in annotations(base).items()}
        yield from (f"    {field.name}: {types[field.name]}" for field in attrs.fields(it))
    for member, value in sorted(members(it)):
        yield f"    {member}{written(value)}"


def snapshot() -> str:
    """Return the whole public API as text."""
    return "".join(
        f"{line}\n"
        for module in MODULES
        for name, it in public(module)
        for line in describe(name, it)
    )


def flaws(name: str, it: Any) -> list[str]:
    """Return what lacks a docstring, or an annotation."""
    if not callable(it):
        return []
    found = [] if it.__doc__ else [f"{name}: no docstring"]
    functions = [(name, it)] if not inspect.isclass(it) else list(members(it))
    for member, function in functions:
        if not function.__doc__:
            found.append(f"{name}.{member}: no docstring")
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        found += [f"{name}.{member}({p.name})" for p in named if p.annotation is p.empty]
        if signature.return_annotation is signature.empty:
            found.append(f"{name}.{member} -> ?")
    return found


def test_the_public_api_is_as_it_was_reviewed() -> None:
    """A change of a name or a signature shows in `tests/public_api.txt`, and in its review."""
    assert snapshot() == SNAPSHOT.read_text(encoding="utf-8")


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_annotated_and_documented(module: str) -> None:
    """Methods and properties, too."""
    assert [flaw for name, it in public(module) for flaw in flaws(name, it)] == []


def implied_aliases(it: Any) -> list[str]:
    """Return the fields of an attrs class whose argument has another name that it does not write.

    attrs drops the underscore of `_secret`, which type checkers do not all know.
    """
    if not (inspect.isclass(it) and attrs.has(it)):
        return []
    source = inspect.getsource(it)
    return [
        field.name
        for field in attrs.fields(it)
        if field.init and field.name != field.alias and f'alias="{field.alias}"' not in source
    ]


@pytest.mark.parametrize("module", MODULES)
def test_every_type_checker_knows_the_names_of_arguments(module: str) -> None:
    """The argument of an attrs class has the name of the attribute, or an explicit `alias`."""
    assert [(name, field) for name, it in public(module) for field in implied_aliases(it)] == []


def test_a_planted_flaw_is_found() -> None:
    """The check above can fail."""

    class Planted:
        def method(self, it):  # type: ignore[no-untyped-def]
            pass

    assert flaws("P", Planted) == [
        "P: no docstring",
        "P.method: no docstring",
        "P.method(it)",
        "P.method -> ?",
    ]


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot(), encoding="utf-8")
    sys.stdout.write(f"wrote {SNAPSHOT.name}\n")
