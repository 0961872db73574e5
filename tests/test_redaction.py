"""Redacting the API key in texts, bytes, JSON and errors."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from promptlayer_exec._api.redaction import Redactor

KEY = 'pl/se"cret'
REDACTOR = Redactor(KEY)


def test_the_repr_does_not_show_the_key() -> None:
    """A redactor can be logged."""
    assert "pl/" not in repr(REDACTOR)


@pytest.mark.parametrize(
    "spelling", [KEY, json.dumps(KEY)[1:-1], json.dumps(KEY)[1:-1].replace("/", "\\/")]
)
def test_every_usual_spelling_is_redacted(spelling: str) -> None:
    """The key itself, and the key in JSON, with slashes escaped or not."""
    text = f"the key {spelling} is unknown, {spelling}!"
    assert REDACTOR.redact(text) == "the key *** is unknown, ***!"
    assert REDACTOR.redact_bytes(text.encode()) == b"the key *** is unknown, ***!"


def test_a_text_without_the_key_is_unchanged() -> None:
    """Bytes that are not UTF-8 are unchanged, too."""
    assert REDACTOR.redact("harmless") == "harmless"
    assert REDACTOR.redact_bytes(b"\xff\xfe") == b"\xff\xfe"
    assert REDACTOR.redact_body(b'{"a": "\xc3\xa9"}') == b'{"a": "\xc3\xa9"}'


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"message": KEY}).encode(),
        json.dumps({"message": KEY}).encode("utf-16"),
        ('{"message": "' + "".join(f"\\u{ord(char):04x}" for char in KEY) + '"}').encode(),
        ('{"message": "' + "".join(f"\\u{ord(char):04X}" for char in KEY) + '"}').encode("utf-16"),
    ],
    ids=["plain", "UTF-16", "escaped", "both"],
)
def test_every_spelling_in_json_is_redacted(body: bytes) -> None:
    """The decoded values are redacted."""
    assert json.loads(REDACTOR.redact_body(body)) == {"message": "***"}


@pytest.mark.parametrize("spell", [str, lambda key: json.dumps(key)[1:-1], repr, ascii])
@pytest.mark.parametrize(
    ("key", "encoding"),
    [("clé-secrète", "utf-8"), ("clé-secrète", "latin-1"), ("clé-ключ", "utf-8")],
)
def test_a_key_that_is_not_ascii_is_redacted(
    key: str, encoding: str, spell: Callable[[str], str]
) -> None:
    """In a text, and in bytes of either encoding, also where a parser's error quotes them."""
    redactor = Redactor(key)
    text = f"the key {spell(key)} is unknown"
    assert "cl" not in redactor.redact(text)
    assert b"cl" not in redactor.redact_bytes(text.encode(encoding))
    assert "cl" not in redactor.redact(repr(f"the key {key}".encode(encoding)))


def test_a_body_that_is_not_json_is_redacted_as_text() -> None:
    """The same is true for JSON that is nested too deeply."""
    escaped = "".join(f"\\u{ord(char):04x}" for char in KEY)
    assert REDACTOR.redact_body(f"<b>{escaped}".encode()) == b"<b>***"
    for start in (b"\0", b"\xff\xfe", b"\xfe\xff", b"a\0", b"\0\0\0a"):
        assert REDACTOR.redact_body(start + KEY.encode()) == start + b"***"
    assert REDACTOR.redact_body(f"<b>{KEY}".encode()) == b"<b>***"
    assert REDACTOR.redact_body(b"[" * 100_000) == b"[" * 100_000


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-32-be"])
@pytest.mark.parametrize("count", [1, 50])
@pytest.mark.parametrize("kept", [0, 1, 30])
def test_no_part_of_a_key_is_left_where_a_body_is_cut(encoding: str, count: int, kept: int) -> None:
    """Wherever it was cut when it was read, and however much shorter the rest became."""
    whole = (KEY * count + "x" * 200).encode(encoding)
    read = whole + KEY.encode(encoding)[:kept]
    for size in range(len(whole) - 90, len(whole) - 50):
        start = REDACTOR.redact_start(read, size)
        assert len(start) <= size
        assert set(start) <= set(b"*x")


def test_a_short_key_is_not_redacted() -> None:
    """The key of a test may be an ordinary word."""
    assert Redactor("key").redact("no such key") == "no such key"


def test_an_error_shows_the_key_in_its_message_attributes_cause_or_context() -> None:
    """A traceback prints the cause and the context."""
    message = ValueError(f"bad key {KEY}")
    attribute = ValueError("bad key")
    attribute.key = KEY  # type: ignore[attr-defined]
    cause, context, both = KeyError(), KeyError(), KeyError()
    cause.__cause__ = message
    context.__context__ = message
    both.__cause__, both.__context__ = KeyError(), message
    for error in (message, attribute, cause, context, both):
        assert REDACTOR.is_shown_by(error)
    assert not REDACTOR.is_shown_by(KeyError("harmless"))
    assert not REDACTOR.is_shown_by(None)
