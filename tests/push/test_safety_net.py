"""When an execution is polled whose completion is pushed; times are in seconds."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from promptlayer_exec._policies import Deadline
from promptlayer_exec._push.safety_net import SafetyNet


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

    def completed(self, net: SafetyNet, *, expected: bool) -> None:
        """Keep which run ended."""
        self.completions.append((net.execution_id, expected))


def net_of(channel: Stub, known_at: float) -> SafetyNet:
    """Return the net of execution 7, whose start was sent at a time."""
    return SafetyNet(7, channel, known_at, waited=0.0)  # type: ignore[arg-type]


def due(net: SafetyNet, scheduled: float, *deadlines: Deadline) -> float:
    """Return when a poll is due with a floor of half a second."""
    return net.due(scheduled, floor=0.5, deadlines=deadlines)


def polled(net: SafetyNet, at: float, **how: Any) -> None:
    """Record a poll that found the execution running."""
    net.polled(at, **{"waited": 0.0, "complete": False, "woken": False, **how})


def test_polls_are_seldom_while_the_subscription_stands() -> None:
    """They come 5, 10, 20 and 40 s after one another, and then each minute."""
    net = net_of(Stub(), 100.0)
    now, gaps = 100.0, []
    for _ in range(7):
        at = due(net, now)
        gaps.append(at - now)
        polled(net, now := at)
    assert gaps == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0]


def test_until_push_has_announced_a_completion_it_is_tried() -> None:
    """Each 5 s: nobody knows yet whether the server publishes at all."""
    net = net_of(Stub(has_announced=False), 100.0)
    for at in (105.0, 110.0, 115.0):
        assert due(net, 100.0) == at
        polled(net, at)


def test_where_requests_wait_for_the_rate_there_are_fewer_polls() -> None:
    """Ten times the wait lies between two of them, and at most a minute."""
    net = net_of(Stub(), 100.0)
    polled(net, 105.0, waited=1.5)
    assert due(net, 105.0) == 120.0
    polled(net, 120.0, waited=3.0)
    assert due(net, 120.0) == 150.0
    polled(net, 150.0, waited=20.0)
    assert due(net, 150.0) == 210.0


def test_polls_are_never_more_frequent_than_the_policy_s() -> None:
    """A policy of one poll an hour is kept."""
    assert due(net_of(Stub(), 100.0), 3700.0) == 3700.0


@pytest.mark.parametrize(
    ("deadline", "at"),
    [
        (Deadline(4.0, 104.0), 103.0),
        (Deadline(1.0, 104.0), 103.5),
        (Deadline(60.0, 160.0), 105.0),
        (Deadline(None, float("inf")), 105.0),
        (Deadline(60.0, 100.5), 105.0),
    ],
)
def test_a_poll_comes_shortly_before_a_deadline(deadline: Deadline, at: float) -> None:
    """A second before, or half of a shorter timeout; not again if it was polled since."""
    assert due(net_of(Stub(), 100.0), 100.0, Deadline(90.0, 190.0), deadline) == at


def test_without_a_subscription_the_schedule_is_the_ordinary_one() -> None:
    """A gap ends what was seldom at once."""
    subscription = Stub()
    net = net_of(subscription, 100.0)
    assert due(net, 100.7) == 105.0
    subscription.since = None
    assert due(net, 100.7) == 100.7


def test_one_poll_covers_what_was_missed() -> None:
    """It comes as soon as the floor allows, or after five seconds; then polls are seldom again."""
    net = net_of(Stub(since=103.0), 102.8)
    assert due(net, 110.0) == 103.3
    assert net.due(110.0, floor=60.0, deadlines=()) == 107.8
    assert due(net, 103.1) == 103.1
    polled(net, 103.3)
    assert due(net, 103.8) == 108.3


def test_the_gaps_begin_anew_after_a_gap() -> None:
    """What push did before its connection was lost proves little."""
    subscription = Stub()
    net = net_of(subscription, 100.0)
    polled(net, 105.0)
    subscription.since = 106.0
    polled(net, 106.5)
    assert due(net, 107.0) == 111.5


def test_a_first_poll_waits_half_a_second_for_the_first_subscription() -> None:
    """The run was only just started, and the subscription makes that poll unnecessary."""
    subscription = Stub(since=None, is_starting=True)
    net = net_of(subscription, 100.0)
    assert due(net, 100.1) == 100.5
    assert net.due(100.1, floor=0.2, deadlines=()) == 100.2
    assert due(net, 300.0) == 300.0
    polled(net, 100.5)
    assert due(net, 101.0) == 101.0


def test_push_that_lied_about_a_run_is_not_trusted_for_it() -> None:
    """From then on it is polled by the ordinary schedule."""
    net = net_of(Stub(), 100.0)
    polled(net, 101.0, woken=True)
    assert due(net, 101.7) == 101.7
    polled(net, 101.7)
    assert due(net, 102.5) == 102.5


@pytest.mark.parametrize(("since", "expected"), [(99.0, True), (101.0, False), (None, False)])
def test_push_is_expected_to_announce_what_ended_while_it_stood(
    since: float | None, expected: bool
) -> None:
    """A completion from before the subscription proves nothing against it."""
    subscription = Stub(since=since)
    net = net_of(subscription, 100.0)
    for at in (102.0, 103.0):  # it is complete only once
        net.polled(at, waited=0.0, complete=True, woken=False)
    assert subscription.completions == [(7, expected)]
    assert subscription.needs == 0


def test_a_poll_that_finds_a_run_incomplete_says_that_push_is_needed() -> None:
    """The channel decides whether that begins a subscription."""
    channel = Stub(since=None)
    polled(net_of(channel, 100.0), 101.0)
    assert (channel.needs, channel.completions) == (1, [])
