"""Polling, retrying and deadlines: arithmetic, with time and chance as arguments."""

import math
import pickle

import attrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from promptlayer_exec._errors import ConfigurationError
from promptlayer_exec._policies import (
    TRANSIENT_STATUSES,
    Deadline,
    PollPolicy,
    RetryPolicy,
    check_seconds,
    check_timeout,
)

arithmetic = settings(max_examples=60, deadline=None, derandomize=True)

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
    """Draw what a watch can have seen, as arguments of `PollPolicy.delay`."""
    elapsed = draw(st.floats(0.0, 1e5))
    nodes = draw(st.integers(0, 10_000))
    return {
        "elapsed": elapsed,
        "nodes": nodes,
        "final": draw(st.integers(0, nodes)),
        "unchanged": draw(st.floats(0.0, elapsed)),
    }


@given(poll_policies(), views(), chances)
@arithmetic
def test_poll_delay_is_in_bounds(policy, view, chance):
    """A poll comes between floor and ceiling, and jitter can only lengthen that, within limits."""
    plain = policy.delay(**view, chance=0.0)
    jittered = policy.delay(**view, chance=chance)
    assert policy.floor <= plain <= policy.ceiling
    assert plain <= jittered
    assert jittered <= plain + policy.jitter * min(plain, 1.0)


@given(poll_policies(), views(), chances, seconds)
@arithmetic
def test_poll_retry_after_is_a_floor(policy, view, chance, retry_after):
    """Retry-After lengthens a poll's delay to itself, and changes nothing beyond that."""
    plain = policy.delay(**view, chance=chance)
    assert policy.delay(**view, chance=chance, retry_after=retry_after) == max(plain, retry_after)


@given(st.floats(1e-3, 1e3), views(), chances)
@arithmetic
def test_poll_fixed(every, view, chance):
    """A fixed policy polls at the same distance whatever it sees."""
    policy = PollPolicy.fixed(every)
    assert policy.delay(**view, chance=chance) == every
    assert (policy.floor, policy.ceiling, policy.jitter) == (every, every, 0.0)


@pytest.mark.parametrize(
    ("elapsed", "final", "nodes", "unchanged", "expected"),
    [
        (0.0, 0, 0, 0.0, 0.8),
        (0.0, 0, 4, 0.0, 0.8),
        (15.0, 0, 4, 15.0, 1.6),  # nothing has ended
        (15.0, 0, 4, 2.0, 1.6),  # something began
        (15.0, 3, 4, 15.0, 1.6),  # what has ended had ended when the watch began
        (3.0, 1, 3, 0.0, 1.0),  # 6 s left
        (6.0, 4, 8, 0.0, 1.0),  # 6 s left
        (80.0, 2, 10, 0.0, 2.4),  # 320 s left
        (9.0, 9, 10, 0.0, 0.5),  # one is left
        (24.0, 9, 10, 15.0, 0.8),  # one is left, and has been for 15 s
        (27.0, 3, 4, 3.0, 0.4 * 9**0.25),  # one is left, and the others took 8 s each
        (10.0, 2, 2, 10.0, 0.8 * 11**0.25),  # all final and yet not complete
        (1e6, 0, 10, 0.0, 5.0),
    ],
)
def test_poll_delay_by_hand(elapsed, final, nodes, unchanged, expected):
    """A sixth of the time that seems left, a slowly growing delay, or half of that."""
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
    """Jitter is a fraction of the delay, and never more than that many seconds."""
    policy = PollPolicy(every, every, jitter)
    delay = policy.delay(elapsed=1.0, final=0, nodes=1, unchanged=0.0, chance=chance)
    assert delay == pytest.approx(expected)


NO_SECONDS = {
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
    "beyond-float": 10**400,
}


@pytest.mark.parametrize("value", NO_SECONDS.values(), ids=NO_SECONDS)
def test_check_seconds_refuses(value):
    """What is no finite number of seconds is a ConfigurationError that names the setting."""
    with pytest.raises(ConfigurationError, match=r"^the setting must be a finite number"):
        check_seconds("the setting", value)


@pytest.mark.parametrize("value", [0, 0.0, 1, 2.5, 1e300, 2**70])
def test_check_seconds_accepts(value):
    """A finite number that is not negative comes back as a float."""
    checked = check_seconds("the setting", value)
    assert checked == value
    assert type(checked) is float


@pytest.mark.parametrize("value", [0, 0.0, -0.0])
def test_check_seconds_without_zero(value):
    """Zero is refused where it makes no sense."""
    with pytest.raises(ConfigurationError, match="more than 0"):
        check_seconds("the setting", value, zero=False)


def test_check_seconds_says_what_it_got():
    """The message shows the value, and whether zero would do."""
    with pytest.raises(ConfigurationError, match="at least 0, not 'soon'"):
        check_seconds("the setting", "soon")


@pytest.mark.parametrize("field", ["floor", "ceiling", "jitter"])
@pytest.mark.parametrize("value", NO_SECONDS.values(), ids=NO_SECONDS)
def test_poll_policy_refuses(field, value):
    """Each field of a PollPolicy is checked when it is made."""
    with pytest.raises(ConfigurationError, match=rf"PollPolicy\.{field} must be"):
        PollPolicy(**{field: value})


def test_poll_policy_refuses_a_tight_loop():
    """A floor of 0 is refused, also through `fixed`: it would poll without a pause."""
    with pytest.raises(ConfigurationError, match=r"PollPolicy\.floor"):
        PollPolicy(floor=0.0)
    with pytest.raises(ConfigurationError, match=r"PollPolicy\.floor"):
        PollPolicy.fixed(0)


def test_poll_policy_refuses_crossed_bounds():
    """A ceiling below the floor is refused, and the message shows both."""
    with pytest.raises(ConfigurationError, match=r"\(1\.0\) must not be below floor \(2\.0\)"):
        PollPolicy(floor=2.0, ceiling=1.0)


@pytest.mark.parametrize(
    "field", ["outage", "watch_outage", "base", "ceiling", "retry_after_ceiling", "not_found_grace"]
)
@pytest.mark.parametrize("value", NO_SECONDS.values(), ids=NO_SECONDS)
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
    """Statuses to retry are HTTP statuses that are no success."""
    with pytest.raises(ConfigurationError, match=r"RetryPolicy\.statuses"):
        RetryPolicy(statuses=statuses)


def test_retry_policy_statuses():
    """Any collection of statuses becomes a frozenset; none at all is allowed."""
    assert RetryPolicy(statuses=[300, 503, 599, 503]).statuses == frozenset({300, 503, 599})
    assert RetryPolicy(statuses=()).statuses == frozenset()


def test_defaults():
    """The defaults are those of the contract."""
    assert attrs.astuple(PollPolicy()) == (0.5, 5.0, 0.1)
    assert attrs.asdict(RetryPolicy()) == {
        "outage": 60.0,
        "watch_outage": 600.0,
        "base": 0.5,
        "ceiling": 10.0,
        "retry_after_ceiling": 120.0,
        "not_found_grace": 10.0,
        "statuses": {408, 425, 429, 500, 502, 503, 504},
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
@arithmetic
@example(RetryPolicy(), 10**6, 0.5)
@example(RetryPolicy(base=1e308, ceiling=1e308), 10**6, 0.5)
def test_retry_delay_is_in_bounds(policy, failures, chance):
    """A retry's delay never passes the ceiling, however many failures; jitter only lengthens it."""
    plain = policy.delay(failures, 0.0)
    jittered = policy.delay(failures, chance)
    assert 0.0 <= plain <= jittered <= policy.ceiling
    assert jittered <= 2 * plain
    assert plain >= min(policy.base, policy.ceiling / 2)


@given(retry_policies, st.integers(1, 10**6))
@arithmetic
def test_retry_delay_grows(policy, failures):
    """Without jitter no delay is shorter than the one before, nor more than twice as long."""
    before, after = policy.delay(failures, 0.0), policy.delay(failures + 1, 0.0)
    assert before <= after <= 2 * before


def test_retry_delay_by_hand():
    """Delays double from the base to half the ceiling, and chance lengthens them to the double."""
    policy = RetryPolicy(base=0.5, ceiling=10.0)
    assert [policy.delay(n, 0.0) for n in range(1, 8)] == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0]
    assert [policy.delay(n, 0.5) for n in (1, 4, 9)] == [0.75, 6.0, 7.5]


@pytest.mark.parametrize(
    ("retry_after", "granted"),
    [(None, 0.0), (0.0, 0.0), (1.5, 1.5), (120.0, 120.0), (121.0, 120.0), (math.inf, 120.0)],
)
def test_announced_is_capped(retry_after, granted):
    """A server is granted at most `retry_after_ceiling`."""
    assert RetryPolicy().announced(retry_after) == granted


@pytest.mark.parametrize(
    ("timeout", "at"), [(5.0, 105.0), (0.0, 100.0), (None, math.inf)], ids=["some", "none", "ever"]
)
def test_deadline(timeout, at):
    """A deadline lies its timeout after now, or never comes."""
    deadline = Deadline.after(timeout, now=100.0)
    assert (deadline.timeout, deadline.at) == (timeout, at)


@pytest.mark.parametrize("timeout", [None, math.inf])
def test_check_timeout_without_limit(timeout):
    """None and infinity both mean no limit."""
    assert check_timeout(timeout) is None


def test_check_timeout_lets_the_default_through():
    """`...` stands for the session's own timeout, which only the session knows."""
    assert check_timeout(...) is ...


@pytest.mark.parametrize("timeout", [0, 0.0, 1, 2.5, 2**70])
def test_check_timeout_accepts(timeout):
    """A number that is not negative comes back as a float."""
    checked = check_timeout(timeout)
    assert checked == timeout
    assert type(checked) is float


@pytest.mark.parametrize("timeout", [True, False, "1", b"1", 1j, [1], object], ids=repr)
def test_check_timeout_refuses_types(timeout):
    """What is no number is a TypeError that shows it."""
    with pytest.raises(TypeError, match="timeout is a number of seconds or None, not"):
        check_timeout(timeout)


@pytest.mark.parametrize("timeout", [-1, -0.001, math.nan, -math.inf, -(10**400)], ids=str)
def test_check_timeout_refuses_values(timeout):
    """A negative number, and NaN, is a ValueError."""
    with pytest.raises(ValueError, match="timeout must not be negative"):
        check_timeout(timeout)


def test_statuses_that_are_no_set():
    """A single status is refused, and the message shows what is wanted."""
    with pytest.raises(ConfigurationError, match="set of HTTP statuses, not 503"):
        RetryPolicy(statuses=503)


def test_check_timeout_beyond_float():
    """An int too large for a float is no limit, or a ValueError: no OverflowError escapes."""
    try:
        checked = check_timeout(10**400)
    except ValueError:
        return
    assert checked is None
