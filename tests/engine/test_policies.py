"""The arithmetic of polling, retrying and deadlines, with time and chance as arguments."""

import math
import pickle

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from promptlayer_exec._values.errors import ConfigurationError
from promptlayer_exec._values.policies import (
    TRANSIENT_STATUSES,
    Deadline,
    PollPolicy,
    RetryPolicy,
    check_timeout,
)

seconds = st.floats(0.0, 1e6)
chances = st.floats(0.0, 1.0, exclude_max=True)


@st.composite
def poll_policies(draw):
    """Draw any valid PollPolicy."""
    floor = draw(st.floats(1e-3, 1e3))
    return PollPolicy(floor, floor + draw(st.floats(0.0, 1e3)), draw(st.floats(0.0, 2.0)))


retry_policies = st.builds(
    RetryPolicy,
    base=st.floats(0.0, 100.0),
    ceiling=st.floats(0.0, 100.0),
    retry_after_ceiling=st.floats(0.0, 200.0),
)


@st.composite
def views(draw):
    """Draw arguments of `PollPolicy.delay` that a watch can pass."""
    elapsed = draw(st.floats(0.0, 1e5))
    nodes = draw(st.integers(0, 10_000))
    return {
        "elapsed": elapsed,
        "nodes": nodes,
        "final": draw(st.integers(0, nodes)),
        "unchanged": draw(st.floats(0.0, elapsed)),
    }


@given(poll_policies(), views(), chances)
def test_poll_delay_is_in_bounds(policy, view, chance):
    """A delay is between floor and ceiling; jitter only lengthens it, within its limits."""
    plain = policy.delay(**view, chance=0.0)
    jittered = policy.delay(**view, chance=chance)
    assert policy.floor <= plain <= policy.ceiling
    assert plain <= jittered
    assert jittered <= plain + policy.jitter * min(plain, 1.0)


@given(poll_policies(), views(), chances, seconds)
def test_poll_retry_after_is_a_floor(policy, view, chance, retry_after):
    """A delay is at least Retry-After, and a shorter Retry-After does not change it."""
    plain = policy.delay(**view, chance=chance)
    assert policy.delay(**view, chance=chance, retry_after=retry_after) == max(plain, retry_after)


@given(st.floats(1e-3, 1e3), views(), chances)
def test_poll_fixed(every, view, chance):
    """A fixed policy always polls after the same delay."""
    policy = PollPolicy.fixed(every)
    assert policy.delay(**view, chance=chance) == every
    assert (policy.floor, policy.ceiling, policy.jitter) == (every, every, 0.0)


@pytest.mark.parametrize(
    ("elapsed", "final", "nodes", "unchanged", "expected"),
    [
        (0.0, 0, 0, 0.0, 0.8),
        (0.0, 0, 4, 0.0, 0.8),
        (15.0, 0, 4, 15.0, 1.6),  # no node is final
        (15.0, 0, 4, 2.0, 1.6),  # a node has started
        (15.0, 3, 4, 15.0, 1.6),  # the final nodes were final when the watch started
        (3.0, 1, 3, 0.0, 1.0),  # 6 s to go
        (6.0, 4, 8, 0.0, 1.0),  # 6 s to go
        (80.0, 2, 10, 0.0, 2.4),  # 320 s to go
        (9.0, 9, 10, 0.0, 0.5),  # the last node
        (24.0, 9, 10, 15.0, 0.8),  # the last node, for 15 s
        (27.0, 3, 4, 3.0, 0.4 * 9**0.25),  # the last node, and the others took 8 s each
        (10.0, 2, 2, 10.0, 0.8 * 11**0.25),  # all nodes are final, but it is not complete
        (27.0, 3, 3, 3.0, 0.4 * 9**0.25),  # the same, after a change
        (1e6, 0, 10, 0.0, 5.0),
    ],
)
def test_poll_delay_by_hand(elapsed, final, nodes, unchanged, expected):
    """A sixth of the expected time, a slowly growing delay, or half of such a delay."""
    delay = PollPolicy().delay(
        elapsed=elapsed, final=final, nodes=nodes, unchanged=unchanged, chance=0.0
    )
    assert delay == pytest.approx(expected)


@pytest.mark.parametrize(
    ("every", "jitter", "chance", "expected"),
    [(0.5, 0.1, 0.5, 0.525), (4.0, 0.1, 0.5, 4.05), (4.0, 0.1, 0.0, 4.0), (0.5, 0.0, 0.9, 0.5)],
    ids=["a-fraction", "at-most-seconds", "no-chance", "no-jitter"],
)
def test_poll_jitter_by_hand(every, jitter, chance, expected):
    """Jitter is a fraction of the delay, and at most that many seconds."""
    policy = PollPolicy(every, every, jitter)
    delay = policy.delay(elapsed=1.0, final=0, nodes=1, unchanged=0.0, chance=chance)
    assert delay == pytest.approx(expected)


NOT_SECONDS = {
    "true": True,
    "false": False,
    "text": "1",
    "bytes": b"1",
    "none": None,
    "nan": math.nan,
    "inf": math.inf,
    "minus-inf": -math.inf,
    "negative": -0.001,
    "negative-int": -1,
    "complex": 1j,
    "list": [1],
}


@pytest.mark.parametrize("field", ["floor", "ceiling", "jitter"])
@pytest.mark.parametrize("value", NOT_SECONDS.values(), ids=NOT_SECONDS)
def test_poll_policy_refuses(field, value):
    """Each field of a PollPolicy is checked when the policy is created."""
    with pytest.raises(ConfigurationError, match=rf"PollPolicy\.{field} must be"):
        PollPolicy(**{field: value})


def test_poll_policy_refuses_a_tight_loop():
    """A floor of 0 is refused, also by `fixed`: it would poll without a pause."""
    with pytest.raises(ConfigurationError, match=r"PollPolicy\.floor .* greater than 0, got 0\.0"):
        PollPolicy(floor=0.0)
    with pytest.raises(ConfigurationError, match=r"PollPolicy\.floor"):
        PollPolicy.fixed(0)


def test_poll_policy_refuses_crossed_bounds():
    """A ceiling below the floor is refused, and the message shows both."""
    with pytest.raises(ConfigurationError, match=r"must not be below floor \(2\.0\), got 1\.0"):
        PollPolicy(floor=2.0, ceiling=1.0)


@pytest.mark.parametrize(
    "field", ["outage", "watch_outage", "base", "ceiling", "retry_after_ceiling", "not_found_grace"]
)
@pytest.mark.parametrize("value", NOT_SECONDS.values(), ids=NOT_SECONDS)
def test_retry_policy_refuses(field, value):
    """Each duration of a RetryPolicy is checked; only `watch_outage` may be None."""
    if field == "watch_outage" and value is None:
        assert RetryPolicy(watch_outage=None).watch_outage is None
        return
    with pytest.raises(ConfigurationError, match=rf"RetryPolicy\.{field} must be"):
        RetryPolicy(**{field: value})


@pytest.mark.parametrize(
    "statuses",
    [{200}, {299}, {600}, {0}, {-503}, {"503"}, {None}, {True}, {503, 202}, "503"],
    ids=repr,
)
def test_retry_policy_refuses_statuses(statuses):
    """Statuses to retry are HTTP statuses from 300 to 599."""
    with pytest.raises(ConfigurationError, match=r"RetryPolicy\.statuses"):
        RetryPolicy(statuses=statuses)


def test_retry_policy_statuses():
    """Any collection of statuses becomes a frozenset, which may be empty."""
    assert RetryPolicy(statuses=[300, 503, 599, 503]).statuses == frozenset({300, 503, 599})
    assert RetryPolicy(statuses=()).statuses == frozenset()


def test_defaults():
    """The defaults are the documented ones."""
    assert attrs.astuple(PollPolicy()) == (0.5, 5.0, 0.1)
    assert attrs.asdict(RetryPolicy()) == {
        "outage": 60.0,
        "watch_outage": 600.0,
        "base": 0.5,
        "ceiling": 10.0,
        "retry_after_ceiling": 120.0,
        "not_found_grace": 10.0,
        "statuses": {408, 425, 429, 500, 502, 503, 504, *range(520, 531)},
    }
    assert isinstance(TRANSIENT_STATUSES, frozenset)


@pytest.mark.parametrize("policy", [PollPolicy(1.0, 2.0), RetryPolicy(), Deadline(1.0, 2.0)])
def test_policies_are_values(policy):
    """Policies are frozen, hashable values with slots that pickle."""
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert hash(policy) == hash(pickle.loads(pickle.dumps(policy)))
    assert not hasattr(policy, "__dict__")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(policy, attrs.fields(type(policy))[0].name, 3.0)


@given(retry_policies, st.integers(1, 10**6), chances)
@example(RetryPolicy(), 10**6, 0.5)
@example(RetryPolicy(base=1e308, ceiling=1e308), 10**6, 0.5)
def test_retry_delay_is_in_bounds(policy, failures, chance):
    """A delay never exceeds the ceiling, after any number of failures; jitter only lengthens it."""
    plain = policy.delay(failures, 0.0)
    jittered = policy.delay(failures, chance)
    assert 0.0 <= plain <= jittered <= policy.ceiling
    assert jittered <= 2 * plain
    assert plain >= min(policy.base, policy.ceiling / 2)


def test_retry_delay_by_hand():
    """Delays double from the base to half the ceiling; jitter makes them up to twice as long."""
    policy = RetryPolicy(base=0.5, ceiling=10.0)
    assert [policy.delay(n, 0.0) for n in range(1, 8)] == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0]
    assert [policy.delay(n, 0.5) for n in (1, 4, 9)] == [0.75, 6.0, 7.5]


@pytest.mark.parametrize(
    ("retry_after", "granted"),
    [(None, 0.0), (0.0, 0.0), (1.5, 1.5), (120.0, 120.0), (121.0, 120.0), (math.inf, 120.0)],
)
def test_announced_is_limited(retry_after, granted):
    """A server gets at most `retry_after_ceiling`."""
    assert RetryPolicy().announced(retry_after) == granted


def test_a_single_status_is_refused():
    """The message says that it must be a set."""
    with pytest.raises(ConfigurationError, match="must be a set of HTTP statuses, got 503"):
        RetryPolicy(statuses=503)


def test_an_infinite_timeout_is_no_limit():
    """Not every event loop has a timer for it."""
    assert check_timeout(math.inf) is None
