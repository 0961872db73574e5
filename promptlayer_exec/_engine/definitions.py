"""What is known of workflows before a run is paid for: their ids, and their required inputs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

import attrs

from promptlayer_exec._api.attempt import Call
from promptlayer_exec._api.workflows import read_workflow, workflow_request
from promptlayer_exec._events import logger
from promptlayer_exec._models import StartRequest
from promptlayer_exec._recent import Recent
from promptlayer_exec._text import printable
from promptlayer_exec._workflows import Workflow

# Seconds for which a start waits for the definition, and for which what came of it is kept.
DEFINITION_TIMEOUT = 5.0
_KEPT = 300.0
_MOST = 1_000

# A workflow's name or id, a label and a version.
_Key: TypeAlias = tuple[str | int, str | None, int | None]


@attrs.define(eq=False)
class Definitions:
    """Reads the definition of each version that is to run once, and keeps it for five minutes."""

    _call: Call
    _spawn: Callable[[Coroutine[Any, Any, Workflow | None]], asyncio.Task[Workflow | None]]
    # Each definition; None if there is none.
    _kept: Recent[_Key, tuple[Workflow | None]] = attrs.field(
        init=False, factory=lambda: Recent(_KEPT, _MOST)
    )
    _reading: dict[_Key, asyncio.Task[Workflow | None]] = attrs.field(init=False, factory=dict)
    _warned: set[tuple[int, str]] = attrs.field(init=False, factory=set)

    async def check(self, request: StartRequest, inputs: Mapping[str, Any]) -> None:
        """Raise `InvalidInputs` for missing ones, if the server names those required in time."""
        key = request.workflow, request.label, request.version
        if (kept := self._kept.get(key)) is not None:
            with suppress(ValueError):  # it may have changed since, so it is read once more
                self._check(*kept, inputs)
                return
        self._check(await self._look(key), inputs)

    def _check(self, workflow: Workflow | None, inputs: Mapping[str, Any]) -> None:
        if workflow is None:
            return
        workflow.check_inputs(inputs)
        for name, kind in (workflow.required_inputs or {}).items():
            is_number = isinstance(inputs[name], int | float) and not isinstance(inputs[name], bool)
            if kind == "string" and is_number and (workflow.id, name) not in self._warned:
                self._warned.add((workflow.id, name))
                logger.warning(
                    "the input %.100s of workflow %.100s is sent as a number, but should be a"
                    " string",
                    printable(repr(name)),
                    printable(repr(workflow.name)),
                )

    async def find_id(self, workflow: str) -> int:
        """Return the id of the workflow with a name; raises a `RequestError`."""
        for key in self._kept:
            if key[0] == workflow and (kept := self._kept.get(key)) is not None and kept[0]:
                return kept[0].id
        return (await self._read((workflow, None, None))).id

    async def _look(self, key: _Key) -> Workflow | None:
        """Return a definition, or None if it does not come; all who look at once share it."""
        if (reading := self._reading.get(key)) is None:
            reading = self._reading[key] = self._spawn(self._read_in_time(key))
            reading.add_done_callback(lambda _: self._reading.pop(key))
        await asyncio.wait([reading])
        return None if reading.cancelled() else reading.result()

    async def _read_in_time(self, key: _Key) -> Workflow | None:
        try:
            async with asyncio.timeout(DEFINITION_TIMEOUT):
                return await self._read(key)
        except Exception as error:  # noqa: BLE001 - whatever it is, the start itself will say it
            why = type(error).__name__
            logger.debug("the inputs of workflow %.100r are not checked (%s)", key[0], why)
        self._kept.add(key, (None,))
        return None

    async def _read(self, key: _Key) -> Workflow:
        workflow = await self._call(workflow_request(*key), read_workflow)
        # Without its nodes, whose prompts may be large.
        self._kept.add(key, (attrs.evolve(workflow, nodes={}, edges=(), raw=None),))
        return workflow
