"""One poller for one execution, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

from promptlayer_exec._api.executions import NodeMap
from promptlayer_exec._api.messages import Reply
from promptlayer_exec._engine.follow import Followers
from promptlayer_exec._engine.lifetime import Lifetime
from promptlayer_exec._engine.retry import RetryState
from promptlayer_exec._engine.schedule import Schedule
from promptlayer_exec._engine.tasks import clock
from promptlayer_exec._errors import PromptLayerExecError, SessionClosed
from promptlayer_exec._events import (
    Emit,
    Polled,
    WatchEnded,
    WatchStarted,
    WatchWoken,
    logger,
)
from promptlayer_exec._models import FINAL, FrozenMap, Node, NodeStatus, NodeTimes, Snapshot
from promptlayer_exec._policies import PollPolicy, RetryPolicy
from promptlayer_exec._push.safety_net import SafetyNet


class Fetch(Protocol):
    """A function that requests an execution's node map, with retries."""

    async def __call__(self, followers: Followers, *, due: float, first: bool) -> Reply[NodeMap]:
        """Return the answer to a request that is due at `due`, on the loop's clock.

        A `first` request does not wait behind others for the rate.
        """

    def end(self) -> None:
        """Handle that the watch has ended."""


def take_snapshot(
    execution_id: int, reply: Reply[NodeMap], *, elapsed: float, previous: Snapshot | None = None
) -> Snapshot:
    """Return the snapshot of a reply; it keeps the node times of the previous snapshot."""
    nodes = reply.value.nodes
    times: Mapping[str, NodeTimes] = {} if previous is None else previous.times
    if previous is None or nodes is not previous.nodes:
        times = _first_seen(nodes, times, elapsed)
    return Snapshot(
        execution_id,
        reply.value.complete,
        nodes,
        raw=reply.value.raw,
        poll=1 if previous is None else previous.poll + 1,
        elapsed=elapsed,
        times=times,
    )


_UNSEEN = NodeTimes()
_RUNNING = NodeStatus.RUNNING


def _first_seen(
    nodes: Mapping[str, Node], before: Mapping[str, NodeTimes], elapsed: float
) -> Mapping[str, NodeTimes]:
    times = {**dict.fromkeys(nodes, _UNSEEN), **before}
    running, final = NodeTimes(elapsed), NodeTimes(None, elapsed)  # shared
    for name, node in nodes.items():
        seen, status = times[name], node.status
        if status in FINAL:
            if seen.final is None:
                times[name] = final if seen is _UNSEEN else NodeTimes(seen.running, elapsed)
        elif status is _RUNNING and seen.running is None:
            times[name] = running if seen is _UNSEEN else NodeTimes(elapsed, seen.final)
    return FrozenMap(times)


class Watch:
    """Polls one execution while it has followers.

    Attributes:
        followers: who waits for its snapshots.
        schedule: when it polls.
    """

    def __init__(
        self,
        execution_id: int,
        fetch: Fetch,
        *,
        lifetime: Lifetime,
        poll: PollPolicy,
        retry: RetryPolicy,
        net: SafetyNet | None,
        emit: Emit,
        on_end: Callable[[Watch], None],
        workflow: str | int | None,
        base_url: str,
    ) -> None:
        self.execution_id = execution_id
        self._fetch = fetch
        self._retry = retry
        self._emit = emit
        self._on_end = on_end
        self._workflow = workflow
        self._started = clock()
        self.followers = Followers(
            execution_id,
            RetryState(retry, retry.watch_outage),
            check_loop=lifetime.check_loop,
            last_left=self._stop,
        )
        self.schedule = Schedule(poll, self.followers, net)
        self._task = lifetime.spawn(self._run(base_url), name="promptlayer_exec.Watch")
        self._task.add_done_callback(self._ended)

    def _stop(self) -> None:
        self._on_end(self)
        self._task.cancel()

    async def _run(self, base_url: str) -> None:
        """Poll until the execution is complete, the last follower is removed, or a poll fails."""
        error: Exception | None = None
        try:
            self._emit(WatchStarted(self.execution_id, self._workflow, base_url))
            is_complete = False
            while not is_complete:
                due, source = await self.schedule.next_poll()
                if source is not None:
                    self._emit(WatchWoken(self.execution_id, source))
                is_complete = await self._poll_once(due)
        except asyncio.CancelledError:
            error = SessionClosed() if self.followers.count else None
        except Exception as failure:  # noqa: BLE001 - raised to the followers
            error = failure
        self._report_end(error)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.schedule.end()
        self._fetch.end()
        if task.cancelled():  # before its first step, so that it ran nothing
            self._fail(SessionClosed())

    async def _poll_once(self, due: float) -> bool:
        """Poll, and return True if the execution is complete."""
        # A separate method, so that a poll's locals are freed while the watch sleeps.
        followers = self.followers
        if followers.retries.failures:
            followers.retries = RetryState(self._retry, self._retry.watch_outage)
        reply = await self._fetch(followers, due=due, first=self.schedule.goes_first)
        previous, elapsed = followers.latest, clock() - self._started
        snapshot = take_snapshot(self.execution_id, reply, elapsed=elapsed, previous=previous)
        self.schedule.polled(
            snapshot,
            previous,
            sent_at=reply.sent_at,
            waited=reply.lateness,
            announced=self._retry.announced(reply.retry_after),
            shared=reply.shared,
        )
        followers.latest = snapshot
        followers.notify(ended=snapshot.complete)
        self._emit(
            Polled(
                self.execution_id,
                snapshot,
                duration=reply.duration,
                lateness=reply.lateness,
                body_bytes=reply.body_bytes,
                shared=reply.shared,
            )
        )
        return snapshot.complete

    def _fail(self, error: Exception) -> None:
        if isinstance(error, PromptLayerExecError):
            error.execution_id = self.execution_id
            error.last_snapshot = self.followers.latest
        else:
            error.add_note(f"while watching execution {self.execution_id}")
        self.followers.error = error
        self._on_end(self)
        self.followers.notify(ended=True)

    def _report_end(self, error: Exception | None) -> None:
        elapsed = clock() - self._started
        latest = self.followers.latest
        succeeded, state = None, "no longer followed"
        if error is not None:
            self._fail(error)
            state = f"the watch ended in {type(error).__name__}"
        elif latest is not None and latest.complete:
            succeeded, state = latest.succeeded, "complete"
        polls = 0 if latest is None else latest.poll
        times = f"{polls} poll{'s' * (polls != 1)} in {elapsed:.1f} s"
        logger.info("execution %d: %s (%s)", self.execution_id, state, times)
        self._emit(
            WatchEnded(
                self.execution_id,
                polls=polls,
                elapsed=elapsed,
                error=error,
                succeeded=succeeded,
                workflow=self._workflow,
            )
        )
