"""Protocols that stand between a connection and aiohttp's own."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler


def protocol_of(transport: asyncio.Transport) -> object:
    """Return the protocol, None for one of asyncio's for TLS that was closed twice.

    Such a transport knows neither its protocol nor anything else, and raises AttributeError. The
    end of a response that ends with its connection is one close, aiohttp's release another.
    """
    try:
        return transport.get_protocol()
    except AttributeError:
        return None


def has_partial_head(protocol: ResponseHandler) -> bool:
    """Return True if the last bytes of a response were followed by a part of another's head.

    aiohttp's parser shows such a part only when it is told that nothing more will come. The next
    request gets a parser of its own. Uses `ResponseHandler._parser`.
    """
    parser = getattr(protocol, "_parser", None)
    try:
        return parser is not None and (
            parser.feed_eof() is not None
            # The parser that is written in Python keeps what it cannot parse.
            or bool(getattr(parser, "_lines", None))
        )
    except Exception:  # noqa: BLE001 - the part may be anything
        return True


def is_plain(transport: asyncio.Transport) -> bool:
    """Return True without TLS, which has messages of its own: then all that arrives is HTTP."""
    return transport.get_extra_info("ssl_object") is None


def readable(transport: asyncio.Transport) -> Callable[[], bool]:
    """Return a function that returns True if the socket has bytes that the loop has not read."""
    descriptor = transport.get_extra_info("socket").fileno()
    if not hasattr(select, "poll"):  # Windows
        return lambda: bool(select.select([descriptor], [], [], 0)[0])
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return lambda: bool(poll.poll(0))


class Interposed:
    """Stands between a transport and its protocol, from `begin` to `end`.

    It notes whether data arrives. Everything goes to the protocol itself.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.protocol = cast("ResponseHandler", protocol_of(transport))
        self.has_received = False

    def begin(self) -> None:
        try:
            self.transport.set_protocol(cast("asyncio.Protocol", self))
        except AttributeError:  # it was closed twice; `suppress` would cost every poll something
            return

    def end(self) -> None:
        if protocol_of(self.transport) is self:  # else another one stands there, or it is closed
            self.transport.set_protocol(self.protocol)

    def data_received(self, data: bytes) -> None:
        self.has_received = True
        self.protocol.data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.protocol.connection_lost(exc)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.protocol, name)


class Idle(Interposed):
    """Closes a connection of the pool on which the server speaks without being asked.

    It stays when a request uses the connection, between `take` and `begin`, and passes on what
    arrives: to change a transport's protocol twice would cost more.

    aiohttp's pool checks only that a connection is open. Bytes that arrived while it was idle would
    be read as the response to the next request, and its response as that of the one after it.

    One that cannot be used again is closed at once: over TLS, an ordinary close waits for the peer.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self.is_new = True
        self.is_idle = False
        self.is_plain = is_plain(transport)
        self.is_readable = readable(transport)

    def begin(self) -> None:
        if self.protocol.should_close:
            self.transport.abort()
            return
        self.is_idle = True
        if protocol_of(self.transport) is not self:  # it is new, or a `_ReadingBody` stands there
            super().begin()

    def take(self) -> bool:
        """Return True if the connection can be used: the next bytes are those of a response."""
        if self.transport.is_closing() or (self.is_plain and self.is_readable()):
            return False
        self.is_idle = False
        is_first, self.is_new = self.is_new, False
        return not self.protocol.should_close and (is_first or not has_partial_head(self.protocol))

    def data_received(self, data: bytes) -> None:
        if self.is_idle:
            self.transport.abort()
        else:
            self.protocol.data_received(data)
