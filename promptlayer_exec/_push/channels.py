"""PromptLayer's push channel, as a hint that an execution is complete.

A message wakes the watch of its execution, and is never an answer: the poll that follows is. What
push does not announce, or announces wrongly, costs a poll or a few seconds, and never a result.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from random import random
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp
import attrs

from promptlayer_exec._api.attempt import SendControlRequest
from promptlayer_exec._api.messages import Request, Response, decode, invalid_shape
from promptlayer_exec._api.status import check_status
from promptlayer_exec._arguments import check_execution_id
from promptlayer_exec._errors import RequestError
from promptlayer_exec._events import WakeSource, logger
from promptlayer_exec._expiring import ExpiringDict
from promptlayer_exec._policies import Deadline, is_transient
from promptlayer_exec._push.centrifugo import Subscription, SubscriptionLost, SubscriptionRefused
from promptlayer_exec._push.fallback import FallbackPolicy
from promptlayer_exec._text import printable

T = TypeVar("T")

# Seconds to become subscribed for the first time, and after a connection was lost.
_HANDSHAKE = 10.0
_RECONNECT = 60.0
# Seconds after which a subscription that no watch needs is dropped.
_IDLE = 60.0
# A completion that a poll found, and no message announced within so many seconds, is silence.
_SILENCE = 2.0
# So many completions in silence, one after the other, and push is given up.
_MOST_SILENT = 3
# Seconds until push is tried again, for the first time, the second, and from then on.
_PAUSES = (60.0, 300.0, 900.0)
# Seconds until a request or a connection that failed is tried again: doubling between these.
_RETRY = 0.5
_LONGEST_RETRY = 10.0
_FALLBACK = FallbackPolicy()
_COMPLETION = "SET_WORKFLOW_COMPLETE"
_LONGEST_REASON = 1000


def _now() -> float:
    return asyncio.get_running_loop().time()


def token_request(channel: str) -> Request:
    return Request("POST", f"/ws-token-request-library?capability={quote(channel, safe='')}")


def read_token(response: Response) -> str:
    if response.status != 201:
        check_status(response)
    body = decode(response)
    details = body.get("token_details") if isinstance(body, dict) else None
    token = details.get("token") if isinstance(details, dict) else None
    if not isinstance(token, str) or not token:
        invalid_shape(response, "$.token_details.token", "there is no token")
    return token


def read_completion(data: Any) -> int | None:
    """Return the execution id in a published message; None if it announces no completion."""
    if not isinstance(data, dict) or data.get("message_name") != _COMPLETION:
        return None
    try:
        completion = json.loads(data.get("data", ""))
        return check_execution_id(completion["workflow_version_execution_id"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        logger.debug("push: a completion cannot be read (%s)", type(error).__name__)
        return None


@attrs.define(eq=False, kw_only=True)
class Push:
    """The channels of an open session, and the runs that use them.

    There is a channel for each name or id with which runs are started; those of one workflow get
    the same messages.
    """

    suffix: str  # what each start carries, and the name of each channel ends in
    # Whether to subscribe at the first start of a workflow, and to warn where push is not possible.
    is_eager: bool
    free_sockets: int
    call: SendControlRequest
    connect: Callable[[], Awaitable[aiohttp.ClientWebSocketResponse]]
    find_id: Callable[[str], Awaitable[int]]  # of the workflow with a name
    _wake: Callable[[int], object]
    _early_wake_ups: ExpiringDict[int, WakeSource]
    _redact: Callable[[str], str]  # what the server says may have the API key
    spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    has_announced: bool = attrs.field(init=False, default=False)
    _has_reported: bool = attrs.field(init=False, default=False)
    _channels: dict[str | int, Channel] = attrs.field(init=False, factory=dict)
    # Of each run that was started here and has not ended.
    runs: ExpiringDict[int, PushedRun] = attrs.field(init=False, factory=ExpiringDict)

    def started(
        self, workflow: str | int, execution_id: int, *, sent_at: float, waited: float
    ) -> None:
        """Record a run, whose start was sent at a time, after it waited for so many seconds."""
        if (channel := self._channels.get(workflow)) is None:
            channel = self._channels[workflow] = Channel(self, workflow)
        run = PushedRun(execution_id, channel, sent_at, waited)
        # Its message may have come before the answer to its start.
        run.is_announced = self._early_wake_ups.get(execution_id) == "push"
        self.runs.add(execution_id, run)
        channel.started()

    def receive(self, data: Any) -> None:
        """Wake the watch that a message is for."""
        if (execution_id := read_completion(data)) is not None:
            if (run := self.runs.get(execution_id)) is not None:
                run.is_announced = True
            self._wake(execution_id)

    def report(self, workflow: str | int, reason: str) -> None:
        """Log that push is given up for a workflow; the first line of a session is the loudest."""
        level = logging.WARNING if self.is_eager else logging.INFO
        logger.log(
            level - 10 if self._has_reported else level,
            "push is not used for workflow %.100r, only polling: %s; it is tried again in a while",
            workflow,
            printable(self._redact(reason)[:_LONGEST_REASON]),
        )
        self._has_reported = True


@attrs.define(eq=False)
class Channel:
    """The subscription for the runs of one workflow: kept while needed, given up, tried again."""

    _push: Push
    workflow: str | int  # as the runs are started with
    # Since when the subscription stands, on the loop's clock.
    since: float | None = attrs.field(init=False, default=None)
    is_starting: bool = attrs.field(init=False, default=False)  # for the first time
    _is_running: bool = attrs.field(init=False, default=False)
    _starts: int = attrs.field(init=False, default=0)
    # What each watch of its runs computes again when the state of the channel has changed.
    _watches: set[Callable[[], None]] = attrs.field(init=False, factory=set)
    _silent: int = attrs.field(init=False, default=0)
    _failures: int = attrs.field(init=False, default=0)
    _not_before: float = attrs.field(init=False, default=-math.inf)
    # Ends the subscription, and why: None, because nobody needs it.
    _limit: asyncio.Timeout = attrs.field(init=False)
    _reason: str | None = attrs.field(init=False)
    _last_error: str = attrs.field(init=False)

    @property
    def has_announced(self) -> bool:
        """Whether push has announced a completion that was true, of any workflow."""
        return self._push.has_announced

    def started(self) -> None:
        """Record a start; the second one shows that push pays."""
        self._starts += 1
        self._limit_idleness()
        if self._push.is_eager or self._starts > 1:
            self.need()

    def attach(self, changed: Callable[[], None]) -> None:
        """Notify a watch, by `changed`, whenever the state of the channel has changed."""
        self._watches.add(changed)
        self._limit_idleness()

    def release(self, changed: Callable[[], None]) -> None:
        self._watches.discard(changed)
        self._limit_idleness()

    def _changed(self) -> None:
        for changed in self._watches:
            changed()

    def need(self) -> None:
        """Begin to subscribe, unless push was given up for now, or has too many WebSockets."""
        if not self._is_running and self._push.free_sockets and _now() >= self._not_before:
            self._is_running = self.is_starting = True
            self._push.free_sockets -= 1
            self._push.spawn(self._run()).add_done_callback(self._ended)

    async def _run(self) -> None:
        self._last_error, self._silent = "", 0
        try:
            async with asyncio.timeout(None) as self._limit:
                self._expect_subscription(_HANDSHAKE)
                await self._stay_subscribed()
        except Exception as error:  # noqa: BLE001 - it would end the session
            if not self._limit.expired():
                self._reason, self._last_error = _describe(error), ""
        if self._reason is not None:
            self._not_before = _now() + _PAUSES[min(self._failures, len(_PAUSES) - 1)]
            self._failures += 1
            self._push.report(self.workflow, self._reason + self._last_error)

    def _ended(self, _: object) -> None:
        self._is_running = self.is_starting = False
        self._push.free_sockets += 1
        self._changed()

    async def _stay_subscribed(self) -> None:
        workflow_id = self.workflow
        if isinstance(workflow_id, str):
            workflow_id = await self._retrying(partial(self._push.find_id, workflow_id))
        channel = f"workflows:{workflow_id}:run:{self._push.suffix}"
        get_token = partial(self._push.call, token_request(channel), read_token)
        await self._retrying(partial(self._listen, channel, partial(self._retrying, get_token)))

    async def _listen(self, channel: str, get_token: Callable[[], Awaitable[str]]) -> None:
        """Stay subscribed over one connection."""
        token = await get_token()
        subscription = Subscription(
            socket=await self._push.connect(),
            channel=channel,
            get_token=get_token,
            on_subscribed=self._begin,
            on_message=self._push.receive,
        )
        try:
            await subscription.run(token)
        finally:
            self._lose()

    async def _retrying(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return what an attempt returns; after failures that may pass, there is another one."""
        pause = _RETRY
        while True:
            began = _now()
            try:
                return await attempt()
            except (RequestError, SubscriptionLost) as error:
                if isinstance(error, RequestError) and not is_transient(error):
                    raise
                self._last_error = f"; last failure: {_describe(error)}"
            if self.is_starting:  # no first poll waits for the next attempt
                self.is_starting = False
                self._changed()
            if _now() - began > _LONGEST_RETRY:
                pause = _RETRY  # it went well for a while
            await asyncio.sleep(pause * (0.5 + random() / 2))
            pause = min(pause * 2, _LONGEST_RETRY)

    def _begin(self) -> None:
        """Record that every completion from now on will be published to us."""
        self.since = _now()
        self.is_starting = False
        self._last_error = ""
        self._limit_idleness()
        self._changed()

    def _lose(self) -> None:
        """Record that completions are missed from now on."""
        if self.since is not None:
            self.since = None
            self._expect_subscription(_RECONNECT)
            self._changed()

    def _expect_subscription(self, seconds: float) -> None:
        self._end_after(seconds, f"there was no subscription within {seconds:g} s")

    def _limit_idleness(self) -> None:
        if self.since is not None:
            self._end_after(None if self._watches else _IDLE, None)

    def _end_after(self, seconds: float | None, reason: str | None) -> None:
        if not self._limit.expired():
            self._reason = reason
            self._limit.reschedule(None if seconds is None else _now() + seconds)

    def completed(self, run: PushedRun, *, expected: bool) -> None:
        if run.is_announced or not expected:
            self._conclude(run)
        else:  # its message may still be on the way
            check = partial(self._check_silence, run, self.since)
            asyncio.get_running_loop().call_later(_SILENCE, check)

    def _check_silence(self, run: PushedRun, since: float | None) -> None:
        self._conclude(run)
        if run.is_announced or self.since != since:
            return
        self._silent += 1
        if self._silent >= _MOST_SILENT:
            self._push.has_announced = False
            self._end_after(0.0, f"it did not announce the last {_MOST_SILENT} completions")

    def _conclude(self, run: PushedRun) -> None:
        """Forget a run that is complete; if a message said so, push can be trusted."""
        self._push.runs.pop(run.execution_id)
        if run.is_announced:
            self._push.has_announced = True
            self._silent = self._failures = 0


@attrs.define(eq=False)
class PushedRun:
    """What polls and messages have said of one run that was started with push.

    It outlives its watches. Polls are seldom only while the subscription has stood since the run
    was last known to go on: since its start was sent, or a poll that found it incomplete.
    """

    execution_id: int
    channel: Channel
    _known_at: float
    _waited: float  # the last request, for a connection or the rate
    is_announced: bool = attrs.field(init=False, default=False)  # its completion, by push
    _polls: int = attrs.field(init=False, default=0)  # in a row, while the subscription stood
    _is_complete: bool = attrs.field(init=False, default=False)
    _is_doubted: bool = attrs.field(init=False, default=False)  # a wake-up was false

    def next_poll(self, scheduled: float, *, floor: float, deadlines: Iterable[Deadline]) -> float:
        """Return when to poll, where a watch without push would poll when `scheduled`."""
        if self._is_doubted or self._is_complete:
            return scheduled
        return _FALLBACK.next_poll(
            scheduled,
            floor=floor,
            known_at=self._known_at,
            subscribed_at=self.channel.since,
            is_subscribing=self.channel.is_starting,
            polls=self._polls if self.channel.has_announced else 0,
            waited=self._waited,
            deadlines=deadlines,
        )

    def polled(self, sent_at: float, *, waited: float, complete: bool, false_wake: bool) -> None:
        """Record a good poll; it is a `false_wake` if a wake-up led to it, and nothing ended."""
        since = self.channel.since
        is_covered = since is not None and since <= self._known_at
        if not complete:
            self.channel.need()
        elif not self._is_complete:
            self._is_complete = True
            self.channel.completed(self, expected=is_covered)

        self._is_doubted |= false_wake
        self._polls = self._polls + 1 if is_covered else 0
        self._known_at, self._waited = sent_at, waited


def _describe(error: BaseException) -> str:
    """Return what an error says; of a foreign one only its type, as its text may be secret."""
    if isinstance(error, RequestError | SubscriptionLost | SubscriptionRefused):
        return str(error.args[0])
    return type(error).__name__
