"""PromptLayer's push channel, as a hint that an execution is complete (extra `push`).

A message wakes the watch of its execution, and is never an answer: the poll that follows is. What
push does not announce, or announces wrongly, costs a poll or a few seconds, and never a result.

Internal: `Session(push=True)` is the interface.

https://centrifugal.dev/docs/transports/client_api
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Literal, Protocol, TypeVar
from urllib.parse import quote

import anyio
import attrs
from centrifuge import (
    CentrifugeError,
    ClientEventHandler,
    DisconnectedContext,
    ErrorContext,
    PublicationContext,
    SubscribedContext,
    SubscribingContext,
    SubscriptionEventHandler,
    UnauthorizedError,
    UnsubscribedContext,
)
from websockets.exceptions import InvalidProxyStatus, InvalidStatus

from promptlayer_exec._api.executions import (
    TOKEN_PATH,
    Request,
    Response,
    check_execution_id,
    check_status,
    decode,
    invalid_shape,
)
from promptlayer_exec._api.workflows import read_workflow, workflow_request
from promptlayer_exec._engine.tasks import TimeLimit, clock
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
# So many subscriptions, one after the other, that last for less than so many seconds each, and push
# is given up: each costs a handshake, and a poll of each run.
_MOST_SHORT = 5
_SHORT = 10.0
# Seconds until push is tried again, for the first time, the second, and from then on.
_PAUSES = (60.0, 300.0, 900.0)
# Seconds between two attempts to find out a workflow's id.
_RETRY = 1.0
_MOST_RUNS = 10_000
# Each is a WebSocket; the runs of further workflows are polled as without push.
_MOST_CHANNELS = 100
_COMPLETION = "SET_WORKFLOW_COMPLETE"
_LONGEST_REASON = 1000


class Call(Protocol):
    """A function that sends a request once, within the session's rate."""

    async def __call__(self, request: Request, read: Callable[[Response], T]) -> T:
        """Return what `read` reads from the answer, or raise a `RequestError`."""


def token_request(channel: str) -> Request:
    """Return the request for a token that allows to subscribe to one channel."""
    return Request("POST", f"{TOKEN_PATH}?capability={quote(channel, safe='')}")


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
    """The channels of an open session, one for each workflow, and the runs that use them."""

    _base_url: str
    suffix: str
    proxy: Literal[True] | None
    max_bytes: int  # of a message
    redact: Callable[[str], str]  # what the server says may have the API key
    call: Call
    wake: Callable[[int], object]
    _spawn: Callable[[Callable[[], Coroutine[Any, Any, None]]], None]
    early_completions: EarlyWakeUps = attrs.field(init=False, factory=EarlyWakeUps)
    has_announced: bool = attrs.field(init=False, default=False)
    _has_warned: bool = attrs.field(init=False, default=False)
    _channels: dict[str | int, _Channel] = attrs.field(init=False, factory=dict)
    _nets: dict[int, SafetyNet] = attrs.field(init=False, factory=dict)  # oldest first

    @property
    def address(self) -> str:
        """The URL of the WebSocket."""
        return self._base_url.replace("http", "ws", 1) + "/connection/websocket"

    def subscribe(self, workflow: str | int) -> None:
        """Begin to subscribe to the channel of a workflow, if it is the first time."""
        if workflow not in self._channels and len(self._channels) < _MOST_CHANNELS:
            channel = self._channels[workflow] = _Channel(self, workflow)
            self._spawn(channel.run)

    def started(
        self, workflow: str | int, execution_id: int, *, sent_at: float, waited: float
    ) -> None:
        """Record a run; its start was sent at a time, after waiting some seconds for its slot."""
        if (channel := self._channels.get(workflow)) is None:
            return
        channel.record_run()
        self._nets[execution_id] = SafetyNet(execution_id, channel, sent_at, waited)
        if len(self._nets) > _MOST_RUNS:
            # Gaps are not reported to it any more.
            self._nets.pop(next(iter(self._nets))).distrust()

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

    def merge(self, channel: _Channel) -> bool:
        """Let another channel of the same workflow take over the runs; False: there is none."""
        for other in self._channels.values():
            if other is not channel and other.workflow_id == channel.workflow_id:
                for net in self._nets.values():
                    if net.subscription is channel:
                        net.subscription = other
                        other.record_run()
                        net.changed()
                self._channels[channel.workflow] = other
                return True
        return False

    def drop(self, channel: _Channel) -> None:
        """Forget a channel; the next start of its workflow subscribes anew."""
        self._channels = {key: it for key, it in self._channels.items() if it is not channel}

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
        workflow_id: the workflow's id, once it is known.
        since: since when the subscription stands, on the loop's clock; None: it does not.
        is_starting: whether the first subscription has neither succeeded nor failed yet.
    """

    _push: Push
    workflow: str | int
    workflow_id: int | None = attrs.field(init=False, default=None)
    since: float | None = attrs.field(init=False, default=None)
    is_starting: bool = attrs.field(init=False, default=True)
    _has_runs: bool = attrs.field(init=False, default=False)
    _unlogged: str | None = attrs.field(init=False, default=None)  # why push was given up
    _silent: int = attrs.field(init=False, default=0)
    _short: int = attrs.field(init=False, default=0)
    _failures: int = attrs.field(init=False, default=0)
    _end: asyncio.Future[str] = attrs.field(init=False)
    last_error: str = attrs.field(init=False, default="")
    # Push is given up if there is no subscription until then.
    _time_limit: TimeLimit = attrs.field(init=False)
    # Of each request for a token: a refresh and a new connection may both need one.
    _token_scopes: set[anyio.CancelScope] = attrs.field(init=False, factory=set)
    _next_token_at: float = attrs.field(init=False, default=-math.inf)
    _sent_at: float = attrs.field(init=False, default=math.inf)

    def __attrs_post_init__(self) -> None:
        self._time_limit = TimeLimit(self._time_out)

    @property
    def has_announced(self) -> bool:
        return self._push.has_announced

    async def run(self) -> None:
        """Stay subscribed; whenever push is given up, try again after a pause.

        Without any run by then, there may be no such workflow.
        """
        while (reason := await self._stay_subscribed()) is not None:
            self._unlogged = reason
            self._log()
            pause = _PAUSES[min(self._failures, len(_PAUSES) - 1)]
            self._failures += 1
            await anyio.sleep(pause)
            if not self._has_runs:
                self._push.drop(self)
                return

    def record_run(self) -> None:
        """Record that a run has started."""
        self._has_runs = True
        self._log()

    def _log(self) -> None:
        if self._has_runs and self._unlogged is not None:
            self._push.warn(self.workflow, self._unlogged)
            self._unlogged = None

    async def _stay_subscribed(self) -> str | None:
        """Return why push was given up in the end; None: another channel is used instead."""
        try:
            if self.workflow_id is None:
                self.workflow_id = await self._find_workflow()
                if self._push.merge(self):
                    return None
            return await self._connect(self.workflow_id)
        except Exception as error:  # noqa: BLE001 - it would end the session
            return _reason(error)
        finally:
            self.is_starting = False
            self.lose_subscription()
            self._time_limit.set(None)

    async def _find_workflow(self) -> int:
        if isinstance(self.workflow, int):
            return self.workflow
        request = workflow_request(self.workflow, None, None)
        request = attrs.evolve(request, before_sent=self._record_request)
        spent = 0.0
        while True:
            self._sent_at = math.inf
            try:
                return (await self._push.call(request, read_workflow)).id
            except Exception as error:
                spent += max(clock() - self._sent_at, 0.0)
                if not _is_transient(error) or spent >= _HANDSHAKE:
                    raise
            await anyio.sleep(_RETRY)
            spent += _RETRY

    def _record_request(self) -> None:
        self._sent_at = clock()

    async def _connect(self, workflow_id: int) -> str:
        """Subscribe with a client of the library, and return why push was given up."""
        self._end = asyncio.get_running_loop().create_future()
        self._silent = self._short = 0
        name = f"workflows:{workflow_id}:run:{self._push.suffix}"
        client = PushClient(
            self._push.address,
            events=_ConnectionEvents(self),
            get_token=partial(self._get_token, name),
            timeout=_HANDSHAKE,
            name="promptlayer_exec",
            proxy=self._push.proxy,
            max_bytes=self._push.max_bytes,
        )
        await client.new_subscription(name, _SubscriptionEvents(self)).subscribe()
        connecting = asyncio.ensure_future(client.connect())
        self._time_limit.set(_HANDSHAKE)
        try:
            return await self._end
        finally:
            self._time_limit.set(None)
            for scope in self._token_scopes:
                scope.cancel()
            with anyio.CancelScope(shield=True):
                await client.disconnect()
                await client.finished()
                await asyncio.wait([connecting])

    async def _get_token(self, channel: str) -> str:
        """Return a token; called by the library, at first and whenever the last one expires."""
        scope = anyio.CancelScope()
        self._token_scopes.add(scope)
        try:
            with scope:
                await anyio.sleep(max(self._next_token_at - clock(), 0.0))
                with self._time_limit.paused() as go_on:  # the session's rate may be slow
                    request = attrs.evolve(token_request(channel), before_sent=go_on)
                    token = await self._push.call(request, read_token)
                self._next_token_at = clock() + _TOKEN_INTERVAL
                return token
        except Exception as error:
            if _is_transient(error):
                raise  # the library tries again
            self.give_up(_reason(error))
        finally:
            self._token_scopes.remove(scope)
        raise UnauthorizedError

    def _time_out(self, seconds: float) -> None:
        failure = f"; last failure: {self.last_error}" if self.last_error else ""
        self.give_up(f"there was no subscription within {seconds:g} s{failure}")

    def give_up(self, reason: str) -> None:
        if not self._end.done():
            self._end.set_result(reason)

    def begin_subscription(self) -> None:
        """Record that every completion from now on will be published to us."""
        self.since = clock()
        self.is_starting = False
        self.last_error = ""
        self._time_limit.set(None)
        self._push.changed(self)

    def lose_subscription(self) -> None:
        """Record that completions are missed from now on."""
        if self.since is not None:
            self._short = self._short + 1 if clock() - self.since < _SHORT else 0
            self.since = None
            self._time_limit.set(_RECONNECT)
            if self._short >= _MOST_SHORT:
                self.give_up(f"the last {_MOST_SHORT} subscriptions ended within {_SHORT:g} s each")
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
            loop = asyncio.get_running_loop()
            loop.call_later(_SILENCE, self._check_silence, execution_id, self.since)

    def _confirm(self, execution_id: int) -> bool:
        """Return True if a message announced a completion; it was true then."""
        if self._push.early_completions.take(execution_id) is None:
            return False
        self._push.has_announced = True
        self._silent = self._failures = 0
        return True

    def _check_silence(self, execution_id: int, since: float | None) -> None:
        if self._confirm(execution_id) or self.since != since:
            return
        self._miss(f"it did not announce the last {_MOST_SILENT} completions")

    def _miss(self, reason: str) -> None:
        """Count a completion that was not announced readably; give up after several in a row."""
        self._silent += 1
        if self._silent >= _MOST_SILENT:
            self._push.has_announced = False
            self.give_up(reason)


class _ConnectionEvents(ClientEventHandler):
    def __init__(self, channel: _Channel) -> None:
        self._channel = channel

    async def on_error(self, ctx: ErrorContext) -> None:
        self._channel.last_error = _reason(ctx.error)
        status = ctx.error.response.status_code if isinstance(ctx.error, InvalidStatus) else 0
        if 400 <= status < 500 and status not in TRANSIENT_STATUSES:
            self._channel.give_up(_reason(ctx.error))

    async def on_disconnected(self, ctx: DisconnectedContext) -> None:
        reason = f"the server ended the connection: {ctx.reason} ({ctx.code})"
        self._channel.give_up(reason)


class _SubscriptionEvents(SubscriptionEventHandler):
    def __init__(self, channel: _Channel) -> None:
        self._channel = channel

    async def on_subscribing(self, _: SubscribingContext) -> None:
        self._channel.lose_subscription()

    async def on_subscribed(self, _: SubscribedContext) -> None:
        self._channel.begin_subscription()

    async def on_unsubscribed(self, ctx: UnsubscribedContext) -> None:
        self._channel.give_up(f"the server refused the subscription: {ctx.reason} ({ctx.code})")

    async def on_publication(self, ctx: PublicationContext) -> None:
        self._channel.receive(ctx.pub.data)


def _is_transient(error: Exception) -> bool:
    if isinstance(error, StatusError):
        return error.status in TRANSIENT_STATUSES
    if isinstance(error, InvalidResponse):  # cut short, or a gateway's page
        return error.path is None and not isinstance(error, ResponseTooLarge)
    return isinstance(error, ConnectionFailed | RequestTimeout)


def _reason(error: BaseException) -> str:
    """Return what an error says; of a foreign one only what cannot hold a password."""
    if isinstance(error, RequestError):
        return str(error.args[0])
    if isinstance(error, OSError | InvalidStatus | InvalidProxyStatus | CentrifugeError):
        return f"{error}" or type(error).__name__
    return type(error).__name__
