"""What arrives in answer to a request: read up to a limit, and judged before it is decoded."""

from __future__ import annotations

import asyncio
import json
import re

import aiohttp
import attrs

from promptlayer_exec._api.executions import is_object, up_to_id
from promptlayer_exec._api.redaction import Redactor
from promptlayer_exec._http.connections import abort
from promptlayer_exec._http.protocols import Interposed

# Bounds the memory of a decoded body: at most one value per this many bytes of the limit.
_BYTES_PER_VALUE = 64
_FEW_VALUES = 1000
_STATUS_LINE = re.compile(r"HTTP/1\.\d \d{3}( |$)")
_OPENING_A_VALUE = (b",", b"[", b"{")
# So they may be written in a text, which may be JSON itself.
_ESCAPED = (rb"\u002c", rb"\u002C", rb"\u005b", rb"\u005B", rb"\u007b", rb"\u007B")
# For JSON without escaped quotes. A text that may be JSON itself is kept, because `into=`
# decodes it; its first bracket, and the spaces before it, may be escaped.
_STRING = re.compile(
    rb"""
    "(?! (?: [ ] | \\[nrt] | \\u00(?:09|0[aAdD]|20) )*+ (?: [\[{] | \\u00[57][bB] ) ) [^"]*+ "?
    | ( "[^"]*+ "? )
    """,
    re.VERBOSE,
)


@attrs.define(eq=False, repr=False)
class Exchange:
    """What arrived in one attempt, and why it ended early.

    Attributes:
        limit: the most bytes of a good answer.
        expected: the body that the last answer had.
        size: how many bytes of the body have arrived.
        is_held: whether the request was about to be sent, and waited for permission.
        redactor: redacts what is shown of it.
    """

    limit: int
    redactor: Redactor
    expected: bytes = b""
    answer: aiohttp.ClientResponse | None = None
    is_held: bool = False
    failure: BaseException | None = None
    size: int = 0
    # What arrived of the body: so many bytes of the expected one, and then these pieces.
    _as_expected: int = attrs.field(init=False, default=0)
    _pieces: list[bytes] = attrs.field(init=False, factory=list)

    def add(self, piece: bytes) -> None:
        """Add the next piece of the body; as long as it is as expected, it takes no memory."""
        self.size += len(piece)
        if not self._pieces and self.expected.startswith(piece, self._as_expected):
            self._as_expected = self.size
        else:
            self._pieces.append(piece)

    def body(self) -> bytes:
        """Return what arrived of the body; the expected one itself if it is the same."""
        if not self._pieces:
            return self.expected[: self._as_expected]
        if not self._as_expected and len(self._pieces) == 1:
            return self._pieces[0]
        return b"".join([memoryview(self.expected)[: self._as_expected], *self._pieces])

    def clear(self) -> None:
        """Forget what arrived: the traceback of a failure has this, and nothing else frees it."""
        self.failure = None
        self._pieces.clear()


def has_id(body: bytes, limit: int) -> bool:
    """Return True if a broken answer to a start may still have the id of its run."""
    return up_to_id(body) is not None or (not excess(body, limit) and is_object(body))


def excess(body: bytes, limit: int) -> str:
    """Return what is too much about a JSON body for a limit in bytes; empty if nothing is."""
    # A decoded body takes up to fifty times its size, so one under a sixth of the limit takes less
    # than nine times that, and the slow count is not needed.
    if len(body) <= limit // 6:
        return ""
    if len(body) > limit:
        return f"is larger than {limit} bytes"
    values = max(limit // _BYTES_PER_VALUE, _FEW_VALUES)
    if _count_values(body) > values and _count_values(_without_strings(body, values)) > values:
        return f"holds more than {values:,} values, the most for {limit} bytes"
    return ""


def _count_values(body: bytes) -> int:
    return sum(map(body.count, _OPENING_A_VALUE + _ESCAPED))


def _without_strings(body: bytes, most: int) -> bytes:
    """Return JSON without its texts, except for those that may be JSON themselves.

    A value has two texts at most, its key and itself. JSON with more than that for `most` values is
    returned as it is, because to remove millions takes much memory.
    """
    if not json.detect_encoding(body).startswith("utf-8"):
        return body
    # A letter, because a bracket behind it does not begin the text.
    plain = body.replace(rb"\\", b"x").replace(rb"\"", b"x")
    return body if plain.count(b'"') > 4 * most else b"".join(filter(None, _STRING.split(plain)))


def is_doubtful(answer: aiohttp.ClientResponse) -> bool:
    """Return True for a refusal whose head may have begun with another, unrequested head.

    A part of one may have arrived before the start was sent, unnoticed on a borrowed connection. It
    then ends within the reason or the value of a header, and the status line of the real answer
    follows.
    """
    texts = [answer.reason or "", *answer.headers.values()]
    return answer.status >= 300 and any(map(_STATUS_LINE.search, texts))


def may_be_cut(answer: aiohttp.ClientResponse, body: bytes) -> bool:
    """Return True for a number whose end is not marked: all other JSON marks its own."""
    if not body[-4:].rstrip(b"\0")[-1:].isdigit():  # also in UTF-16 and UTF-32
        return False
    headers = answer.headers
    # Other transfer codings end with the connection: https://www.rfc-editor.org/rfc/rfc9112#section-6.3
    codings = [coding.strip().lower() for coding in headers.getall("Transfer-Encoding", ())]
    is_framed = codings == ["chunked"] if codings else "Content-Length" in headers
    is_plain = headers.get("Content-Encoding", "identity") == "identity"
    return not (is_framed and is_plain)


async def read_body(answer: aiohttp.ClientResponse, exchange: Exchange, limit: int) -> None:
    """Read a body into `exchange`, and stop when it exceeds `limit` bytes."""
    content = answer.content
    reading = None if content.is_eof() else _end_with_connection(answer, exchange)
    try:
        while exchange.size <= limit and not content.at_eof():
            exchange.add(await content.readany())
            if reading is not None:  # aiohttp may have parsed more just now
                reading.abort_if_closing()
        if content.total_bytes and not exchange.size:  # a middleware has read it, or a trace
            text = await aiohttp.ClientResponse.text(answer, "latin-1")  # also if it was released
            exchange.add(text.encode("latin-1"))
    finally:
        if reading is not None:
            reading.end()
        if not answer.closed:  # it is closed already if the body was read to its end
            abort(answer.connection.transport if answer.connection is not None else None)
            answer.close()


class _ReadingBody(Interposed):
    """Ends a body with its connection: aiohttp reports a malformed chunk only by closing that."""

    def __init__(self, transport: asyncio.Transport, body: aiohttp.StreamReader) -> None:
        super().__init__(transport)
        self._body = body

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.abort_if_closing()

    def abort_if_closing(self) -> None:
        """End a connection at once that is closed already: over TLS, that waits for the peer."""
        if self.transport.is_closing():
            self.transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        _end_body(self._body)


def _end_with_connection(answer: aiohttp.ClientResponse, exchange: Exchange) -> _ReadingBody | None:
    """Let the body of an answer end with its connection, until the returned protocol is ended.

    If the connection is gone already, what has arrived of the body goes to `exchange`.
    """
    connection = answer.connection
    transport = None if connection is None else connection.transport
    if transport is None:
        if answer.content.exception() is None:
            exchange.add(answer.content.read_nowait())
        _end_body(answer.content)
        return None
    reading = _ReadingBody(transport, answer.content)
    reading.begin()
    reading.abort_if_closing()
    return reading


def _end_body(body: aiohttp.StreamReader) -> None:
    if not body.is_eof() and body.exception() is None:
        body.set_exception(aiohttp.ClientPayloadError("the connection was closed"))
