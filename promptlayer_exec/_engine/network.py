"""The interface between a client and the network, because the engine imports neither part of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from promptlayer_exec._api.attempt import Send, SendControlRequest
from promptlayer_exec._api.redaction import Redactor
from promptlayer_exec._engine.expiring import ExpiringDict
from promptlayer_exec._values.events import WakeSource

if TYPE_CHECKING:
    from promptlayer_exec._push.channels import Push


class OpenPush(Protocol):
    """A function that returns the push channels of an open session, without any I/O."""

    def __call__(
        self,
        *,
        call: SendControlRequest,
        find_id: Callable[[str], Awaitable[int]],
        wake: Callable[[int], object],
        early_wake_ups: ExpiringDict[int, WakeSource],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> Push:
        """Return the channels. `Push` describes the arguments."""


@attrs.frozen(kw_only=True)
class Network:
    """What a client uses of `_http` and `_push`.

    Attributes:
        base_url: the URL of the server, without a trailing slash.
        namespace: a name for the server and the key, which does not reveal the key.
        redactor: removes the key from texts.
        send: makes one attempt to send a request.
        open_push: opens the push channels, None if the session does not use them.
        resources: what to close after the client.
    """

    base_url: str
    namespace: str
    redactor: Redactor
    send: Send
    open_push: OpenPush | None
    resources: AsyncExitStack
