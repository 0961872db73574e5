"""Sharing watches with the sessions of other processes, through Redis (extra `redis`).

Redis holds the truth: for each execution, whose turn it is to poll, and the latest answer. What is
published is a hint to look there, so a hint that is lost or late costs seconds and never a result.
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
    """For how long what is in Redis counts, and how long this waits for Redis, in seconds.

    A session may poll for `lease` without a sign of life. It gives one every `renewal` while it
    sleeps or waits for the rate, and with each poll, but not while a request is on its way: one
    that hangs is taken over. Hints may be lost, so everybody looks at the lease again after
    `recheck`.

    A command may take `command`, which is also the longest silence of Redis. Once that cannot be
    used, it is tried again every `pause`, and the latest `most_kept` messages for other sessions
    are kept until it can.

    Answers of over `most_bytes` are not shared. Those of complete runs are kept for `complete`,
    others for `incomplete` after the last sign of life, callbacks for `callback`.
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

# Each has the keys of the lease, the answer and the streams, and the token of the lease first.
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
# A session that was stopped must not overwrite what its successor has published.
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
# For 0 ms, it releases the lease.
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
    """Redis does not answer, or refuses."""


class RedisBackplane:
    """Lets the sessions of several processes share their watches: `Session(backplane=...)`.

    One of the sessions with the same Redis, prefix, server and key polls an execution, and the
    others take its answers. If that session ends, fails or hangs, another one polls. Wake-ups and
    callbacks reach the session that needs them, and a run that one session has started is known as
    new to all. While Redis cannot be used, each session polls for itself, and keeps what the others
    are to know.

    Args:
        url_or_client: a URL as for `redis.asyncio.Redis.from_url`, or a `redis.asyncio.Redis` of
            yours, which is not closed; each session uses up to nine of its connections.
        prefix: what all keys in Redis, and the channel, begin with.

    Raises:
        ConfigurationError: an argument is malformed.
    """

    def __init__(self, url_or_client: str | Redis, *, prefix: str = "promptlayer-exec") -> None:
        self._source = url_or_client
        if not prefix or set(prefix) & set(" {}"):
            raise ConfigurationError(f"prefix must be without spaces and braces, got {prefix!r}")
        self._prefix = prefix
        try:
            self._client()
        except (TypeError, ValueError):  # their text may have a password
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
            # A server or proxy may close idle connections. Nothing else is worth a retry.
            retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
        )

    def connect(self, client: OpenSession, namespace: str) -> RedisConnection:
        """Connect an open session; sessions call this."""
        redis = self._client()
        channel = f"{self._prefix}:1:{namespace}"
        return RedisConnection(redis, redis is not self._source, channel, client)


@attrs.define(eq=False)
class SharedWatch:
    """Takes the answers that another session polls, or polls and shares its own."""

    _connection: RedisConnection
    execution_id: int
    _read: Callable[[Response], NodeMap]
    # Names the watch in Redis; a later watch of the same session has another.
    token: str = attrs.field(init=False, factory=lambda: uuid4().hex)
    is_held: bool = attrs.field(init=False, default=False)  # the lease, as far as is known here
    is_sent: bool = attrs.field(init=False, default=False)  # so the lease is not renewed
    is_waiting: bool = attrs.field(init=False, default=False)  # for the answer of another watch
    news: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)  # set by hints
    _seen: str = attrs.field(init=False, default="")  # the version of the latest answer
    _is_alone: bool = attrs.field(init=False, default=False)
    _is_ended: bool = attrs.field(init=False, default=False)

    async def next_answer(
        self, poll: Poll, *, due: float, streams: Callable[[], bool]
    ) -> Reply[NodeMap]:
        now = asyncio.get_running_loop().time
        if not self._is_alone:
            with suppress(RedisUnavailable, RequestError):  # the latter: an answer cannot be read
                if (response := await self._wait_for_turn(streams)) is not None:
                    value, size = self._read(response), len(response.body)
                    return Reply(value, size, now(), 0.0, 0.0, None, shared=True)
            due = max(due, now())  # to wait for the others is not lateness

        try:
            reply = await poll(due=due, on_sending=self._set_sent)
        except NotFound:
            if not await self._connection.find_start(self.execution_id):
                raise
            reply = await poll(due=now(), on_sending=self._set_sent)

        self.is_sent = False
        # What is complete does not change, whoever polls.
        source = reply.value.source
        if source is not None and (self.is_held or reply.value.complete):
            with suppress(RedisUnavailable):
                await self._publish(*source)
        return reply

    def _set_sent(self, is_sent: bool) -> None:
        self.is_sent = is_sent

    async def _wait_for_turn(self, streams: Callable[[], bool]) -> Response | None:
        """Wait for an answer of another session; None: this one is to poll."""
        while True:
            self.news.clear()  # first, so that no hint is lost after the look
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

        # What is complete needs no lease any more.
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
    channel: str  # of all hints; the keys begin with its name, too
    _client: OpenSession
    _id: str = attrs.field(init=False, factory=lambda: uuid4().hex[:8])
    _is_up: bool = attrs.field(init=False, default=True)
    _slots: asyncio.Semaphore = attrs.field(init=False, factory=partial(asyncio.Semaphore, 8))
    _watches: dict[int, SharedWatch] = attrs.field(init=False, factory=dict)
    # What other sessions are to know once Redis is back.
    _kept: deque[Callable[[], Awaitable[Any]]] = attrs.field(
        init=False, factory=lambda: deque(maxlen=TERMS.most_kept)
    )

    def __attrs_post_init__(self) -> None:
        self._spawn(self._listen)
        self._spawn(self._renew_leases)

    # What the session calls.

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
        """Return True if another session has started a run that the server may not know yet."""
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

    # What the watches call.

    def hint(self, kind: str, subject: object, detail: object = "-") -> str:
        return f"{kind} {subject} {detail} {self._id}"

    def end(self, watch: SharedWatch) -> None:
        """Forget a watch that has ended; when the session closes, `aclose` does that for all."""
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
        # Even if Redis is taken for away: one that is full can still delete.
        with suppress(Exception):  # the leases run out
            async with asyncio.timeout(within):
                await self._extend(watches, 0)

    async def _extend(self, watches: Iterable[SharedWatch], seconds: float) -> list[Any]:
        """Keep the leases of watches for that many more seconds, in one round trip."""
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
        """Do something that nobody waits for, unless Redis is away or the session closes."""

        async def run() -> None:
            with suppress(RedisUnavailable):
                await work(*arguments)

        if not self._client.is_closing():
            self._client.spawn(run(), name="promptlayer_exec.Backplane")

    def _hand_on(self, work: Callable[[], Awaitable[Any]]) -> None:
        """Tell other sessions something, now or when Redis is back."""

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

        # Sessions that were back later have missed the hints.
        await asyncio.sleep(TERMS.recheck)
        for work in kept:
            self._hand_on(work)

    async def run(
        self, command: Callable[..., Awaitable[Any]], *arguments: Any, **options: Any
    ) -> Any:
        """Return what a command returns; raise `RedisUnavailable` if it fails or is late.

        It has a task of its own: on Python 3.11, redis-py may swallow a cancellation.
        """
        attempt = self._try(partial(command, *arguments, **options))
        task = self._client.spawn(attempt, name="promptlayer_exec.Backplane")
        await asyncio.wait([task])
        answer = task.result()
        if answer is None:
            raise RedisUnavailable
        return answer

    async def _try(self, command: Callable[[], Awaitable[Any]], *, is_probe: bool = False) -> Any:
        """Return what a command returns, None if it fails."""
        async with self._slots:  # to wait for it is no part of the command's second
            if self._is_up or is_probe:
                try:
                    async with asyncio.timeout(TERMS.command):
                        return await command()
                except Exception as error:  # noqa: BLE001 - whatever it is, Redis is of no use
                    self._mark_unavailable(error)
        return None

    # What goes on by itself.

    def _mark_unavailable(self, error: Exception) -> None:
        """Let each watch poll for itself, until Redis can be used again."""
        if not self._is_up:
            return
        self._is_up = False

        said = f"{type(error).__name__}: {error}".removesuffix(": ")
        _logger.warning(
            "Redis cannot be used (%.200s); until it can, this session polls for itself", said
        )

        self.release(*self._watches.values())
        self._recheck_leases()

    def _recheck_leases(self) -> None:
        """Let each waiting watch look at its lease."""
        for watch in self._watches.values():
            watch.news.set()

    async def _renew_leases(self) -> None:
        while not self._client.is_closing():
            await asyncio.sleep(TERMS.renewal)
            with suppress(RedisUnavailable):
                await self._extend_all()

    async def _extend_all(self) -> None:
        """Keep the leases of all watches that sleep, or wait for the rate."""
        watches = self._watches.values()
        held = [watch for watch in watches if watch.is_held and not watch.is_sent]
        for start in range(0, len(held), 100):  # each with a command's time
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
            except Exception as error:  # noqa: BLE001 - it would end the hints
                self._mark_unavailable(error)
            await asyncio.sleep(TERMS.pause)

    async def _drop_connections(self) -> None:
        """Have new connections made: the old ones may lead to a server that was demoted."""
        async with asyncio.timeout(TERMS.command):
            await self._redis.connection_pool.disconnect(inuse_connections=False)

    async def _probe(self) -> None:
        """Try whether Redis can be used again, by a real write: a full one answers all else."""
        if self._is_up:
            return

        arguments = (self._id, _ms(TERMS.command), "", self.channel, "")
        probe = partial(self.eval, _TURN, f"probe-{self._id}", *arguments)
        if await self._try(probe, is_probe=True) is not None:
            self._is_up = True
            _logger.info("Redis can be used again; this session shares its polls")
            self._spawn(self._hand_on_kept)

    async def _receive(self, pubsub: PubSub) -> None:
        is_pinged = False
        # The first: after an outage, hints may come from another server. The second: a cancellation
        # may be swallowed.
        while self._is_up and not self._client.is_closing():
            message = await pubsub.get_message(timeout=TERMS.command)
            if message is None:  # it is quiet, or hangs
                if is_pinged:
                    raise TimeoutError(f"no answer within {TERMS.command:g} s")
                await pubsub.ping()
            elif message["type"] == "subscribe":
                self._recheck_leases()
                self.find_callbacks()
            elif message["type"] == "message":
                try:
                    self._handle_message(*_text(message["data"]).split(" "))
                except (TypeError, ValueError) as error:
                    _logger.debug("a hint cannot be read (%s)", type(error).__name__)

            is_pinged = message is None

    def _handle_message(self, kind: str, subject: str, detail: str, sender: str) -> None:
        """Follow a hint."""
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
    """Return what stands for the token of a callback, which proves a start, in Redis."""
    return hashlib.sha256(token.encode()).hexdigest()
