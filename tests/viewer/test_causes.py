"""What failures have in common."""

from __future__ import annotations

import pytest

from promptlayer_exec._causes import common_reason

ONE_CAUSE = [
    (
        "Rate limit reached for gpt-4o: Limit 30000, Used 29123. Please try again in 654ms.",
        "Rate limit reached for gpt-4o: Limit 30000, Used 28999. Please try again in 2.578s.",
    ),
    (
        "request 3f2b8c1e-5d4a-4b6f-9a7e-0c1d2e3f4a5b was cancelled",
        "request 00000000-5d4a-4b6f-9a7e-0c1d2e3f4a5b was cancelled",
    ),
    ("no offer for customer 'Acme Ltd'", "no offer for customer 'Globex'"),
    ('Invalid value: "ten"', 'Invalid value: "eleven"'),
    ("unknown customer cus_9s8d7f", "unknown customer cus_1a2b3c"),
    ("mail to ann@example.com bounced", "mail to bob.b@example.org bounced"),
    ("token expired at 2026-11-30T22:14:05Z", "token expired at 2026-12-01T08:00:59.123+01:00"),
    ("no such file: /srv/data/a/report.csv", "no such file: /srv/data/b/summary.csv"),
    ("<Worker object at 0x7f30711dca10> is closed", "<Worker object at 0x7f307133> is closed"),
    ("HTTP 503 from https://kb.example/search?q=1", "HTTP 503 from https://kb.example/item/7"),
    ("timed out after 30.0 seconds", "timed out after 31.5 seconds"),
    ("the bill of $1,204.00 is too high", "the bill of $99 is too high"),
    ("ids 4, 5, 6 are missing", "ids 7, 8 are missing"),
    (
        'Traceback (most recent call last):\n  File "a.py", line 3\nValueError: no seats for 12',
        'Traceback (most recent call last):\n  File "b.py", line 77\nValueError: no seats for 9',
    ),
]

TWO_CAUSES = [
    ("KeyError: 'seats'", "KeyError: 'plan'"),
    (
        "AttributeError: 'NoneType' object has no attribute 'get'",
        "AttributeError: 'NoneType' object has no attribute 'items'",
    ),
    ("NameError: name 'total' is not defined", "NameError: name 'sum_' is not defined"),
    ("HTTP 503 from https://kb.example/1", "HTTP 500 from https://kb.example/1"),
    ("HTTP 503 from https://kb.example/1", "HTTP 503 from https://crm.example/1"),
    ("rate limit reached (429)", "rate limit reached (503)"),
    ("The answer has no text: 422", "The answer has no text: 500"),
    ("Error code: 400 - bad request", "Error code: 401 - bad request"),
    ("cannot decode utf8", "cannot decode utf16"),
    ("division by zero", "list index out of range"),
]


@pytest.mark.parametrize(("one", "other"), ONE_CAUSE)
def test_what_differs_from_run_to_run_is_taken_out(one: str, other: str) -> None:
    """Both are one cause, whose text still has words."""
    assert common_reason(one) == common_reason(other)
    assert "…" in common_reason(one) or one.startswith("Traceback")
    assert len(common_reason(one).replace("…", "")) > 8


@pytest.mark.parametrize(("one", "other"), TWO_CAUSES)
def test_what_may_be_two_reasons_stays_apart(one: str, other: str) -> None:
    """Names in the program, hosts and statuses make a difference."""
    assert common_reason(one) != common_reason(other)


@pytest.mark.parametrize("text", ["", "…", "'", "\n\n", "Traceback ", "a" * 100_000, "'" * 5000])
def test_any_text_has_a_short_common_reason(text: str) -> None:
    """It ends, and what it returns is short, and the same if it is applied again."""
    common = common_reason(text)
    assert len(common) <= 301
    assert common_reason(common) == common
