"""When a run is polled whose completion is pushed; times are in seconds."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from promptlayer_exec._push.channels import PushedRun
from promptlayer_exec._push.fallback import FallbackPolicy
from promptlayer_exec._values.policies import Deadline

LATER = Deadline(90.0, 190.0)
# The run was known to go on at 100, the floor is 0.5, and the subscription has stood since 0.
CASES: dict[str, tuple[float, dict[str, Any], float]] = {
    # Why: when it would be polled without push, what differs, when it is polled.
    "no poll yet": (100.0, {}, 105.0),
    "the gaps double": (100.0, {"polls": 1}, 110.0),
    "and double": (100.0, {"polls": 3}, 140.0),
    "up to a minute": (100.0, {"polls": 4}, 160.0),
    "for any count": (100.0, {"polls": 10_000}, 160.0),
    "ten times the wait for the rate": (100.0, {"waited": 1.5}, 115.0),
    "whichever is longer": (100.0, {"waited": 1.5, "polls": 2}, 120.0),
    "and at most a minute": (100.0, {"waited": 20.0}, 160.0),
    "a policy of one poll an hour is kept": (3700.0, {}, 3700.0),
    "a second before a deadline": (100.0, {"deadlines": [LATER, Deadline(4.0, 104.0)]}, 103.0),
    "or half of a short timeout": (100.0, {"deadlines": [LATER, Deadline(1.0, 104.0)]}, 103.5),
    "a late deadline changes nothing": (100.0, {"deadlines": [Deadline(60.0, 160.0)]}, 105.0),
    "nor none": (100.0, {"deadlines": [Deadline(None, float("inf"))]}, 105.0),
    "nor one whose last call was polled": (100.0, {"deadlines": [Deadline(60.0, 100.5)]}, 105.0),
    "no subscription: the policy alone": (100.7, {"subscribed_at": None}, 100.7),
    "a gap is made up for": (110.0, {"subscribed_at": 100.2}, 100.5),
    "within five seconds": (110.0, {"subscribed_at": 100.2, "floor": 60.0}, 105.0),
    "unless the policy polls sooner": (100.3, {"subscribed_at": 100.2}, 100.3),
    "a first poll waits for it": (
        100.1,
        {"subscribed_at": None, "is_subscribing": True, "floor": 9.0},
        100.5,
    ),
    "as long as the floor": (
        100.1,
        {"subscribed_at": None, "is_subscribing": True, "floor": 0.2},
        100.2,
    ),
    "later polls do not": (101.0, {"subscribed_at": None, "is_subscribing": True}, 101.0),
}


@pytest.mark.parametrize(("scheduled", "given", "at"), CASES.values(), ids=CASES)
def test_next_poll(scheduled: float, given: dict[str, Any], at: float) -> None:
    """Seldom, as long as the subscription has stood since the run was last known to go on."""
    facts = {"floor": 0.5, "known_at": 100.0, "subscribed_at": 0.0, **given}
    assert FallbackPolicy().next_poll(scheduled, **facts) == at


@attrs.define
class Stub:
    """A channel whose state the test sets; it keeps what was recorded."""

    since: float | None = 0.0
    is_starting: bool = False
    has_announced: bool = True
    needs: int = 0
    completions: list[tuple[int, bool]] = attrs.field(factory=list)

    def need(self) -> None:
        """Keep that a poll found a run incomplete."""
        self.needs += 1

    def completed(self, run: PushedRun, *, expected: bool) -> None:
        """Keep which run ended."""
        self.completions.append((run.execution_id, expected))


def run_of(channel: Stub) -> PushedRun:
    """Return execution 7, whose start was sent at 100."""
    return PushedRun(7, channel, 100.0, waited=0.0)  # type: ignore[arg-type]


def due(run: PushedRun, scheduled: float) -> float:
    """Return when a poll is due with a floor of half a second."""
    return run.next_poll(scheduled, floor=0.5, deadlines=())


def polled(run: PushedRun, at: float, **how: Any) -> None:
    """Record a poll that found the execution running."""
    run.polled(at, **{"waited": 0.0, "complete": False, "false_wake": False, **how})


def test_polls_count_while_the_subscription_stands() -> None:
    """They come 5, 10, 20 and 40 s after one another, and then each minute; after a gap, again."""
    channel = Stub()
    run = run_of(channel)
    now, gaps = 100.0, []
    for _ in range(7):
        at = due(run, now)
        gaps.append(at - now)
        polled(run, now := at)
    assert gaps == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0]
    channel.since = now + 1.0
    polled(run, now + 1.5)
    assert due(run, now + 2.0) == now + 6.5


def test_until_push_has_announced_a_completion_it_is_tried() -> None:
    """Each 5 s: nobody knows yet whether the server publishes at all."""
    run = run_of(Stub(has_announced=False))
    for at in (105.0, 110.0, 115.0):
        assert due(run, 100.0) == at
        polled(run, at)


def test_push_that_lied_about_a_run_is_not_trusted_for_it() -> None:
    """From then on it is polled by the ordinary schedule."""
    run = run_of(Stub())
    polled(run, 101.0, false_wake=True)
    assert due(run, 101.7) == 101.7
    polled(run, 101.7)
    assert due(run, 102.5) == 102.5


@pytest.mark.parametrize(("since", "expected"), [(99.0, True), (101.0, False), (None, False)])
def test_push_is_expected_to_announce_what_ended_while_it_stood(
    since: float | None, expected: bool
) -> None:
    """A completion from before the subscription proves nothing against it."""
    channel = Stub(since=since)
    run = run_of(channel)
    for at in (102.0, 103.0):  # it is complete only once
        polled(run, at, complete=True)
    assert channel.completions == [(7, expected)]
    assert channel.needs == 0


def test_a_poll_that_finds_a_run_incomplete_says_that_push_is_needed() -> None:
    """The channel decides whether that begins a subscription."""
    channel = Stub(since=None)
    polled(run_of(channel), 101.0)
    assert (channel.needs, channel.completions) == (1, [])
