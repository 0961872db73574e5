"""Protocols that stand between a connection and aiohttp's own for a while."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler


def protocol_of(transport: asyncio.Transport) -> asyncio.BaseProtocol | None:
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
    with suppress(Exception):  # the part may be anything
        return parser is not None and (
            parser.feed_eof() is not None
            # The parser that is written in Python keeps what it cannot parse.
            or bool(getattr(parser, "_lines", None))
        )
    return True


class Interposed:
    """Stands between a transport and its protocol until `end`, and notes whether data arrives.

    Everything else goes to the protocol itself.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.protocol = cast("ResponseHandler", protocol_of(transport))
        self.has_received = False

    def begin(self) -> None:
        with suppress(AttributeError):  # it was closed twice
            self.transport.set_protocol(cast("asyncio.Protocol", self))

    def end(self) -> None:
        current = protocol_of(self.transport)
        if cast(object, current) is self:  # else another one stands there, or it is closed
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

    One that cannot be used again is closed at once: over TLS, an ordinary close waits for the peer.
    """

    def begin(self) -> None:
        if self.protocol.should_close:
            self.transport.abort()
        else:
            super().begin()

    def data_received(self, _data: bytes) -> None:
        self.transport.abort()
