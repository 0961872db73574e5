"""PromptLayer's push channel, as a hint that an execution is complete (extra `push`).

A message wakes the watch of its execution, and is never an answer: the poll that follows is. What
push does not announce, or announces wrongly, costs a poll or a few seconds, and never a result.

https://centrifugal.dev/docs/transports/client_api
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

import anyio
import attrs
import centrifuge
from websockets.exceptions import InvalidProxyStatus, InvalidStatus

from promptlayer_exec._api.messages import Request, Response, check_status, decode, invalid_shape
from promptlayer_exec._api.workflows import read_workflow, workflow_request
from promptlayer_exec._arguments import check_execution_id
from promptlayer_exec._errors import (
    ConnectionFailed,
    InvalidResponse,
    RequestError,
    RequestTimeout,
    ResponseTooLarge,
    StatusError,
    printable,
)
from promptlayer_exec._events import logger
from promptlayer_exec._policies import TRANSIENT_STATUSES
from promptlayer_exec._push.centrifugo import PushClient
from promptlayer_exec._push.safety_net import SafetyNet
from promptlayer_exec._push.wakeups import EarlyWakeUps

T = TypeVar("T")

# Seconds to become subscribed for the first time, and after a connection was lost.
_HANDSHAKE = 10.0
_RECONNECT = 60.0
# Seconds between a token and the request for the next, at least: a server may say that one lives
# for 0 s.
_TOKEN_INTERVAL = 1.0
# A completion that a poll found, and no message announced within so many seconds, is silence.
_SILENCE = 2.0
# So many completions in silence, one after the other, and push is given up.
_MOST_SILENT = 3
# Seconds until push is tried again, for the first time, the second, and from then on.
_PAUSES = (60.0, 300.0, 900.0)
# Seconds between two requests for a workflow's id.
_RETRY = 1.0
_MOST_RUNS = 10_000
# Each is a WebSocket; the runs of further workflows are polled as without push.
_MOST_CHANNELS = 100
# Requests of all channels at once: if they are not answered, polls need the other connections.
_REQUESTS = 4
_COMPLETION = "SET_WORKFLOW_COMPLETE"
_LONGEST_REASON = 1000


class Call(Protocol):
    """A function that sends a request once, within the session's rate."""

    async def __call__(self, request: Request, read: Callable[[Response], T]) -> T:
        """Return what `read` reads from the answer, or raise a `RequestError`."""


def token_request(channel: str) -> Request:
    """Return the request for a token that allows to subscribe to one channel."""
    return Request("POST", f"/ws-token-request-library?capability={quote(channel, safe='')}")


def read_token(response: Response) -> str:
    """Read the token in a response."""
    if response.status != 201:
        check_status(response)
    body = decode(response)
    details = body.get("token_details") if isinstance(body, dict) else None
    token = details.get("token") if isinstance(details, dict) else None
    if not isinstance(token, str) or not token:
        invalid_shape(response, "$.token_details.token", "there is no token")
    return token


def read_completion(data: Any) -> int | None:
    """Return the execution id in a published message; None if it announces no completion.

    Raises:
        ValueError: it announces a completion whose id cannot be read.
    """
    if not isinstance(data, dict) or data.get("message_name") != _COMPLETION:
        return None
    try:
        completion = json.loads(data.get("data", ""))
        return check_execution_id(completion["workflow_version_execution_id"])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


@attrs.define(eq=False, kw_only=True)
class Push:
    """The channels of an open session, and the runs that use them.

    There is one for each name or id with which runs are started; those of one workflow get the
    same messages.
    """

    base_url: str
    suffix: str
    proxy: str | None = attrs.field(repr=False)  # its URL; it may have a password
    max_bytes: int  # of a message
    redact: Callable[[str], str]  # what the server says may have the API key
    _call: Call
    wake: Callable[[int], object]
    _spawn: Callable[[Callable[[], Coroutine[Any, Any, None]]], object]
    _slots: anyio.Semaphore = attrs.field(init=False, factory=lambda: anyio.Semaphore(_REQUESTS))
    early_completions: EarlyWakeUps = attrs.field(init=False, factory=EarlyWakeUps)
    has_announced: bool = attrs.field(init=False, default=False)
    _has_warned: bool = attrs.field(init=False, default=False)
    _channels: dict[str | int, _Channel] = attrs.field(init=False, factory=dict)
    _nets: dict[int, SafetyNet] = attrs.field(init=False, factory=dict)  # oldest first

    def subscribe(self, workflow: str | int) -> None:
        """Begin to subscribe to the channel of a workflow, if it is the first time."""
        if workflow not in self._channels and len(self._channels) < _MOST_CHANNELS:
            channel = self._channels[workflow] = _Channel(self, workflow)
            self._spawn(channel.run)

    def started(
        self,
        workflow: str | int,
        execution_id: int,
        *,
        sent_at: float,
    ) -> None:
        """Record a run, whose start was sent at a time."""
        if (channel := self._channels.get(workflow)) is None:
            return
        channel.record_run()
        self._nets[execution_id] = SafetyNet(execution_id, channel, sent_at)
        if len(self._nets) > _MOST_RUNS:
            # Gaps are not reported to it any more.
            self._nets.pop(next(iter(self._nets))).distrust()

    async def request(self, request: Request, read: Callable[[Response], T]) -> T:
        """Send a request of a channel once, and return what `read` returns."""
        async with self._slots:
            return await self._call(request, read)

    def net(self, execution_id: int) -> SafetyNet | None:
        """Return the safety net of a run; None for what was not started here, or has ended."""
        return self._nets.get(execution_id)

    def forget(self, execution_id: int) -> None:
        """Forget a run that has ended."""
        self._nets.pop(execution_id, None)

    def changed(self, channel: _Channel) -> None:
        """Have the watches of a channel find out when to poll."""
        for net in self._nets.values():
            if net.subscription is channel:
                net.changed()

    def drop(self, workflow: str | int) -> None:
        """Forget the channel of a workflow; the next start subscribes anew."""
        del self._channels[workflow]

    def warn(self, workflow: str | int, reason: str) -> None:
        """Log that push is given up for a workflow; a session warns of it once."""
        level = logging.INFO if self._has_warned else logging.WARNING
        self._has_warned = True
        logger.log(
            level,
            "push is not used for workflow %.100r, only polling: %s; it is tried again in a while",
            workflow,
            printable(self.redact(reason)[:_LONGEST_REASON]),
        )


@attrs.define(eq=False)
class _Channel:
    """The subscription for the runs of one workflow: kept, given up, and tried again.

    Attributes:
        workflow: the name or id that the runs are started with.
        since: since when the subscription stands, on the loop's clock; None: it does not.
        is_starting: whether the first subscription has neither succeeded nor failed yet.
    """

    _push: Push
    workflow: str | int
    since: float | None = attrs.field(init=False, default=None)
    is_starting: bool = attrs.field(init=False, default=True)
    _has_runs: bool = attrs.field(init=False, default=False)
    _unlogged: str | None = attrs.field(init=False, default=None)  # why push was given up
    _silent: int = attrs.field(init=False, default=0)
    _failures: int = attrs.field(init=False, default=0)
    # Cancelled to give push up; its deadline is that of the next subscription.
    _attempt: anyio.CancelScope = attrs.field(init=False)
    _limit: float = attrs.field(init=False)  # the seconds until that deadline
    _reason: str = attrs.field(init=False)
    last_error: str = attrs.field(init=False, default="")
    # Of each request for a token: a refresh and a new connection may both need one.
    _token_scopes: set[anyio.CancelScope] = attrs.field(init=False, factory=set)
    _next_token_at: float = attrs.field(init=False, default=0.0)

    @property
    def has_announced(self) -> bool:
        return self._push.has_announced

    async def run(self) -> None:
        """Stay subscribed; whenever push is given up, try again after a pause.

        Without any run by then, there may be no such workflow.
        """
        while True:
            self._unlogged = await self._stay_subscribed()
            self._log()
            await asyncio.sleep(_PAUSES[min(self._failures, len(_PAUSES) - 1)])
            self._failures += 1
            if not self._has_runs:
                self._push.drop(self.workflow)
                return

    def record_run(self) -> None:
        """Record that a run has started."""
        self._has_runs = True
        self._log()

    def _log(self) -> None:
        if self._has_runs and self._unlogged is not None:
            self._push.warn(self.workflow, self._unlogged)
            self._unlogged = None

    async def _stay_subscribed(self) -> str:
        """Return why push was given up in the end."""
        self._reason = ""
        try:
            with anyio.CancelScope() as self._attempt:
                self._expect_subscription(_HANDSHAKE)
                await self._connect(await self._find_workflow())
        except Exception as error:  # noqa: BLE001 - it would end the session
            self._reason = _describe(error)
        finally:
            self.is_starting = False
            self.lose_subscription()
        failure = f"; last failure: {self.last_error}" if self.last_error else ""
        return self._reason or f"there was no subscription within {self._limit:g} s{failure}"

    def _expect_subscription(self, seconds: float) -> None:
        self._limit = seconds
        self._attempt.deadline = anyio.current_time() + seconds

    async def _find_workflow(self) -> int:
        if isinstance(self.workflow, int):
            return self.workflow
        while True:
            try:
                request = workflow_request(self.workflow, None, None)
                return (await self._push.request(request, read_workflow)).id
            except Exception as error:
                if not _is_transient(error):
                    raise
                self.last_error = _describe(error)
            await asyncio.sleep(_RETRY)

    async def _connect(self, workflow_id: int) -> None:
        """Stay subscribed with a client of the library until push is given up."""
        self._silent = 0
        name = f"workflows:{workflow_id}:run:{self._push.suffix}"
        client = PushClient(
            self._push.base_url.replace("http", "ws", 1) + "/connection/websocket",
            events=_ConnectionEvents(self),
            get_token=partial(self._get_token, name),
            timeout=_HANDSHAKE,
            name="promptlayer_exec",
            proxy=self._push.proxy,
            max_bytes=self._push.max_bytes,
        )
        try:
            await client.new_subscription(name, _SubscriptionEvents(self)).subscribe()
            await client.connect()
            await anyio.sleep_forever()
        finally:
            for scope in self._token_scopes:
                scope.cancel()
            with anyio.CancelScope(shield=True):
                await client.disconnect()
                await client.finished()

    async def _get_token(self, channel: str) -> str:
        """Return a token; called by the library, at first and whenever the last one expires."""
        loop = asyncio.get_running_loop()
        scope = anyio.CancelScope()
        self._token_scopes.add(scope)
        try:
            with scope:
                await asyncio.sleep(self._next_token_at - loop.time())
                token = await self._push.request(token_request(channel), read_token)
                self._next_token_at = loop.time() + _TOKEN_INTERVAL
                return token
        except Exception as error:
            if _is_transient(error):
                raise  # the library tries again
            self.give_up(_describe(error))
        finally:
            self._token_scopes.remove(scope)
        raise centrifuge.UnauthorizedError

    def give_up(self, reason: str) -> None:
        if not self._attempt.cancel_called:  # otherwise the library tells of what we did
            self._reason = reason
            self._attempt.cancel()

    def begin_subscription(self) -> None:
        """Record that every completion from now on will be published to us."""
        self.since = asyncio.get_running_loop().time()
        self.is_starting = False
        self.last_error = ""
        self._attempt.deadline = math.inf
        self._push.changed(self)

    def lose_subscription(self) -> None:
        """Record that completions are missed from now on."""
        if self.since is not None:
            self.since = None
            self._expect_subscription(_RECONNECT)
        self._push.changed(self)

    def receive(self, data: Any) -> None:
        """Wake the watch that a message is for."""
        try:
            execution_id = read_completion(data)
        except ValueError as error:
            reason = printable(self._push.redact(str(error)))
            logger.debug("push: a completion cannot be read (%s)", reason)
            self.begin_subscription()  # polls for what was missed until now
            self._miss(f"the last {_MOST_SILENT} completions that it announced cannot be read")
            return
        if execution_id is not None:
            self._push.early_completions.add(execution_id, "push")
            self._push.wake(execution_id)

    def completed(self, execution_id: int, *, expected: bool) -> None:
        self._push.forget(execution_id)
        if not self._confirm(execution_id) and expected:
            check = partial(self._check_silence, execution_id, self.since)
            asyncio.get_running_loop().call_later(_SILENCE, check)

    def _confirm(self, execution_id: int) -> bool:
        """Return True if a message announced a completion; it was true then."""
        if self._push.early_completions.take(execution_id) is None:
            return False
        self._push.has_announced = True
        self._silent = self._failures = 0
        return True

    def _check_silence(self, execution_id: int, since: float | None) -> None:
        if not self._confirm(execution_id) and self.since == since:
            self._miss(f"it did not announce the last {_MOST_SILENT} completions")

    def _miss(self, reason: str) -> None:
        """Count a completion that was not announced readably; give up after several in a row."""
        self._silent += 1
        if self._silent >= _MOST_SILENT:
            self._push.has_announced = False
            self.give_up(reason)


class _ConnectionEvents(centrifuge.ClientEventHandler):
    def __init__(self, channel: _Channel) -> None:
        self._channel = channel

    async def on_error(self, ctx: centrifuge.ErrorContext) -> None:
        self._channel.last_error = _describe(ctx.error)
        status = ctx.error.response.status_code if isinstance(ctx.error, InvalidStatus) else 0
        if 400 <= status < 500 and status not in TRANSIENT_STATUSES:
            self._channel.give_up(_describe(ctx.error))

    async def on_disconnected(self, ctx: centrifuge.DisconnectedContext) -> None:
        self._channel.give_up(f"the server ended the connection: {ctx.reason} ({ctx.code})")


class _SubscriptionEvents(centrifuge.SubscriptionEventHandler):
    def __init__(self, channel: _Channel) -> None:
        self._channel = channel

    async def on_subscribing(self, _: centrifuge.SubscribingContext) -> None:
        self._channel.lose_subscription()

    async def on_subscribed(self, _: centrifuge.SubscribedContext) -> None:
        self._channel.begin_subscription()

    async def on_unsubscribed(self, ctx: centrifuge.UnsubscribedContext) -> None:
        self._channel.give_up(f"the server refused the subscription: {ctx.reason} ({ctx.code})")

    async def on_publication(self, ctx: centrifuge.PublicationContext) -> None:
        self._channel.receive(ctx.pub.data)


def _is_transient(error: Exception) -> bool:
    if isinstance(error, StatusError):
        return error.status in TRANSIENT_STATUSES
    if isinstance(error, InvalidResponse):  # cut short, or a gateway's page
        return error.path is None and not isinstance(error, ResponseTooLarge)
    return isinstance(error, ConnectionFailed | RequestTimeout)


def _describe(error: BaseException) -> str:
    """Return what an error says; of a foreign one only what cannot hold a password."""
    if isinstance(error, RequestError):
        return str(error.args[0])
    if isinstance(error, OSError | InvalidStatus | InvalidProxyStatus | centrifuge.CentrifugeError):
        return f"{error}" or type(error).__name__
    return type(error).__name__
