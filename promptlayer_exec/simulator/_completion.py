"""Notifications that a run is complete: a publication, a callback and a webhook."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import anyio
import attrs

from promptlayer_exec.simulator._backend import Backend
from promptlayer_exec.simulator._centrifugo import Centrifugo
from promptlayer_exec.simulator._definitions import Workflow
from promptlayer_exec.simulator._execution import Results
from promptlayer_exec.simulator._posts import Posts
from promptlayer_exec.simulator._wire import encode

_LOGGER = logging.getLogger(__package__)
# A clock that stands still just before a node's end must not make the task spin.
_MIN_SLEEP = 0.005


@attrs.define(eq=False)
class Completions:
    """Notifies of the completion of each run.

    A run has a task until the notifications are sent. The task sleeps until the next node ends by
    itself, assuming that the clock counts seconds. It also wakes whenever a node is finished by
    `finish` or the execution is read complete, so that it can follow any other clock.
    """

    _backend: Backend
    _centrifugo: Centrifugo
    _posts: Posts
    _push_limit_bytes: int
    _tasks: set[asyncio.Task[None]] = attrs.field(factory=set, init=False)

    def follow(self, execution_id: int, workflow: Workflow, body: Mapping[str, Any]) -> None:
        """Notify of a run's completion."""
        task = asyncio.create_task(
            self._notify(execution_id, workflow, body, self._posts.webhook_url),
            name=f"simulator run {execution_id}",
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Cancel all pending notifications."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _notify(
        self,
        execution_id: int,
        workflow: Workflow,
        body: Mapping[str, Any],
        webhook_url: str | None,
    ) -> None:
        try:
            results = await self._wait_until_complete(execution_id)
        except Exception:
            _LOGGER.exception("execution %d: a function of its scenario failed", execution_id)
            return
        suffix, callback_url = body.get("channel_name_suffix"), body.get("callback_url")
        output = results.json(all_outputs=body.get("return_all_outputs", False))
        channel = f"workflow_updates:{execution_id}"
        if suffix is not None:
            channel = f"workflows:{workflow.id}:run:{suffix}"
        notifications = [self._publish(execution_id, channel, output)]
        if callback_url is not None:
            notifications.append(self._posts.post_callback(execution_id, callback_url, output))
        if webhook_url is not None:
            notifications.append(
                self._posts.post_webhook(execution_id, webhook_url, workflow.name, workflow.id)
            )
        await asyncio.gather(*notifications)

    async def _wait_until_complete(self, execution_id: int) -> Results:
        changed = asyncio.Event()
        wake = partial(asyncio.get_running_loop().call_soon_threadsafe, changed.set)
        with self._backend.waking(execution_id, wake):
            while not (results := self._backend.results(execution_id)).complete:
                sleep = results.seconds_to_change
                with anyio.move_on_after(None if sleep is None else max(sleep, _MIN_SLEEP)):
                    await changed.wait()
                changed.clear()
            return results

    async def _publish(self, execution_id: int, channel: str, output: str) -> None:
        message = _message(execution_id, output, "OK")
        if len(message) > self._push_limit_bytes:
            explanation = (
                f"The final output is larger than {self._push_limit_bytes} bytes: get it with "
                "GET /workflow-version-execution-results"
            )
            message = _message(execution_id, encode(explanation), "EXCEEDS_SIZE_LIMIT")
        publication = {"message_name": "SET_WORKFLOW_COMPLETE", "data": message}
        await self._centrifugo.publish(channel, publication)


def _message(execution_id: int, output: str, code: str) -> str:
    return (
        f'{{"workflow_version_execution_id":{execution_id}'
        f',"final_output":{output},"result_code":"{code}"}}'
    )
