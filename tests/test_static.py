"""No cancel scope, timeout or task group of the package spans a `yield`, as PEP 789 asks."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import promptlayer_exec

PACKAGE = Path(promptlayer_exec.__file__).parent
SCOPE_CALL = re.compile(
    r"\b(CancelScope|fail_after|move_on_after|timeout|timeout_at|ResponseTimeout|_?lifetime\.call|Call"
    r"|create_task_group|TaskGroup)\("
)
ENTER_OTHER = {"enter_context", "enter_async_context", "push", "push_async_exit"}
ENTER_ITSELF = {"__enter__", "__aenter__"}


def identifier(node: ast.AST | None) -> str:
    """Return the last name in `scope` or `self._scope`, and an empty text for other nodes."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def assignments(tree: ast.Module) -> Iterator[tuple[list[ast.expr], ast.expr]]:
    """Yield the targets and the value of each assignment in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            yield node.targets, node.value
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            yield [node.target], node.value


class ScopeFinder:
    """Finds each `yield` that a scope spans.

    A variable or attribute counts as a scope wherever it is used, if anywhere in the module a
    scope is assigned to one of that name.

    Attributes:
        lines: the lines of those `yield`s.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.lines: list[int] = []
        self._names: set[str] = set()
        before = -1
        while before < len(self._names):  # a scope may be assigned from one variable to another
            before = len(self._names)
            for targets, value in assignments(tree):
                if self._is_scope(value):
                    self._names.update(filter(None, map(identifier, targets)))
        self._inside = False
        self._visit(tree)

    def _is_scope(self, node: ast.expr) -> bool:
        return identifier(node) in self._names or bool(SCOPE_CALL.search(ast.unparse(node)))

    def _entered_by(self, node: ast.AST) -> str:
        """Return the name of what is entered where a call enters a scope: a stack, or the scope."""
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            return ""
        method, owner = node.func.attr, node.func.value
        enters = (method in ENTER_OTHER and any(map(self._is_scope, node.args))) or (
            method in ENTER_ITSELF and self._is_scope(owner)
        )
        return (identifier(owner) or ast.unparse(owner)) if enters else ""

    def _is_scope_block(self, node: ast.AST) -> bool:
        if not isinstance(node, ast.With | ast.AsyncWith):
            return False
        stacks = {identifier(item.optional_vars) for item in node.items} - {""}
        return any(self._is_scope(item.context_expr) for item in node.items) or any(
            self._entered_by(child) in stacks for child in ast.walk(node)
        )

    def _visit(self, node: ast.AST) -> None:
        inside = self._inside
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_with = isinstance(node, ast.With | ast.AsyncWith)
        if isinstance(node, ast.Yield | ast.YieldFrom) and inside:
            self.lines.append(node.lineno)
        if is_function:
            self._inside = False
        elif self._is_scope_block(node):
            self._inside = True
        for child in ast.iter_child_nodes(node):
            self._visit(child)
        if is_function or is_with:
            self._inside = inside
        elif self._entered_by(node):  # until the end of the block or function
            self._inside = True


def yields_inside_scopes(source: str) -> list[int]:
    """Return the lines of each `yield` that a cancel scope, timeout or task group spans."""
    return ScopeFinder(ast.parse(source)).lines


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_scope_spans_a_yield(path: Path) -> None:
    """A scope that stays open at a `yield` would cancel whatever its consumer does meanwhile."""
    assert yields_inside_scopes(path.read_text()) == []


@pytest.mark.parametrize(
    "planted",
    [
        """
        async def f():
            async with asyncio.timeout(1), other:
                yield 1  # found
        """,
        """
        async def f(self):
            async with self._lifetime.call(deadline):
                yield 1  # found
        """,
        """
        async def f():
            async with anyio.create_task_group() as tasks:
                yield 1  # found
            yield 2
        """,
        """
        async def f():
            scope = anyio.CancelScope()
            yield 1
            with scope:
                yield 2  # found
            yield 3
        """,
        """
        async def f():
            async with (limit := asyncio.timeout_at(1)):
                yield 1  # found
            async with limit:
                yield 2  # found
        """,
        """
        class C:
            async def f(self):
                with self._scope:
                    yield 1  # found
                with self._lock:
                    yield 2

            def __init__(self):
                self._scope = anyio.CancelScope()
        """,
        """
        async def f():
            scope = anyio.CancelScope()
            with ExitStack() as stack:
                stack.enter_context(scope)
                yield 1  # found
            yield 2
        """,
        """
        async def f():
            async with AsyncExitStack() as stack:
                for x in y:
                    yield x  # found
                    await stack.enter_async_context(asyncio.timeout(1))
            yield 2
        """,
        """
        async def f():
            scope = anyio.CancelScope()
            scope.__enter__()
            yield 1  # found

        async def g():
            yield 2
        """,
        """
        async def f():
            with anyio.CancelScope():
                def g():
                    yield 1
                def h():
                    with asyncio.timeout(1):
                        yield 2  # found
        """,
        """
        async def f():
            scopes[1] = anyio.CancelScope()
            with anyio.CancelScope() as scope:
                result = await wait()
            with lock(), locks[1]:
                yield 1
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(session)
                yield result
        """,
    ],
)
def test_a_planted_yield_inside_a_scope_is_found(planted: str) -> None:
    """The check above can fail, and finds no others."""
    source = textwrap.dedent(planted)
    lines = [n for n, line in enumerate(source.splitlines(), 1) if line.endswith("# found")]
    assert yields_inside_scopes(source) == lines
