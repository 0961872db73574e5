"""PromptLayer's push channel, as a hint that an execution is complete.

A message only wakes the watch of its execution, which then polls. A lost or wrong message costs a
poll or a few seconds, but never a result.
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
from weakref import WeakValueDictionary

import aiohttp
import attrs

from promptlayer_exec._api.attempt import SendControlRequest
from promptlayer_exec._api.messages import Request, Response, decode, invalid_shape
from promptlayer_exec._api.status import check_status
from promptlayer_exec._engine.expiring import ExpiringDict
from promptlayer_exec._push.centrifugo import Subscription, SubscriptionEnded, SubscriptionLost
from promptlayer_exec._push.fallback import FallbackPolicy
from promptlayer_exec._values.arguments import check_execution_id
from promptlayer_exec._values.errors import RequestError
from promptlayer_exec._values.events import WakeSource, logger
from promptlayer_exec._values.policies import Deadline, is_transient
from promptlayer_exec._values.text import printable

T = TypeVar("T")


@attrs.frozen
class ChannelPolicy:
    """The dials of one channel: how long to try it, and when to give up push. Times in seconds.

    Args:
        handshake: how long a first subscription may take.
        reconnect: how long the next one may take after a connection was lost.
        idle: how long to keep a subscription that no watch needs.
        silence: how late a message may be after a poll found the completion. Later counts as
            silence.
        most_silent: the silent completions in a row after which to give up push.
        pauses: how long to give it up: the first time, the second time, and every later time.
        retry: the pause after the first failed request or connection. It doubles each time.
        longest_retry: the longest of these pauses. An attempt that lasted longer was a success.
        most_unwatched: how many runs without a watch to remember.
    """

    handshake: float = 10.0
    reconnect: float = 60.0
    idle: float = 60.0
    silence: float = 2.0
    most_silent: int = 3
    pauses: tuple[float, ...] = (60.0, 300.0, 900.0)
    retry: float = 0.5
    longest_retry: float = 10.0
    most_unwatched: int = 10_000


_POLICY = ChannelPolicy()
_FALLBACK = FallbackPolicy()


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
        invalid_shape(response, "$.token_details.token", "expected a token")
    return token


def read_completion(data: Any) -> int | None:
    """Return the execution id in a published message, or None if it announces no completion."""
    if not isinstance(data, dict) or data.get("message_name") != "SET_WORKFLOW_COMPLETE":
        return None
    try:
        completion = json.loads(data.get("data", ""))
        return check_execution_id(completion["workflow_version_execution_id"])
    except (KeyError, TypeError, ValueError) as error:
        logger.debug("push: unreadable completion message (%s)", type(error).__name__)
        return None


@attrs.define(eq=False, kw_only=True)
class Push:
    """The channels of an open session, and the runs that use them.

    Each workflow name or id in a request has one channel. The name and the id of the same workflow
    have two, which get the same messages.
    """

    suffix: str  # part of each start request, and the last part of each channel's name
    # Whether to subscribe at the first start of a workflow, and to warn if push is unavailable.
    is_eager: bool
    free_sockets: int
    call: SendControlRequest
    connect: Callable[[], Awaitable[aiohttp.ClientWebSocketResponse]]
    find_id: Callable[[str], Awaitable[int]]  # the workflow's id, by its name
    _wake: Callable[[int], object]
    _early_wake_ups: ExpiringDict[int, WakeSource]
    _redact: Callable[[str], str]  # the server's text may contain the API key
    spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    has_announced: bool = attrs.field(init=False, default=False)
    _has_reported: bool = attrs.field(init=False, default=False)
    _channels: dict[str | int, Channel] = attrs.field(init=False, factory=dict)
    # The incomplete runs of this session, by execution id: the latest ones, and all with a watch,
    # because a silent completion of theirs counts against push.
    runs: WeakValueDictionary[int, PushedRun] = attrs.field(init=False, factory=WeakValueDictionary)
    _latest: ExpiringDict[int, PushedRun] = attrs.field(
        init=False, factory=lambda: ExpiringDict(most=_POLICY.most_unwatched)
    )

    def started(
        self, workflow: str | int, execution_id: int, *, sent_at: float, waited: float
    ) -> None:
        """Record a new run.

        Args:
            workflow: the name or id in its request.
            execution_id: the run's id.
            sent_at: when the session sent the request, on the event loop's clock.
            waited: the seconds that the request waited for a connection or the rate.
        """
        channel = self._channels.get(workflow)
        if channel is None:
            channel = self._channels[workflow] = Channel(self, workflow)

        run = PushedRun(execution_id, channel, sent_at, waited)
        # Its message may have arrived before the response to its start.
        run.is_announced = self._early_wake_ups.get(execution_id) == "push"
        self.runs[execution_id] = run
        self._latest.add(execution_id, run)
        channel.started()

    def forget(self, run: PushedRun) -> None:
        self.runs.pop(run.execution_id, None)
        self._latest.pop(run.execution_id)

    def receive(self, data: Any) -> None:
        """Wake the watch of the run in a message."""
        execution_id = read_completion(data)
        if execution_id is None:
            return
        if (run := self.runs.get(execution_id)) is not None:
            run.is_announced = True
        self._wake(execution_id)

    def report(self, workflow: str | int, reason: str, *, pause: float) -> None:
        """Log that push is unavailable for a workflow. The session's first line is the loudest."""
        level = logging.WARNING if self.is_eager else logging.INFO
        if self._has_reported:
            level -= 10

        logger.log(
            level,
            "push unavailable for workflow %.100r (%s): polling instead, next try in %g s",
            workflow,
            printable(self._redact(reason)[:1000]),
            pause,
        )
        self._has_reported = True


@attrs.define(eq=False)
class Channel:
    """The subscription for the runs of one workflow.

    It stays while a watch needs it. If push does not work, the channel gives up for a while.
    """

    _push: Push
    workflow: str | int  # the name or id in the requests
    # When the subscription became active, on the loop's clock. None if it is not.
    since: float | None = attrs.field(init=False, default=None)
    # Whether it is about to subscribe for the first time.
    is_starting: bool = attrs.field(init=False, default=False)
    _is_running: bool = attrs.field(init=False, default=False)
    _starts: int = attrs.field(init=False, default=0)
    # One function for each watch of its runs, called when the state of the channel changes.
    _watches: set[Callable[[], None]] = attrs.field(init=False, factory=set)
    _silent: int = attrs.field(init=False, default=0)
    _failures: int = attrs.field(init=False, default=0)
    _not_before: float = attrs.field(init=False, default=-math.inf)
    # When to drop the subscription, and why. None if no watch needs it any more.
    _limit: asyncio.Timeout = attrs.field(init=False)
    _reason: str | None = attrs.field(init=False)
    _last_error: str = attrs.field(init=False)

    @property
    def has_announced(self) -> bool:
        """Whether push has announced a real completion of any workflow."""
        return self._push.has_announced

    def started(self) -> None:
        """Record a run. From the second one on, push pays off."""
        self._starts += 1
        self._limit_idleness()
        if self._push.is_eager or self._starts > 1:
            self.need()

    def attach(self, changed: Callable[[], None]) -> None:
        """Call a watch's `changed` whenever the state of the channel changes."""
        self._watches.add(changed)
        self._limit_idleness()

    def release(self, changed: Callable[[], None]) -> None:
        self._watches.discard(changed)
        self._limit_idleness()

    def _changed(self) -> None:
        for changed in self._watches:
            changed()

    def need(self) -> None:
        """Begin to subscribe, unless push rests for now or has too many WebSockets."""
        if self._is_running or not self._push.free_sockets or _now() < self._not_before:
            return
        self._is_running = self.is_starting = True
        self._push.free_sockets -= 1
        self._push.spawn(self._run()).add_done_callback(self._ended)

    async def _run(self) -> None:
        self._last_error, self._silent = "", 0
        try:
            async with asyncio.timeout(None) as self._limit:
                self._expect_subscription(_POLICY.handshake)
                await self._stay_subscribed()
        except Exception as error:  # noqa: BLE001 - the session must continue
            if not self._limit.expired():
                self._reason, self._last_error = _describe(error), ""

        if self._reason is not None:
            pause = _POLICY.pauses[min(self._failures, len(_POLICY.pauses) - 1)]
            self._not_before = _now() + pause
            self._failures += 1
            self._push.report(self.workflow, self._reason + self._last_error, pause=pause)

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
        """Return the result of an attempt, repeating it after each transient failure."""
        pause = _POLICY.retry
        while True:
            began = _now()
            try:
                return await attempt()
            except (RequestError, SubscriptionLost) as error:
                if isinstance(error, RequestError) and not is_transient(error):
                    raise
                self._last_error = f", last failure: {_describe(error)}"

            # The first poll of a run waits for the first attempt, but not for more.
            if self.is_starting:
                self.is_starting = False
                self._changed()

            if _now() - began > _POLICY.longest_retry:
                pause = _POLICY.retry  # it succeeded for a while
            await asyncio.sleep(pause * (0.5 + random() / 2))
            pause = min(pause * 2, _POLICY.longest_retry)

    def _begin(self) -> None:
        """Record that from now on, PromptLayer publishes every completion to us."""
        self.since = _now()
        self.is_starting = False
        self._last_error = ""
        self._limit_idleness()
        self._changed()

    def _lose(self) -> None:
        """Record that from now on, we may miss messages."""
        if self.since is not None:
            self.since = None
            self._expect_subscription(_POLICY.reconnect)
            self._changed()

    def _expect_subscription(self, seconds: float) -> None:
        self._end_after(seconds, f"no subscription within {seconds:g} s")

    def _limit_idleness(self) -> None:
        if self.since is None:
            return
        if self._watches:
            self._end_after(None, None)
        else:
            self._end_after(_POLICY.idle, None)

    def _end_after(self, seconds: float | None, reason: str | None) -> None:
        if not self._limit.expired():
            self._reason = reason
            self._limit.reschedule(None if seconds is None else _now() + seconds)

    def completed(self, run: PushedRun, *, expected: bool) -> None:
        """Record that a poll found a run complete, `expected` if push should have announced it."""
        if run.is_announced or not expected:
            self._conclude(run)
        else:  # its message may still be on the way
            check = partial(self._check_silence, run, self.since)
            asyncio.get_running_loop().call_later(_POLICY.silence, check)

    def _check_silence(self, run: PushedRun, since: float | None) -> None:
        self._conclude(run)
        if run.is_announced or self.since != since:
            return

        self._silent += 1
        if self._silent >= _POLICY.most_silent:
            self._push.has_announced = False
            self._end_after(0.0, f"no message for the last {_POLICY.most_silent} completions")

    def _conclude(self, run: PushedRun) -> None:
        """Forget a complete run. If a message announced it, push works."""
        self._push.forget(run)
        if run.is_announced:
            self._push.has_announced = True
            self._silent = self._failures = 0


@attrs.define(eq=False)
class PushedRun:
    """The state of one run of a session with push, from polls and messages.

    It outlives the run's watches. Polls are rare only if the subscription was already active when
    the session last knew the run to be running: when it sent the start request, or a poll that
    found the run incomplete.
    """

    execution_id: int
    channel: Channel
    _known_at: float  # when the last request that showed it running was sent
    _waited: float  # how long that request waited for a connection or the rate
    is_announced: bool = attrs.field(init=False, default=False)  # its completion, by push
    _polls: int = attrs.field(init=False, default=0)  # in a row, under an active subscription
    _is_complete: bool = attrs.field(init=False, default=False)
    _is_doubted: bool = attrs.field(init=False, default=False)  # a wake-up was false

    def next_poll(self, scheduled: float, *, floor: float, deadlines: Iterable[Deadline]) -> float:
        """Return when to poll. `scheduled` is the time without push."""
        if self._is_doubted or self._is_complete:
            return scheduled

        # The gaps grow only once push has announced something.
        polls = self._polls if self.channel.has_announced else 0
        return _FALLBACK.next_poll(
            scheduled,
            floor=floor,
            known_at=self._known_at,
            subscribed_at=self.channel.since,
            is_subscribing=self.channel.is_starting,
            polls=polls,
            waited=self._waited,
            deadlines=deadlines,
        )

    def polled(self, sent_at: float, *, waited: float, complete: bool, false_wake: bool) -> None:
        """Record a good poll, `false_wake` if a wake-up caused it, but the run is still running."""
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
    """Return an error's message, but only the type of a foreign one, whose text may be secret."""
    if isinstance(error, RequestError | SubscriptionEnded):
        return str(error.args[0])
    return type(error).__name__
