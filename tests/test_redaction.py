"""The secret: how the API key is kept out of what is shown."""

from __future__ import annotations

import json

import pytest

from promptlayer_exec._redaction import Redactor

KEY = 'pl/se"cret'
SECRET = Redactor(KEY)


def test_it_does_not_show_itself() -> None:
    """Not even by its repr."""
    assert "pl/" not in repr(SECRET)


@pytest.mark.parametrize(
    "spelling", [KEY, json.dumps(KEY)[1:-1], json.dumps(KEY)[1:-1].replace("/", "\\/")]
)
def test_every_usual_spelling_is_blotted_out(spelling: str) -> None:
    """As it is, and as JSON writes it, with slashes escaped or not."""
    text = f"the key {spelling} is unknown, {spelling}!"
    assert SECRET.redact(text) == "the key *** is unknown, ***!"
    assert SECRET.redact_bytes(text.encode()) == b"the key *** is unknown, ***!"


def test_text_without_it_stays_as_it_is() -> None:
    """Bytes that are no UTF-8 too."""
    assert SECRET.redact("harmless") == "harmless"
    assert SECRET.redact_bytes(b"\xff\xfe") == b"\xff\xfe"
    assert SECRET.redact_json(b'{"a": "\xc3\xa9"}') == b'{"a": "\xc3\xa9"}'


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"message": KEY}).encode(),
        json.dumps({"message": KEY}).encode("utf-16"),
        ('{"message": "' + "".join(f"\\u{ord(char):04x}" for char in KEY) + '"}').encode(),
    ],
    ids=["plain", "UTF-16", "escaped"],
)
def test_json_can_spell_it_in_many_ways(body: bytes) -> None:
    """It is redacted of what the body means."""
    assert json.loads(SECRET.redact_json(body)) == {"message": "***"}


def test_what_is_no_json_is_taken_as_text() -> None:
    """However the body is broken."""
    assert SECRET.redact_json(f"<b>{KEY}".encode()) == b"<b>***"
    assert SECRET.redact_json(b"[" * 100_000) == b"[" * 100_000


def test_a_word_too_short_to_be_secret_stays() -> None:
    """A test's key may stand in any message."""
    assert Redactor("key").redact("no such key") == "no such key"


def test_an_error_tells_it_by_itself_its_cause_or_its_context() -> None:
    """Each of them is printed with a traceback; what an error carries counts as well."""
    told = ValueError(f"bad key {KEY}")
    carried = ValueError("bad key")
    carried.key = KEY  # type: ignore[attr-defined]
    caused, suppressed, both = KeyError(), KeyError(), KeyError()
    caused.__cause__ = told
    suppressed.__context__ = told
    both.__cause__, both.__context__ = KeyError(), told
    for error in (told, carried, caused, suppressed, both):
        assert SECRET.is_shown_by(error)
    assert not SECRET.is_shown_by(KeyError("harmless"))
    assert not SECRET.is_shown_by(None)
