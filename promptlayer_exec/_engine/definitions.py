"""The definitions of workflows: read in one place, and kept for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

import attrs

from promptlayer_exec._api.attempt import SendControlRequest
from promptlayer_exec._api.catalog import read_workflow, workflow_request
from promptlayer_exec._errors import RequestTimeout, SessionClosed, copy_error
from promptlayer_exec._events import logger
from promptlayer_exec._expiring import ExpiringDict
from promptlayer_exec._models import StartRequest
from promptlayer_exec._text import printable
from promptlayer_exec._workflows import Workflow

# A workflow's name or id, a label and a version.
_Key: TypeAlias = tuple[str | int, str | None, int | None]


@attrs.frozen
class _Limits:
    """How long a start waits for a definition, and what is kept.

    Every start needs the required inputs, which are small: a start of a workflow that is not among
    the 10,000 kept costs a request. Nodes are needed only by those who show a graph, and a workflow
    may have thousands: only the latest 20 keep theirs. The raw body, with the prompts, goes.
    """

    timeout: float = 5.0
    kept_for: float = 300.0
    most: int = 10_000
    most_with_nodes: int = 20


_LIMITS = _Limits()


@attrs.define(eq=False)
class Definitions:
    """Reads the definition of each version once for all who need it, and keeps it for five minutes.

    Starts check their inputs with it, push needs the workflow's id, and the command line, the
    viewer and the MCP server show it.
    """

    _call: SendControlRequest
    _spawn: Callable[
        [Coroutine[Any, Any, Workflow | Exception]], asyncio.Task[Workflow | Exception]
    ]
    # Without nodes; None where there is no definition, so that no start waits for it again.
    _kept: ExpiringDict[_Key, tuple[Workflow | None]] = attrs.field(
        init=False, factory=lambda: ExpiringDict(_LIMITS.kept_for, _LIMITS.most)
    )
    _kept_with_nodes: ExpiringDict[_Key, Workflow] = attrs.field(
        init=False, factory=lambda: ExpiringDict(_LIMITS.kept_for, _LIMITS.most_with_nodes)
    )
    _reading: dict[_Key, asyncio.Task[Workflow | Exception]] = attrs.field(init=False, factory=dict)
    _warned: set[tuple[int, str]] = attrs.field(init=False, factory=set)

    async def check(self, request: StartRequest, inputs: Mapping[str, Any]) -> None:
        """Raise `InvalidInputs` for missing ones, if the server names those required in time."""
        key = request.workflow, request.label, request.version

        kept = self._kept.get(key)
        if kept is not None:
            with suppress(ValueError):  # it may have changed since, so it is read once more
                self._check(*kept, inputs)
                return

        found = await self._read(key)
        if isinstance(found, Workflow):
            self._check(found, inputs)
        else:  # whatever it is, the start itself will report it
            name, why = request.workflow, type(found).__name__
            logger.debug("workflow %.100r: inputs not checked, no definition (%s)", name, why)

    def _check(self, workflow: Workflow | None, inputs: Mapping[str, Any]) -> None:
        if workflow is None:
            return

        workflow.check_inputs(inputs)
        for name, kind in (workflow.required_inputs or {}).items():
            is_number = isinstance(inputs[name], int | float) and not isinstance(inputs[name], bool)
            if kind == "string" and is_number and (workflow.id, name) not in self._warned:
                self._warned.add((workflow.id, name))
                logger.warning(
                    "workflow %.100s expects its input %.100s as a string, but gets a number",
                    printable(repr(workflow.name)),
                    printable(repr(name)),
                )

    async def find_id(self, workflow: str) -> int:
        """Return the id of the workflow with a name; raises a `RequestError`."""
        for key in self._kept:
            if key[0] == workflow and (kept := self._kept.get(key)) is not None and kept[0]:
                return kept[0].id
        return (await self.get(workflow)).id

    async def get(
        self,
        workflow: str | int,
        label: str | None = None,
        version: int | None = None,
        *,
        fresh: bool = False,
    ) -> Workflow:
        """Return a definition with its nodes, but without `raw`.

        One that is kept will do, unless it must be `fresh`. That there was none is not kept here:
        whoever asks again may have corrected the name.

        Raises:
            RequestError: it did not come, or not within 5 s. There is one attempt only.
            TypeError, ValueError: there can be no such workflow, label or version.
        """
        key = workflow, label, version
        kept = self._kept_with_nodes.get(key)
        if kept is not None and not fresh:
            return kept

        found = await self._read(key)
        if isinstance(found, Exception):
            raise copy_error(found)
        return found

    async def _read(self, key: _Key) -> Workflow | Exception:
        """Return a definition, or why it did not come; all who wait for it share one request."""
        reading = self._reading.get(key)
        if reading is None:
            reading = self._reading[key] = self._spawn(self._request(key))
            reading.add_done_callback(lambda _: self._reading.pop(key))

        await asyncio.wait([reading])  # unlike `await`, it does not pass on a cancellation
        if reading.cancelled():
            return SessionClosed()
        return reading.result()

    async def _request(self, key: _Key) -> Workflow | Exception:
        limit = asyncio.timeout(_LIMITS.timeout)
        try:
            async with limit:
                found = await self._call(workflow_request(*key), read_workflow)
        except Exception as error:  # noqa: BLE001 - those who wait for it decide
            self._kept.add(key, (None,))
            if limit.expired():
                return RequestTimeout(f"no response within {_LIMITS.timeout:g} s")
            return error

        found = attrs.evolve(found, raw=None)
        self._kept.add(key, (attrs.evolve(found, nodes={}, edges=()),))
        self._kept_with_nodes.add(key, found)
        return found
