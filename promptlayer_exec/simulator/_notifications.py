"""The messages that announce a complete run: push, a webhook and a callback."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

import aiohttp
import anyio
import attrs

from promptlayer_exec.simulator._backend import Backend
from promptlayer_exec.simulator._faults import FaultQueue, PostKind
from promptlayer_exec.simulator._log import Log
from promptlayer_exec.simulator._push_server import PushServer
from promptlayer_exec.simulator._run import Results
from promptlayer_exec.simulator._wire import JSON_TYPE, encode
from promptlayer_exec.simulator._workflow_bodies import SimulatedWorkflow

_LOGGER = logging.getLogger(__package__)
_MESSAGE = '{{"workflow_version_execution_id":{},"final_output":{},"result_code":"{}"}}'


@attrs.frozen
class SimPost:
    """One webhook or callback that the simulator posted.

    Attributes:
        kind: `"webhook"` or `"callback"`.
        execution_id: the execution that is complete.
        url: its URL.
        headers: its headers.
        body: the body.
        status: the status of the response, or None if there was none.
    """

    kind: PostKind
    execution_id: int
    url: str
    headers: dict[str, str]
    body: bytes
    status: int | None


@attrs.define(eq=False)
class Notifications:
    """Announces the completion of each run. Faults may change how often and when.

    A run has a task until it has sent the notifications. The task sleeps until the next node
    finishes by itself, assuming that the clock counts seconds. It also wakes whenever `finish`
    finishes a node, or a request finds the execution complete, so that it can follow any other
    clock.
    """

    _backend: Backend
    _push_server: PushServer
    _faults: FaultQueue
    _push_limit_bytes: int
    webhook_url: str | None
    _webhook_secret: str
    posts: Log[SimPost] = attrs.field(factory=lambda: Log("webhooks and callbacks"), init=False)
    _tasks: set[asyncio.Task[None]] = attrs.field(factory=set, init=False)

    def follow(
        self, execution_id: int, workflow: SimulatedWorkflow, body: Mapping[str, Any]
    ) -> None:
        work = self._notify(execution_id, workflow, body)
        task = asyncio.create_task(work, name=f"simulator run {execution_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _notify(
        self, execution_id: int, workflow: SimulatedWorkflow, body: Mapping[str, Any]
    ) -> None:
        webhook_url = self.webhook_url  # the current one: setting it affects later runs
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
            text = f'{{"workflow_version_execution_id":{execution_id},"final_output":{output}}}'
            notifications.append(
                self._post("callback", execution_id, callback_url, JSON_TYPE, text)
            )
        if webhook_url is not None:
            headers, text = self._webhook(execution_id, workflow)
            notifications.append(self._post("webhook", execution_id, webhook_url, headers, text))

        await asyncio.gather(*notifications)

    async def _wait_until_complete(self, execution_id: int) -> Results:
        changed = asyncio.Event()
        wake = partial(asyncio.get_running_loop().call_soon_threadsafe, changed.set)
        self._backend.wakers[execution_id] = wake
        try:
            while not (results := self._backend.results(execution_id)).complete:
                with anyio.move_on_after(results.seconds_to_change):
                    await changed.wait()
                changed.clear()
            return results
        finally:
            del self._backend.wakers[execution_id]

    async def _publish(self, execution_id: int, channel: str, output: str) -> None:
        message = _MESSAGE.format(execution_id, output, "OK")
        if len(message) > self._push_limit_bytes:
            explanation = (
                f"The final output is larger than {self._push_limit_bytes} bytes: get it with "
                "GET /workflow-version-execution-results"
            )
            message = _MESSAGE.format(execution_id, encode(explanation), "EXCEEDS_SIZE_LIMIT")
        publication = {"message_name": "SET_WORKFLOW_COMPLETE", "data": message}
        await self._push_server.publish(channel, publication)

    def _webhook(
        self, execution_id: int, workflow: SimulatedWorkflow
    ) -> tuple[dict[str, str], str]:
        payload = {
            "event_type": "agent_run_finished",
            "details": {
                "agent_name": workflow.name,
                "agent_id": workflow.id,
                "agent_execution_id": execution_id,
            },
            "user_id": 1,
            "workspace_id": 1,
            "timestamp": datetime.now(UTC).isoformat(),
        }

        # PromptLayer signs the payload in another form than the text that it sends.
        signed = json.dumps(payload, sort_keys=True).encode()
        signature = hmac.new(self._webhook_secret.encode(), signed, "sha256").hexdigest()
        return {**JSON_TYPE, "X-PromptLayer-Signature": signature}, encode(payload)

    async def _post(
        self, kind: PostKind, execution_id: int, url: str, headers: dict[str, str], text: str
    ) -> None:
        body = text.encode()
        timeout = aiohttp.ClientTimeout(total=10.0)
        fault = self._faults.take(lambda fault: fault.concerns_post(kind, execution_id))

        for delay in (0.0,) if fault is None else fault.delays:
            await asyncio.sleep(delay)
            status = None
            try:
                async with aiohttp.request(
                    "POST", url, data=body, headers=headers, timeout=timeout
                ) as response:
                    status = response.status
            except Exception as error:  # noqa: BLE001 - an arbitrary URL fails in many ways
                _LOGGER.debug("execution %d: posting to its user failed: %r", execution_id, error)

            self.posts.record(SimPost(kind, execution_id, url, headers, body, status))
