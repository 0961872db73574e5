"""Protocols that stand between a connection and aiohttp's own for a while."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler


class Interposed:
    """Stands between a transport and its protocol until `end`, and notes whether data arrives.

    Everything else goes to the protocol itself.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.protocol = cast("ResponseHandler", transport.get_protocol())
        self.has_received = False

    def begin(self) -> None:
        self.transport.set_protocol(cast("asyncio.Protocol", self))

    def end(self) -> None:
        if cast(object, self.transport.get_protocol()) is self:  # else another one stands there
            self.transport.set_protocol(self.protocol)

    def data_received(self, data: bytes) -> None:
        self.has_received = True
        self.protocol.data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.protocol.connection_lost(exc)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.protocol, name)


class Idle(Interposed):
    """Closes a connection of the pool on which the server speaks without being asked."""

    def data_received(self, _data: bytes) -> None:
        self.transport.abort()
