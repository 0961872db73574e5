"""Sessions of several processes share their watches through Redis (extra `redis`).

Redis stores, for each execution, whose turn it is to poll, and the latest response. Published
messages are only hints to look there: a hint that is lost or late costs seconds, never a result.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import attrs

from promptlayer_exec._integration import Reply, Response, install_hint

try:
    from redis.asyncio import Redis
    from redis.asyncio.client import PubSub
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import ConnectionError as RedisConnectionError
except ModuleNotFoundError as error:
    error.add_note(f"this needs {install_hint('redis')}")
    raise

from promptlayer_exec import ConfigurationError, NotFound, RequestError

if TYPE_CHECKING:
    from promptlayer_exec._integration import NodeMap, OpenSession, Poll, WakeSource

__all__ = ["RedisBackplane"]

_logger = logging.getLogger("promptlayer_exec")


@attrs.frozen
class Terms:
    """How long entries in Redis count, and how long a session waits for Redis, in seconds.

    A session holds the lease of an execution for `lease`. It renews it with each poll, and every
    `renewal` while it sleeps or waits for the rate, but not while a request is on its way: if that
    hangs, another session takes over. Hints may be lost, so all look at the lease again after
    `recheck`.

    A command to Redis may take `command`, and so may a pause between its messages. If Redis is
    away, a session tries again every `pause`, and meanwhile keeps the latest `most_kept` messages
    for other sessions.

    Sessions do not share responses over `most_bytes`. Redis keeps those of complete runs for
    `complete`, others for `incomplete` after the last renewal, and callbacks for `callback`.
    """

    lease: float = 10.0
    renewal: float = 3.0
    recheck: float = 5.0
    command: float = 1.0
    pause: float = 1.0
    most_kept: int = 10_000
    most_bytes: int = 1024 * 1024
    complete: float = 300.0
    incomplete: float = 60.0
    callback: float = 3600.0


TERMS = Terms()

# The first arguments of each: the keys of the lease, the response and the streams, and the token of
# the lease.
_TURN = """
local owner = redis.call('GET', KEYS[1])
if owner == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return 'poll'
end
local version, status = unpack(redis.call('HMGET', KEYS[2], 'version', 'status'))
if version and version ~= ARGV[3] and (owner or status == '200') then
  return {version, status, redis.call('HGET', KEYS[2], 'body')}
end
if not owner then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return 'poll'
end
if ARGV[5] ~= '' and redis.call('SET', KEYS[3], 1, 'NX', 'PX', ARGV[2]) then
  redis.call('PUBLISH', ARGV[4], ARGV[5])
end
return redis.call('PTTL', KEYS[1])
"""
# A session that stood still must not overwrite what its successor has published.
_PUBLISH = """
local is_ours = redis.call('GET', KEYS[1]) == ARGV[1]
if ARGV[3] ~= '200' then
  if not is_ours or redis.call('HGET', KEYS[2], 'status') == '200' then return 0 end
end
redis.call('HSET', KEYS[2], 'version', ARGV[2], 'status', ARGV[3], 'body', ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
if is_ours then redis.call('PEXPIRE', KEYS[1], ARGV[6]) end
redis.call('PUBLISH', ARGV[7], ARGV[8])
return 1
"""
# With 0 ms, it releases the lease.
_EXTEND = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
if ARGV[2] ~= '0' then
  redis.call('PEXPIRE', KEYS[2], ARGV[3])
else
  redis.call('PUBLISH', ARGV[4], ARGV[5])
end
"""


class RedisUnavailable(Exception):
    """Redis does not respond, or refuses the command."""


class RedisBackplane:
    """Lets the sessions of several processes share their watches: `Session(backplane=...)`.

    Each process passes one to its session::

        session = Session(backplane=RedisBackplane("redis://localhost:6379"))

    Of all sessions with the same Redis, prefix, server and key, one polls an execution, and the
    others use its responses. If that session closes, fails or hangs, another one polls. Wake-ups
    and callbacks reach the session that needs them, and all sessions learn of a run that one has
    started. While Redis is away, each session polls for itself, and keeps its messages for the
    others.

    Args:
        url_or_client: a URL as for `redis.asyncio.Redis.from_url`, or your own
            `redis.asyncio.Redis`, which stays open. Each session uses up to nine connections.
        prefix: the prefix of all keys in Redis and of the channel.

    Raises:
        ConfigurationError: an argument is malformed.
    """

    def __init__(self, url_or_client: str | Redis, *, prefix: str = "promptlayer-exec") -> None:
        self._source = url_or_client
        if not prefix or set(prefix) & set(" {}"):
            rule = "prefix must be without spaces and braces"
            raise ConfigurationError(rule, setting="prefix", got=repr(prefix))
        self._prefix = prefix
        try:
            self._client()
        except (TypeError, ValueError):  # their text may contain a password
            raise ConfigurationError(
                "RedisBackplane needs a URL such as 'redis://localhost:6379/0', or a"
                " redis.asyncio.Redis"
            ) from None

    def _client(self) -> Redis:
        if isinstance(self._source, Redis):
            return self._source
        if not isinstance(self._source, str):
            raise TypeError
        return Redis.from_url(
            self._source,
            socket_timeout=TERMS.command,
            socket_connect_timeout=TERMS.command,
            # Only to survive a server or proxy that closes idle connections.
            retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
        )

    def connect(self, client: OpenSession, namespace: str) -> RedisConnection:
        """Connect an open session. Only sessions call this."""
        redis = self._client()
        channel = f"{self._prefix}:1:{namespace}"
        return RedisConnection(redis, redis is not self._source, channel, client)


@attrs.define(eq=False)
class SharedWatch:
    """Uses the responses that another session polls, or polls and shares its own."""

    _connection: RedisConnection
    execution_id: int
    _read: Callable[[Response], NodeMap]
    # Identifies the watch in Redis. Each watch of a session has another.
    token: str = attrs.field(init=False, factory=lambda: uuid4().hex)
    is_held: bool = attrs.field(init=False, default=False)  # the lease, as far as is known here
    is_sent: bool = attrs.field(init=False, default=False)  # so the lease is not renewed
    is_waiting: bool = attrs.field(init=False, default=False)  # for another watch's response
    news: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)  # set by hints
    _seen: str = attrs.field(init=False, default="")  # the version of the latest response
    _is_alone: bool = attrs.field(init=False, default=False)
    _is_ended: bool = attrs.field(init=False, default=False)

    async def next_answer(
        self, poll: Poll, *, due: float, streams: Callable[[], bool]
    ) -> Reply[NodeMap]:
        now = asyncio.get_running_loop().time
        if not self._is_alone:
            with suppress(RedisUnavailable, RequestError):  # the latter: an unreadable response
                if (response := await self._wait_for_turn(streams)) is not None:
                    value, size = self._read(response), len(response.body)
                    return Reply(value, size, now(), 0.0, 0.0, None, shared=True)
            due = max(due, now())  # waiting for others does not make the poll late

        try:
            reply = await poll(due=due, on_sending=self._set_sent)
        except NotFound:
            if not await self._connection.find_start(self.execution_id):
                raise
            reply = await poll(due=now(), on_sending=self._set_sent)

        self.is_sent = False
        # A complete execution never changes, so its response counts even without the lease.
        source = reply.value.source
        if source is not None and (self.is_held or reply.value.complete):
            with suppress(RedisUnavailable):
                await self._publish(*source)
        return reply

    def _set_sent(self, is_sent: bool) -> None:
        self.is_sent = is_sent

    async def _wait_for_turn(self, streams: Callable[[], bool]) -> Response | None:
        """Wait for a response of another session, or None if it is this session's turn to poll."""
        while True:
            self.news.clear()  # first, so that no hint is lost in between
            turn = await self._connection.run(self._ask_turn, streams())
            if isinstance(turn, list):
                version, status, body = turn
                self._seen = _text(version)
                return Response(int(status), body.encode() if isinstance(body, str) else body)
            if not isinstance(turn, int):
                return None

            self.is_waiting = True
            try:
                async with asyncio.timeout(min(turn / 1000, TERMS.recheck)):
                    await self.news.wait()
            except TimeoutError:
                pass
            finally:
                self.is_waiting = False

    async def _ask_turn(self, streams: bool) -> Any:
        connection = self._connection
        hint = ""
        if streams:
            hint = connection.hint("streams", self.execution_id)
        arguments = (self.token, _ms(TERMS.lease), self._seen, connection.channel, hint)
        turn = await connection.eval(_TURN, self.execution_id, *arguments)
        self.is_held = isinstance(turn, str | bytes)
        if self._is_ended:
            connection.release(self)
        return turn

    async def _publish(self, status: int, body: bytes) -> None:
        connection = self._connection
        self._is_alone = len(body) > TERMS.most_bytes
        if self._is_alone:
            connection.release(self)
            return

        # A complete execution needs no lease any more.
        keep, lease = TERMS.incomplete, TERMS.lease
        if status == 200:
            keep, lease = TERMS.complete, 0.0

        version = uuid4().hex
        answer = (self.token, version, status, body, _ms(keep), _ms(lease))
        hint = (connection.channel, connection.hint("news", self.execution_id))
        is_stored = await connection.run(
            connection.eval, _PUBLISH, self.execution_id, *answer, *hint
        )
        self.is_held = bool(is_stored) and status != 200
        self._seen = version

    def end(self) -> None:
        self._is_ended = True
        self._connection.end(self)


@attrs.define(eq=False)
class RedisConnection:
    """The connection of an open session to Redis."""

    _redis: Redis
    _owns_redis: bool
    channel: str  # of all hints. The keys also begin with its name
    _client: OpenSession
    _id: str = attrs.field(init=False, factory=lambda: uuid4().hex[:8])
    _is_up: bool = attrs.field(init=False, default=True)
    _slots: asyncio.Semaphore = attrs.field(init=False, factory=partial(asyncio.Semaphore, 8))
    _watches: dict[int, SharedWatch] = attrs.field(init=False, factory=dict)
    # Messages for other sessions, until Redis is back.
    _kept: deque[Callable[[], Awaitable[Any]]] = attrs.field(
        init=False, factory=lambda: deque(maxlen=TERMS.most_kept)
    )

    def __attrs_post_init__(self) -> None:
        self._spawn(self._listen)
        self._spawn(self._renew_leases)

    # Called by the session.

    def share(self, execution_id: int, read: Callable[[Response], NodeMap]) -> SharedWatch:
        watch = self._watches[execution_id] = SharedWatch(self, execution_id, read)
        return watch

    def wake(self, execution_id: int, source: WakeSource) -> None:
        watch = self._watches.get(execution_id)
        if watch is None or not watch.is_held:
            self._hand_on(partial(self._publish, self.hint("wake", execution_id, source)))
            if watch is not None:
                watch.news.set()

    def started(self, execution_id: int, grace: float) -> None:
        if grace:
            until = asyncio.get_running_loop().time() + grace
            self._hand_on(partial(self._announce_start, execution_id, until))

    async def _announce_start(self, execution_id: int, until: float) -> None:
        left = _ms(until - asyncio.get_running_loop().time())
        if left > 0:
            await self.run(self._redis.set, self._key(execution_id, "start"), 1, px=left)

    async def find_start(self, execution_id: int) -> bool:
        """Return True if another session has started a run that may still be a 404."""
        left = 0
        with suppress(RedisUnavailable):
            left = await self.run(self._redis.pttl, self._key(execution_id, "start"))
        if left > 0:
            self._client.started_elsewhere(execution_id, left / 1000)
        return left > 0

    def called_back(self, token: str, execution_id: int) -> None:
        self._hand_on(partial(self._publish_callback, _digest(token), execution_id))

    async def _publish_callback(self, digest: str, execution_id: int) -> None:
        key = self._key(digest, "callback")
        await self.run(self._redis.set, key, execution_id, px=_ms(TERMS.callback))
        await self._publish(self.hint("callback", digest, execution_id))

    def find_callbacks(self) -> None:
        if tokens := self._client.lost_tokens():
            self._spawn(self._find_callbacks, tokens)

    async def _find_callbacks(self, tokens: list[str]) -> None:
        keys = [self._key(_digest(token), "callback") for token in tokens]
        found = await self.run(self._redis.mget, keys)
        for token, execution_id in zip(tokens, found, strict=True):
            if execution_id is not None:
                self._client.called_back_elsewhere(token, int(execution_id))

    async def aclose(self) -> None:
        if self._is_up:
            held = [watch for watch in self._watches.values() if watch.is_held]
            await self._release(held, within=TERMS.command / 2)
        if self._owns_redis:
            await self._redis.aclose()

    # Called by the watches.

    def hint(self, kind: str, subject: object, detail: object = "-") -> str:
        return f"{kind} {subject} {detail} {self._id}"

    def end(self, watch: SharedWatch) -> None:
        """Forget a watch that is over. When the session closes, `aclose` does so for all."""
        if not self._client.is_closing():
            if self._watches.get(watch.execution_id) is watch:
                del self._watches[watch.execution_id]
            self.release(watch)

    def release(self, *watches: SharedWatch) -> None:
        """Let other sessions poll, without waiting for Redis."""
        held = [watch for watch in watches if watch.is_held]
        for watch in held:
            watch.is_held = False
        if held:
            self._spawn(self._release, held)

    async def _release(self, watches: list[SharedWatch], within: float = TERMS.command) -> None:
        # Even if Redis seems away: a full one can still delete.
        with suppress(Exception):  # the leases expire anyway
            async with asyncio.timeout(within):
                await self._extend(watches, 0)

    async def _extend(self, watches: Iterable[SharedWatch], seconds: float) -> list[Any]:
        """Extend the leases of watches by some seconds, in one round trip."""
        pipeline = self._redis.pipeline(transaction=False)
        for watch in watches:
            hint = self.hint("news", watch.execution_id)
            arguments = (watch.token, _ms(seconds), _ms(TERMS.incomplete), self.channel, hint)
            self.eval(_EXTEND, watch.execution_id, *arguments, client=pipeline)
        return await pipeline.execute()

    def eval(
        self, script: str, subject: object, *arguments: object, client: Any = None
    ) -> Awaitable[Any]:
        keys = [self._key(subject, kind) for kind in ("lease", "answer", "streams")]
        client = client or self._redis
        return cast("Awaitable[Any]", client.eval(script, len(keys), *keys, *arguments))

    def _key(self, subject: object, kind: str) -> str:
        return f"{self.channel}:{{{subject}}}:{kind}"

    async def _publish(self, hint: str) -> None:
        await self.run(self._redis.publish, self.channel, hint)

    def _spawn(self, work: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        """Run something in the background, unless Redis is away or the session closes."""

        async def run() -> None:
            with suppress(RedisUnavailable):
                await work(*arguments)

        if not self._client.is_closing():
            self._client.spawn(run(), name="promptlayer_exec.Backplane")

    def _hand_on(self, work: Callable[[], Awaitable[Any]]) -> None:
        """Send other sessions a message, now or when Redis is back."""

        async def run() -> None:
            try:
                await work()
            except RedisUnavailable:
                self._kept.append(work)

        self._spawn(run)

    async def _hand_on_kept(self) -> None:
        kept = [self._kept.popleft() for _ in range(len(self._kept))]
        for work in kept:
            self._hand_on(work)

        # Sessions that came back later have missed the hints.
        await asyncio.sleep(TERMS.recheck)
        for work in kept:
            self._hand_on(work)

    async def run(
        self, command: Callable[..., Awaitable[Any]], *arguments: Any, **options: Any
    ) -> Any:
        """Return the result of a command, or raise `RedisUnavailable` if it fails or is late.

        It runs in a separate task: on Python 3.11, redis-py may swallow a cancellation.
        """
        attempt = self._try(partial(command, *arguments, **options))
        task = self._client.spawn(attempt, name="promptlayer_exec.Backplane")
        await asyncio.wait([task])
        answer = task.result()
        if answer is None:
            raise RedisUnavailable
        return answer

    async def _try(self, command: Callable[[], Awaitable[Any]], *, is_probe: bool = False) -> Any:
        """Return the result of a command, or None if it fails."""
        async with self._slots:  # waiting for a slot does not count for the timeout
            if self._is_up or is_probe:
                try:
                    async with asyncio.timeout(TERMS.command):
                        return await command()
                except Exception as error:  # noqa: BLE001 - any error makes Redis unusable
                    self._mark_unavailable(error)
        return None

    # Running in the background.

    def _mark_unavailable(self, error: Exception) -> None:
        """Let each watch poll for itself until Redis is back."""
        if not self._is_up:
            return
        self._is_up = False

        said = f"{type(error).__name__}: {error}".removesuffix(": ")
        _logger.warning(
            "Redis unavailable (%.200s): this session polls for itself until Redis is back", said
        )

        self.release(*self._watches.values())
        self._recheck_leases()

    def _recheck_leases(self) -> None:
        """Make each waiting watch look at its lease."""
        for watch in self._watches.values():
            watch.news.set()

    async def _renew_leases(self) -> None:
        while not self._client.is_closing():
            await asyncio.sleep(TERMS.renewal)
            with suppress(RedisUnavailable):
                await self._extend_all()

    async def _extend_all(self) -> None:
        """Extend the leases of all watches that sleep or wait for the rate."""
        watches = self._watches.values()
        held = [watch for watch in watches if watch.is_held and not watch.is_sent]
        for start in range(0, len(held), 100):  # so that each command takes little time
            await self.run(self._extend, held[start : start + 100], TERMS.lease)

    async def _listen(self) -> None:
        """Receive hints until Redis is away, and again once it is back."""
        while not self._client.is_closing():
            try:
                if not self._is_up:
                    await self._drop_connections()
                async with self._redis.pubsub() as pubsub:
                    async with asyncio.timeout(TERMS.command):
                        await pubsub.subscribe(self.channel)
                    await self._probe()
                    await self._receive(pubsub)
            except Exception as error:  # noqa: BLE001 - otherwise the hints would stop
                self._mark_unavailable(error)
            await asyncio.sleep(TERMS.pause)

    async def _drop_connections(self) -> None:
        """Close idle connections, because they may lead to a demoted server."""
        async with asyncio.timeout(TERMS.command):
            await self._redis.connection_pool.disconnect(inuse_connections=False)

    async def _probe(self) -> None:
        """Try a real write, because a full Redis accepts everything else."""
        if self._is_up:
            return

        arguments = (self._id, _ms(TERMS.command), "", self.channel, "")
        probe = partial(self.eval, _TURN, f"probe-{self._id}", *arguments)
        if await self._try(probe, is_probe=True) is not None:
            self._is_up = True
            _logger.info("Redis is back: this session shares its polls again")
            self._spawn(self._hand_on_kept)

    async def _receive(self, pubsub: PubSub) -> None:
        is_pinged = False
        # After an outage, hints may come from another server, so this connection is of no use. And
        # redis-py may swallow a cancellation.
        while self._is_up and not self._client.is_closing():
            message = await pubsub.get_message(timeout=TERMS.command)
            if message is None:  # it is quiet, or hangs
                if is_pinged:
                    raise TimeoutError(f"no response within {TERMS.command:g} s")
                await pubsub.ping()
            elif message["type"] == "subscribe":
                self._recheck_leases()
                self.find_callbacks()
            elif message["type"] == "message":
                try:
                    self._handle_message(*_text(message["data"]).split(" "))
                except (TypeError, ValueError) as error:
                    _logger.debug("could not read a hint (%s)", type(error).__name__)

            is_pinged = message is None

    def _handle_message(self, kind: str, subject: str, detail: str, sender: str) -> None:
        """Act on a hint."""
        if sender == self._id:
            return

        if kind == "callback":
            for token in self._client.lost_tokens():
                if _digest(token) == subject:
                    self._client.called_back_elsewhere(token, int(detail))
            return

        execution_id = int(subject)
        watch = self._watches.get(execution_id)
        if kind == "streams":
            self._client.stream_elsewhere(execution_id)
        elif watch is not None and (kind == "news" or watch.is_waiting):
            watch.news.set()
        elif kind == "wake":
            self._client.wake_here(execution_id, cast("WakeSource", detail))


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode()


def _digest(token: str) -> str:
    """Return what to store of a callback's token, which is a secret."""
    return hashlib.sha256(token.encode()).hexdigest()
