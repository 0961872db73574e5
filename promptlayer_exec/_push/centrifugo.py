"""The library's client for the push channel, made fit for any server (extra `push`)."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from functools import partial
from typing import Any, Literal, NoReturn

from centrifuge import Client
from websockets.asyncio.client import ClientConnection, connect
from websockets.protocol import Event

from promptlayer_exec._events import logger
from promptlayer_exec._http.exchange import excess

# Seconds for the closing handshake; a session that closes waits for it.
_CLOSE = 0.1
# Bytes that a server may leave unread. The commands of a channel are a few hundred.
_MOST_UNREAD = 65_536
# Messages in a frame, and what comes with one of them: the library handles all of them in one step
# of the loop.
_MOST_AT_ONCE = 1000
# One read has up to 256 KiB, of which each two bytes may be a frame. It is handed on in pieces, and
# no more of it once it has had so many frames.
_PIECE = 16_384
_MOST_FRAMES = 10_000


class PushClient(Client):
    """The library's client, which ignores what it cannot read, follows no redirect and ends soon.

    It uses five private names of the library; a test fails if one of them disappears.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float,
        proxy: Literal[True] | None,
        max_bytes: int,
        **settings: Any,
    ) -> None:
        super().__init__(address, timeout=timeout, **settings)
        self._open = partial(
            _Connect,
            address,
            proxy=proxy,
            max_size=max_bytes,
            compression=None,  # one read could hold thousands of messages of that size
            max_queue=1,
            open_timeout=timeout,
            close_timeout=_CLOSE,
            create_connection=_Connection,
        )
        self._max_bytes = max_bytes

    async def _open_transport(self) -> ClientConnection:
        return await self._open()

    async def _process_incoming_data(self, message: Any, attempt: int) -> None:
        try:
            _check_frame(message, self._max_bytes)
            await super()._process_incoming_data(message, attempt)
        except Exception as error:  # noqa: BLE001 - the library would log it and stop for good
            logger.debug("push: a frame cannot be read (%s)", type(error).__name__)
        finally:
            self._server_subs.clear()  # these are not used, and a server could add any number

    @staticmethod
    async def _close_conn(conn: ClientConnection) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE):
                await conn.close()
        conn.transport.abort()  # the peer may never answer
        await conn.wait_closed()

    async def finished(self) -> None:
        """Wait until a disconnected client has no task left."""
        while self._background_tasks:
            await asyncio.wait(self._background_tasks)


class _Connect(connect):
    """Connects without following redirects: the token must go to the server of `base_url` only."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


class _Connection(ClientConnection):
    """Ends if the server floods it with tiny frames, or reads nothing.

    The library handles all frames of a read in one step of the loop, and the answers to pings would
    fill the memory.
    """

    _frames = 0  # of the present read

    def data_received(self, data: bytes) -> None:
        self._frames = 0
        for begin in range(0, len(data), _PIECE):
            super().data_received(data[begin : begin + _PIECE])
            if self._frames > _MOST_FRAMES:
                self.transport.abort()
            if self.transport.is_closing():
                return

    def process_event(self, event: Event) -> None:
        self._frames += 1
        super().process_event(event)

    def has_begun(self) -> bool:
        """Return False in the TLS handshake through a proxy: the library does not use it yet."""
        return hasattr(self, "recv_messages")

    def eof_received(self) -> None:
        if self.has_begun():
            super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.has_begun():
            super().connection_lost(exc)

    async def recv(self, decode: bool | None = None) -> Any:
        # Otherwise the library would read all that waits in one step of the loop.
        await asyncio.sleep(0)
        return await super().recv(decode)

    def send_data(self) -> None:
        frames = self.protocol.data_to_send()
        if data := b"".join(frames):
            # One write, because thousands of small ones in asyncio's buffer would block the loop
            # for seconds.
            self.transport.write(data)
        self.protocol.writes = [end for end in frames if not end]
        super().send_data()
        transport = self.transport
        if not transport.is_closing() and transport.get_write_buffer_size() > _MOST_UNREAD:
            transport.abort()


def _check_frame(frame: str, max_bytes: int) -> None:
    """Raise `ValueError` for a frame that would take too much memory, or stop timers.

    The library sets some by what it reads. After a NaN, asyncio's loop calls no other timer.
    """
    if too_large := excess(frame.encode(), max_bytes):
        raise ValueError(f"the frame {too_large}")
    if frame.count("\n") > _MOST_AT_ONCE:
        raise ValueError(f"the frame has more than {_MOST_AT_ONCE} messages")
    if sum(_count_parts(_JSON.decode(line)) for line in frame.strip().split("\n")) > _MOST_AT_ONCE:
        raise ValueError(f"the frame has more than {_MOST_AT_ONCE} publications or subscriptions")


def _count_parts(message: Any) -> int:
    """Return how many earlier publications and server-side subscriptions come with a message."""
    count = 0
    match message:
        case {"connect": {"subs": {**subscriptions}}}:
            count += len(subscriptions) + sum(map(_count_publications, subscriptions.values()))
    match message:  # it may have both
        case {"subscribe": subscription}:
            count += _count_publications(subscription)
    return count


def _count_publications(subscription: Any) -> int:
    match subscription:
        case {"publications": [*publications]}:
            return len(publications)
        case _:
            return 0


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse)
