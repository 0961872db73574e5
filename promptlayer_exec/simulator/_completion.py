"""Telling of the completion of a run: a publication and a callback, for those who asked."""

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import aiohttp
from attrs import define, field

from ._backend import Backend, Results
from ._centrifugo import Centrifugo
from ._reply import JSON_TYPE
from ._scenario import encode

_LOGGER = logging.getLogger(__package__)
_CALLBACK_TIMEOUT = aiohttp.ClientTimeout(total=10.0)
# A clock that stands still just before a node's end is read so often, and not without pause.
_LEAST_SLEEP = 0.005


@define(eq=False)
class Completions:
    """Tells of the completion of each run that named a channel or a callback URL.

    It has a task for each such run until that was told. The task sleeps until the next node ends
    by itself, as if the clock ran at the pace of seconds. It looks again whenever the execution
    is told to `finish` or is seen complete by anyone, which is how it follows any other clock.

    Args:
        backend: Knows the executions.
        centrifugo: Publishes.
        push_limit: The longest message in bytes that is published with its output.
    """

    _backend: Backend
    _centrifugo: Centrifugo
    _push_limit: int
    _tasks: "set[asyncio.Task[None]]" = field(factory=set, init=False)

    def follow(self, execution_id: int, workflow_id: int, body: Mapping[str, Any]) -> None:
        """Tell of a run's completion what the body of its start asked for, if anything."""
        if body.get("channel_name_suffix") is None and body.get("callback_url") is None:
            return
        task = asyncio.create_task(
            self._tell(execution_id, workflow_id, body), name=f"simulator run {execution_id}"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Forget the runs that are not complete, and break off what is being told."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _tell(self, execution_id: int, workflow_id: int, body: Mapping[str, Any]) -> None:
        try:
            results = await self._until_complete(execution_id)
        except Exception:
            _LOGGER.exception("execution %d: a function of its scenario failed", execution_id)
            return
        suffix, url = body.get("channel_name_suffix"), body.get("callback_url")
        ways = []
        if suffix is not None:
            channel = f"workflows:{workflow_id}:run:{suffix}"
            output = results.json(all_outputs=body.get("return_all_outputs", False))
            ways.append(self._publish(execution_id, channel, output))
        if url is not None:
            ways.append(_call_back(execution_id, url, results.json(all_outputs=True)))
        await asyncio.gather(*ways)

    async def _until_complete(self, execution_id: int) -> Results:
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        with self._backend.waking(execution_id, partial(loop.call_soon_threadsafe, changed.set)):
            while True:
                changed.clear()
                results = self._backend.results(execution_id)
                if results.complete:
                    return results
                sleep = results.seconds_to_change
                if sleep is not None:
                    sleep = max(sleep, _LEAST_SLEEP)
                with suppress(TimeoutError):
                    async with asyncio.timeout(sleep):
                        await changed.wait()

    async def _publish(self, execution_id: int, channel: str, output: str) -> None:
        message = _message(execution_id, output, "OK")
        if len(message) > self._push_limit:
            prose = (
                f"The final output is larger than {self._push_limit} bytes: get it with "
                "GET /workflow-version-execution-results"
            )
            message = _message(execution_id, encode(prose), "EXCEEDS_SIZE_LIMIT")
        publication = {"message_name": "SET_WORKFLOW_COMPLETE", "data": message}
        await self._centrifugo.publish(channel, publication)


def _message(execution_id: int, output: str, code: str) -> str:
    return (
        f'{{"workflow_version_execution_id":{execution_id}'
        f',"final_output":{output},"result_code":"{code}"}}'
    )


async def _call_back(execution_id: int, url: str, node_map: str) -> None:
    body = f'{{"workflow_version_execution_id":{execution_id},"final_output":{node_map}}}'
    try:
        async with (
            aiohttp.ClientSession(timeout=_CALLBACK_TIMEOUT) as http,
            http.post(url, data=body.encode(), headers=JSON_TYPE),
        ):
            pass
    except Exception as error:  # noqa: BLE001 - a URL of any text fails in many ways
        _LOGGER.debug("execution %d: its callback failed: %r", execution_id, error)
