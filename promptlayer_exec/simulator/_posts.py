"""What the server posts to its users' servers: signed webhooks, and callbacks."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import aiohttp
import attrs

from promptlayer_exec.simulator._faults import Fault, PostKind
from promptlayer_exec.simulator._log import Log
from promptlayer_exec.simulator._wire import JSON_TYPE, encode

_LOGGER = logging.getLogger(__package__)
_TIMEOUT = aiohttp.ClientTimeout(total=10.0)


@attrs.frozen
class SimPost:
    """One webhook or callback that the simulator posted.

    Attributes:
        kind: `"webhook"` or `"callback"`.
        execution_id: the execution that is complete.
        url: where it was posted to.
        headers: the headers that it was posted with.
        body: the body.
        status: the status of the answer; None if there was none.
    """

    kind: PostKind
    execution_id: int
    url: str
    headers: dict[str, str]
    body: bytes
    status: int | None


@attrs.define(eq=False)
class Posts:
    """Posts webhooks, if there is a URL for them, and callbacks; faults may change how often."""

    _take_fault: Callable[[PostKind, int], Fault | None]
    webhook_url: str | None
    webhook_secret: str
    log: Log[SimPost] = attrs.field(factory=lambda: Log("webhooks and callbacks"), init=False)

    async def post_webhook(self, execution_id: int, url: str, name: str, workflow_id: int) -> None:
        payload = {
            "event_type": "agent_run_finished",
            "details": {
                "agent_name": name,
                "agent_id": workflow_id,
                "agent_execution_id": execution_id,
            },
            "user_id": 1,
            "workspace_id": 1,
            "timestamp": datetime.now(UTC).isoformat(),
        }
        # What is signed is not the text that is sent, but the payload in a form of its own.
        signed = json.dumps(payload, sort_keys=True).encode()
        signature = hmac.new(self.webhook_secret.encode(), signed, "sha256").hexdigest()
        headers = {**JSON_TYPE, "X-PromptLayer-Signature": signature}
        await self._post("webhook", execution_id, url, headers, encode(payload))

    async def post_callback(self, execution_id: int, url: str, output: str) -> None:
        body = f'{{"workflow_version_execution_id":{execution_id},"final_output":{output}}}'
        await self._post("callback", execution_id, url, JSON_TYPE, body)

    async def _post(
        self, kind: PostKind, execution_id: int, url: str, headers: Any, body: str
    ) -> None:
        fault = self._take_fault(kind, execution_id)
        for delay in (0.0,) if fault is None else fault.delays:
            await asyncio.sleep(delay)
            status = await _send(execution_id, url, headers, body.encode())
            self.log.record(SimPost(kind, execution_id, url, headers, body.encode(), status))


async def _send(execution_id: int, url: str, headers: dict[str, str], body: bytes) -> int | None:
    try:
        async with aiohttp.request(
            "POST", url, data=body, headers=headers, timeout=_TIMEOUT
        ) as response:
            return response.status
    except Exception as error:  # noqa: BLE001 - an arbitrary URL fails in many ways
        _LOGGER.debug("execution %d: posting to its user failed: %r", execution_id, error)
        return None
