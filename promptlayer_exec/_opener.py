"""Opening a session's client, once at a time, and closing it."""

from __future__ import annotations

import asyncio
import secrets
import threading
import warnings
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from promptlayer_exec._api.executions import NodeMapReader, Request, Response
from promptlayer_exec._engine.callbacks import CallbackLog
from promptlayer_exec._engine.client import Client
from promptlayer_exec._engine.lifetime import Lifetime
from promptlayer_exec._engine.retry import RecentStarts, RetryState
from promptlayer_exec._engine.tasks import clock, foreign_cancellation, is_cancelled
from promptlayer_exec._errors import ConfigurationError, PromptLayerExecError, SessionClosed
from promptlayer_exec._events import WakeSource, broadcast
from promptlayer_exec._http.connections import Pools
from promptlayer_exec._http.throttle import Throttle
from promptlayer_exec._http.transport import Transport
from promptlayer_exec._policies import Limiter
from promptlayer_exec._push.wakeups import EarlyWakeUps
from promptlayer_exec._settings import Settings, find_api_key, find_base_url, sends_in_the_clear

if TYPE_CHECKING:
    from promptlayer_exec._push.channels import Push

T = TypeVar("T")


class Opener:
    """Opens and closes the client of a session, and keeps what outlives a client.

    Attributes:
        emit: passes an event to the observers.
        channel_suffix: what each start carries, so that its completion is pushed; None: no push.
    """

    def __init__(self, settings: Settings, limiters: list[Limiter]) -> None:
        self._settings = settings
        self._limiters = limiters
        self._node_maps = NodeMapReader()
        self._recent_starts = RecentStarts(settings.retry.not_found_grace)
        self._early_wake_ups = EarlyWakeUps()
        self.emit = broadcast(settings.observers)
        self.callbacks = CallbackLog(self.emit, self._recent_starts)
        self.channel_suffix: str | None = None
        if settings.push:
            # Imported here: it needs an extra, and takes too long for an event loop.
            from promptlayer_exec._push.channels import Push  # noqa: PLC0415

            self.channel_suffix = secrets.token_hex(16)
            self._push = Push
        self._client: Client | None = None
        self._opening = threading.Lock()
        self._closed = False
        self._warned = False

    async def enter(self) -> None:
        """Open the client, or another one if it was closed."""
        # Read once: another thread may change it, though it will get an error for that.
        if (client := self._client) is not None and client.lifetime.is_closing():
            await self._wait_closed(client)
        self._closed = False
        is_new = self._client is None
        try:
            await self.open()
        except BaseException:
            # A task that is cancelled here never calls `__aexit__`.
            if is_new and (client := self._client) is not None:
                client.lifetime.close()
            raise

    async def close(self) -> None:
        """Close the client; from then on, `open` raises `SessionClosed`."""
        if (client := self._client) is not None:
            client.lifetime.close()
        self._closed = True
        if (client := self._client) is not None:
            await self._wait_closed(client)

    async def open(self, execution_id: int | None = None) -> Client:
        """Return the open client; the first use opens it. Errors carry the execution's id."""
        try:
            if self._closed:
                raise SessionClosed
            if (client := self._client) is None:
                client = self._open_once()
            if not client.lifetime.is_ready():
                await client.lifetime.ready()
        except PromptLayerExecError as error:
            error.execution_id = execution_id
            raise
        return client

    def wake(self, execution_id: int, source: WakeSource) -> bool:
        """Poll an execution now; return True if somebody follows it."""
        if self._closed:
            raise SessionClosed(execution_id=execution_id)
        if (client := self._client) is not None and client.lifetime.is_ready():
            return client.wake(execution_id, source)
        self._early_wake_ups.add(execution_id, source)
        return False

    def _open_once(self) -> Client:
        with self._opening:  # two threads, each with its own loop, may get here at once
            if self._client is None:
                self._client = self._create()
            return self._client

    def _create(self) -> Client:
        api_key = find_api_key(self._settings.api_key)
        if api_key is None:
            raise ConfigurationError(
                "there is no API key: create one in PromptLayer's settings, and set"
                " PROMPTLAYER_API_KEY or pass api_key= to Session"
            )
        base_url = find_base_url(self._settings.base_url)
        self.warn_of_plain_http(base_url)
        resources = AsyncExitStack()
        transport = Transport(
            settings=self._settings,
            pools=Pools.open(self._settings, api_key, resources),
            base_url=base_url,
            api_key=api_key,
            throttle=Throttle(self._settings.rate, self._limiters),
            recent_starts=self._recent_starts,
            emit=self.emit,
        )
        client = Client(
            settings=self._settings,
            lifetime=Lifetime(resources),
            transport=transport,
            recent_starts=self._recent_starts,
            node_maps=self._node_maps,
            early_wake_ups=self._early_wake_ups,
            callbacks=self.callbacks,
            emit=self.emit,
        )
        if self.channel_suffix is not None:
            client.push = self._create_push(client, self.channel_suffix)
        return client

    def _create_push(self, client: Client, suffix: str) -> Push:
        async def call(request: Request, read: Callable[[Response], T]) -> T:
            once = RetryState(self._settings.retry, 0.0)
            try:
                transport, due = client.transport, clock()
                return (await transport.call(request, read, once, due=due, of_push=True)).value
            except asyncio.CancelledError as error:
                if is_cancelled():
                    raise
                raise foreign_cancellation("push", error) from error
            except Exception:
                raise
            except BaseException as fatal:  # a limiter's; it would end the session
                raise RuntimeError(f"push ended in {type(fatal).__name__}") from fatal

        return self._push(
            base_url=client.transport.base_url,
            suffix=suffix,
            proxy=True if self._settings.trust_env else None,
            max_bytes=self._settings.max_response_bytes,
            redact=client.transport.redactor.redact,
            call=call,
            wake=partial(client.wake, source="push"),
            spawn=client.lifetime.spawn,
        )

    def warn_of_plain_http(self, base_url: str, *, stacklevel: int = 2) -> None:
        """Warn once if the API key would be sent over a network without encryption."""
        if not self._warned and sends_in_the_clear(base_url):
            self._warned = True
            warnings.warn(
                f"{base_url} is plain http: anyone on the network path can read the API key and"
                " every output; use https, or a loopback address",
                stacklevel=stacklevel,
            )

    async def _wait_closed(self, client: Client) -> None:
        await client.lifetime.wait_closed()
        if self._client is client:
            self._client = None

    def describe(self) -> str:
        """Return the base URL, and whether the client is open."""
        if (client := self._client) is not None and not client.lifetime.is_closing():
            return f"{client.transport.base_url}, open"
        try:
            base_url = find_base_url(self._settings.base_url)
        except ConfigurationError:
            base_url = "with a malformed base URL"  # the environment has changed
        return f"{base_url}, not open"
