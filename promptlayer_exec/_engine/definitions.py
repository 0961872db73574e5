"""The definitions of workflows: read in one place, and cached for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

import attrs

from promptlayer_exec._api.attempt import SendControlRequest
from promptlayer_exec._api.catalog import read_workflow, workflow_request
from promptlayer_exec._engine.expiring import ExpiringDict
from promptlayer_exec._values.errors import RequestTimeout, SessionClosed, copy_error
from promptlayer_exec._values.events import logger
from promptlayer_exec._values.models import StartRequest
from promptlayer_exec._values.text import printable
from promptlayer_exec._values.workflow_definition import WorkflowDefinition

# A workflow's name or id, a label and a version.
_Key: TypeAlias = tuple[str | int, str | None, int | None]


@attrs.frozen
class _Limits:
    """How long to wait for a definition before starting a run, and how many to cache.

    Every run needs the required inputs, which are small: with more than 10,000 workflows, some runs
    cost another request. Only graphs need the nodes, and a workflow may have thousands, so the
    cache has the nodes of the latest 20 only. It drops the raw body, which has the prompts.
    """

    timeout: float = 5.0
    kept_for: float = 300.0
    most: int = 10_000
    most_with_nodes: int = 20


_LIMITS = _Limits()


@attrs.define(eq=False)
class Definitions:
    """Reads each definition once for all callers, and caches it for five minutes.

    Starts check their inputs against it, push needs the workflow's id, and the command line, the
    viewer and the MCP server show it.
    """

    _call: SendControlRequest
    _spawn: Callable[
        [Coroutine[Any, Any, WorkflowDefinition | Exception]],
        asyncio.Task[WorkflowDefinition | Exception],
    ]
    # Without nodes. None if there is no definition, so that no start waits for it again.
    _kept: ExpiringDict[_Key, tuple[WorkflowDefinition | None]] = attrs.field(
        init=False, factory=lambda: ExpiringDict(_LIMITS.kept_for, _LIMITS.most)
    )
    _kept_with_nodes: ExpiringDict[_Key, WorkflowDefinition] = attrs.field(
        init=False, factory=lambda: ExpiringDict(_LIMITS.kept_for, _LIMITS.most_with_nodes)
    )
    _reading: dict[_Key, asyncio.Task[WorkflowDefinition | Exception]] = attrs.field(
        init=False, factory=dict
    )
    _warned: set[tuple[int, str]] = attrs.field(init=False, factory=set)

    async def check(self, request: StartRequest, inputs: Mapping[str, Any]) -> None:
        """Raise `InvalidInputs` if required ones are missing and the definition arrives in time."""
        key = request.workflow, request.label, request.version

        kept = self._kept.get(key)
        if kept is not None:
            with suppress(ValueError):  # the workflow may have changed since, so read it again
                self._check(*kept, inputs)
                return

        found = await self._read(key)
        if isinstance(found, WorkflowDefinition):
            self._check(found, inputs)
        else:  # the request itself will report the reason
            name, why = request.workflow, type(found).__name__
            logger.debug("workflow %.100r: inputs not checked, no definition (%s)", name, why)

    def _check(self, workflow: WorkflowDefinition | None, inputs: Mapping[str, Any]) -> None:
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
        """Return the id of a workflow by its name, or raise a `RequestError`."""
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
    ) -> WorkflowDefinition:
        """Return a definition with its nodes, but without `raw`.

        A cached one will do, unless it must be `fresh`. It does not cache a failure: before you ask
        again, you may have corrected the name.

        Raises:
            RequestError: it did not arrive, or not within 5 s. There is only one attempt.
            TypeError, ValueError: the workflow, label or version is malformed.
        """
        key = workflow, label, version
        kept = self._kept_with_nodes.get(key)
        if kept is not None and not fresh:
            return kept

        found = await self._read(key)
        if isinstance(found, Exception):
            raise copy_error(found)
        return found

    async def _read(self, key: _Key) -> WorkflowDefinition | Exception:
        """Return a definition, or why it did not arrive. All callers share one request."""
        reading = self._reading.get(key)
        if reading is None:
            reading = self._reading[key] = self._spawn(self._request(key))
            reading.add_done_callback(lambda _: self._reading.pop(key))

        await asyncio.wait([reading])  # unlike `await`, this does not cancel the task
        if reading.cancelled():
            return SessionClosed()
        return reading.result()

    async def _request(self, key: _Key) -> WorkflowDefinition | Exception:
        limit = asyncio.timeout(_LIMITS.timeout)
        try:
            async with limit:
                found = await self._call(workflow_request(*key), read_workflow)
        except Exception as error:  # noqa: BLE001 - each caller decides
            self._kept.add(key, (None,))
            if limit.expired():
                return RequestTimeout(f"no response within {_LIMITS.timeout:g} s")
            return error

        found = attrs.evolve(found, raw=None)
        self._kept.add(key, (attrs.evolve(found, nodes={}, edges=()),))
        self._kept_with_nodes.add(key, found)
        return found
