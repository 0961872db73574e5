"""Sends with a key: each happens once across all processes that share a store. No HTTP."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar
from uuid import uuid4

import attrs

from promptlayer_exec._api.runs import NewRun
from promptlayer_exec._engine.abandoned import warn_of_run
from promptlayer_exec._engine.lifetime import DeadlinePassed, Lifetime
from promptlayer_exec._engine.send import (
    AlreadyClaimed,
    PreparedSend,
    SendHooks,
    SendOutcome,
    report_unrecorded,
    start_unknown,
)
from promptlayer_exec._engine.tasks import clock
from promptlayer_exec._values.errors import (
    ConfigurationError,
    ExecutionTimeout,
    KeyConflict,
    SessionClosed,
    StartUnknown,
    StoreUnavailable,
)
from promptlayer_exec._values.events import logger
from promptlayer_exec._values.models import StartRequest
from promptlayer_exec._values.policies import Deadline
from promptlayer_exec._values.start_records import (
    KEY_METADATA,
    StartClaim,
    StartStore,
    StoredStart,
    differences,
    fingerprint,
)
from promptlayer_exec._values.text import short_repr

T = TypeVar("T")


@attrs.frozen
class _RecordPolicy:
    """How long to wait for the store to record the result of a request, in seconds.

    If the id is not in the database by `until_reported`, it goes to the log. At `until_delivered`,
    the caller gets the handle. Recording continues in the background until the session closes,
    which tries once more.
    """

    until_reported: float = 1.0
    until_delivered: float = 5.0
    between_tries: float = 0.5


_RECORD = _RecordPolicy()
_OTHER_CALL = "another call is starting the run for key {key}, and got no response"
_SILENT_STORE = "the store did not respond for key {key}"


def with_key(request: StartRequest) -> StartRequest:
    """Return a request whose run has its key as metadata. The caller's own entries stay."""
    metadata: Any = request.metadata or {}
    if not isinstance(metadata, Mapping):
        return request  # encoding it explains the mistake
    return attrs.evolve(request, metadata={**metadata, KEY_METADATA: request.key})


async def ask_store(call: Awaitable[T]) -> T:
    """Await a call of a store, which may be an app's own, and return its result.

    Raises:
        StoreUnavailable: the call raised it, or any other error.
        ConfigurationError, KeyConflict: the call raised it.
    """
    try:
        return await call
    except (StoreUnavailable, ConfigurationError, KeyConflict):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise StoreUnavailable(f"the store of keys failed: {what}") from error


async def _before_sending(call: Awaitable[T]) -> T:
    """Do the same for a call before the request, whose errors tell that nothing was started."""
    try:
        return await ask_store(call)
    except (StoreUnavailable, ConfigurationError) as error:
        found = copy.copy(error)  # other callers may get the same one
        found._add_context("this call started nothing")
        raise found from error


@attrs.frozen
class _Sending:
    """A request of this session that has no result yet."""

    token: str
    over: asyncio.Event = attrs.field(factory=asyncio.Event)


@attrs.define(eq=False, kw_only=True)
class RecordedSends:
    """Sends the request of each key once: it asks the store first, and sends if nobody else has.

    The row in the store decides between processes. Within a session, calls with the same key share
    one lookup or one request.
    """

    _store: StartStore
    _server: str
    _request_timeout: float
    _is_recoverable: Callable[[str], bool]  # whether a token's callback can reach us
    _called_back: Callable[[str], int | None]  # the id in a token's callback, if we received it
    _lifetime: Lifetime
    _sending: dict[str, _Sending] = attrs.field(init=False, factory=dict)
    _learning: dict[str, _Write] = attrs.field(init=False, factory=dict)  # by token
    _looking_up: dict[str, asyncio.Task[StoredStart | None]] = attrs.field(init=False, factory=dict)

    def claim(self, prepared: PreparedSend) -> StartClaim:
        """Return the claim that a request with a key makes."""
        request = prepared.request
        key: str = request.key
        asked_for = fingerprint(
            key,
            workflow=request.workflow,
            inputs=prepared.inputs,
            label=request.label,
            version=request.version,
            metadata=request.metadata,
        )
        # If the caller chose the callback URL, no callback comes to this session.
        token = prepared.secret or uuid4().hex
        return StartClaim(key, token, self._server, asked_for, self._request_timeout)

    async def settled(
        self, key: str, deadline: Deadline, claim: StartClaim | None = None
    ) -> StoredStart | None:
        """Return the record of the run that a key has started, or None if nobody has sent it.

        While another call is sending the request, it waits for that call. `claim` is that of the
        request to send if nobody has.

        Raises:
            KeyConflict: the key belongs to a different request, or to another server.
            StartUnknown: the key may have started a run, but its response was lost.
            ExecutionTimeout: the call that is sending it has no response yet. This one sent
                nothing.
            StoreUnavailable: the store is unavailable, so no run was started.
        """
        pause = 0.02
        while True:
            record = await self._find(key, deadline)
            if record is not None:
                record = self._with_callback(record)
                self._check(record, claim)

            if record is not None and record.state == "started":
                return record
            if record is not None and record.state == "sending":
                await self._wait(key, deadline, asyncio.sleep(pause), _OTHER_CALL)
                pause = min(2 * pause, 0.5)
            elif key not in self._sending:  # another call may have begun meanwhile
                return None

    @contextmanager
    def sending(self, claim: StartClaim) -> Iterator[SendHooks]:
        """Yield the hooks that claim a key and record its run, while this session sends it.

        Other calls with the key wait. If another process is quicker, sending raises
        `AlreadyClaimed`.
        """
        sending = self._sending[claim.key] = _Sending(claim.token)
        try:
            yield _RecordedSend(self._store, claim, self._lifetime)
        finally:
            del self._sending[claim.key]
            sending.over.set()

    def learn(self, token: str, execution_id: int, key: str | None = None) -> _Write:
        """Tell the store, in the background, the id of a run that a callback named."""
        write = self._learning.get(token)
        if write is not None:
            return write

        async def resolve() -> None:
            await self._store.resolve(token, execution_id)

        subject = "a run that called back" if key is None else f"the key {key!r}"
        write = self._learning[token] = _Write(resolve, subject, execution_id)
        writing = write.spawn(self._lifetime)
        writing.add_done_callback(lambda _: self._learning.pop(token, None))
        return write

    async def learn_now(self, token: str, execution_id: int, key: str, deadline: Deadline) -> None:
        """Do the same, and return once the store has it, failed once, or the deadline passed."""
        write = self.learn(token, execution_id, key)
        with suppress(DeadlinePassed, SessionClosed):  # the caller has its run
            async with self._lifetime.call(deadline):
                await write.tried.wait()

    async def wait_for_callback(
        self, key: str, token: str, receive: Callable[[str, int], object]
    ) -> None:
        """Watch a record until any process has received the callback with the id of its run."""
        while True:
            with suppress(StoreUnavailable, ConfigurationError):  # the store may come back
                record = await ask_store(self._store.find(key))
                if record is None or token not in (record.token, record.earlier_token):
                    return  # somebody forgot it, or started it again
                if record.execution_id is not None:
                    receive(token, record.execution_id)
                    return
            await asyncio.sleep(0.5)

    async def _find(self, key: str, deadline: Deadline) -> StoredStart | None:
        """Return the record of a key, once no call of this session is sending its request."""
        while (sending := self._sending.get(key)) is not None:
            if self._called_back(sending.token) is not None:  # then there is nothing to wait for
                break
            await self._wait(key, deadline, sending.over.wait(), _OTHER_CALL)

        looking_up = self._looking_up.get(key)
        if looking_up is None:
            looking_up = self._lifetime.spawn(
                self._look_up(key), name="promptlayer_exec.RecordLookup"
            )
            self._looking_up[key] = looking_up
            looking_up.add_done_callback(partial(self._looked_up, key))

        await self._wait(key, deadline, asyncio.wait([looking_up]), _SILENT_STORE)
        try:
            return looking_up.result()
        except (StoreUnavailable, ConfigurationError) as error:
            raise copy.copy(error) from error  # other callers get the same one

    async def _look_up(self, key: str) -> StoredStart | None:
        return await _before_sending(self._store.find(key))

    def _looked_up(self, key: str, looking_up: asyncio.Task[StoredStart | None]) -> None:
        del self._looking_up[key]
        if not looking_up.cancelled():
            looking_up.exception()  # marks it as retrieved, because all callers may be gone

    async def _wait(
        self,
        key: str,
        deadline: Deadline,
        what: Coroutine[Any, Any, object],
        reason_if_late: str,
    ) -> None:
        """Wait for something until the deadline. The reason then becomes the error's text."""
        try:
            async with self._lifetime.call(deadline):
                await what
        except DeadlinePassed:
            timeout = deadline.timeout or 0.0
            reason = reason_if_late.format(key=short_repr(key))
            raise ExecutionTimeout(
                f"{reason} within {timeout:g} s, so this call sent nothing",
                timeout=timeout,
            ) from None
        finally:
            what.close()

    def _with_callback(self, record: StoredStart) -> StoredStart:
        """Return a record with the id of its run, if we received its callback before the store."""
        if record.state == "started":
            return record
        for token in filter(None, (record.token, record.earlier_token)):
            if (execution_id := self._called_back(token)) is not None:
                self.learn(token, execution_id, record.key)
                return attrs.evolve(record, state="started", execution_id=execution_id)
        return record

    def _check(self, record: StoredStart, claim: StartClaim | None) -> None:
        """Raise an error if a record belongs to another request, or to one that may be lost."""
        key = short_repr(record.key)
        if record.server != self._server:
            raise KeyConflict(
                f"the key {key} belongs to a run on another server, {record.server}, so nothing was"
                " sent",
                advice="Use another key.",
                key=record.key,
            )

        if claim is not None and (differing := differences(record.request, claim.request)):
            raise KeyConflict(
                f"the key {key} belongs to a different request (changed: {', '.join(differing)}),"
                " so nothing was sent",
                key=record.key,
            )

        may_be_replaced = record.replaceable and claim is not None
        if record.state == "unknown" and not may_be_replaced:
            error = start_unknown(
                record.workflow,
                "an earlier call got no response, or its process died before it could record one,"
                " so this call sent nothing",
                record.token if self._is_recoverable(record.token) else None,
                key=record.key,
            )
            error.is_key_stored = True
            raise error


@attrs.define(eq=False)
class _RecordedSend:
    """The hooks of one send: they claim its key, and record or release it."""

    _store: StartStore
    _claim: StartClaim
    _lifetime: Lifetime
    _may_be_claimed: bool = attrs.field(init=False, default=False)
    _writing: asyncio.Task[None] | None = attrs.field(init=False, default=None)

    async def before_send(self) -> None:
        if self._writing is not None and not self._writing.done():
            # An earlier attempt could not release its claim yet, which would undo this one.
            raise StoreUnavailable("this call started nothing: the store of keys is unavailable")

        self._may_be_claimed = True
        in_the_way = await _before_sending(self._store.claim(self._claim))
        if in_the_way is not None:
            self._may_be_claimed = False
            raise AlreadyClaimed

    async def not_sent(self) -> None:
        if self._may_be_claimed:
            await self._persist(self._release)

    async def ended(self, outcome: SendOutcome) -> None:
        """Record the result of the request, and return once that is done or takes too long."""
        if isinstance(outcome, NewRun):
            execution_id = outcome.execution_id
            await self._persist(lambda: self._record(execution_id), execution_id)
        elif isinstance(outcome, StartUnknown):
            outcome.is_key_stored = True
            await self._persist(lambda: self._record(None))
        elif self._may_be_claimed:
            # If the claim failed, the caller has already waited for the store long enough.
            failures = StoreUnavailable | ConfigurationError | ExecutionTimeout | SessionClosed
            has_failed = isinstance(outcome, failures)
            await self._persist(self._release, wait=not has_failed)

    async def _persist(
        self,
        call: Callable[[], Awaitable[None]],
        execution_id: int | None = None,
        *,
        wait: bool = True,
    ) -> None:
        """Write to the store, in the background if the store is unavailable."""
        write = _Write(call, f"the key {self._claim.key!r}", execution_id)
        self._writing = write.spawn(self._lifetime)
        if wait:
            await asyncio.wait([self._writing], timeout=_RECORD.until_delivered)

    async def _record(self, execution_id: int | None) -> None:
        claim = self._claim
        recorded = await self._store.record(claim.key, claim.token, execution_id)
        if not recorded and execution_id is not None:
            warn_of_run(
                "execution %d started for the key %.100r, which now belongs to another run."
                " session.execution(%d) picks it up",
                execution_id,
                claim.key,
                execution_id,
            )

    async def _release(self) -> None:
        claim = self._claim
        await self._store.release(claim.key, claim.token)
        self._may_be_claimed = False


@attrs.define(eq=False)
class _Write:
    """A write to the store, retried until it succeeds or the session has closed.

    Attributes:
        tried: set once the write has succeeded or failed for the first time.
    """

    _call: Callable[[], Awaitable[None]]
    _subject: str  # what it is about, such as "the key 'order-42'"
    _execution_id: int | None
    tried: asyncio.Event = attrs.field(init=False, factory=asyncio.Event)
    _try: asyncio.Timeout | None = attrs.field(init=False, default=None)
    _is_closing: bool = attrs.field(init=False, default=False)
    _is_reported: bool = attrs.field(init=False, default=False)

    def spawn(self, lifetime: Lifetime) -> asyncio.Task[None]:
        """Begin to write."""
        if lifetime.is_closing():
            self.close()  # closing the session waits for this one
        return lifetime.spawn(self.run(), name="promptlayer_exec.Record", cancel=self.close)

    def close(self) -> None:
        """Allow only one more try."""
        if not self._is_closing:
            self._is_closing = True
            if self._try is not None:
                self._try.reschedule(clock())

    async def run(self) -> None:
        """Write to the store. If that takes a while or fails, report the execution's id."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(_RECORD.until_reported, self._report)
        try:
            await self._repeat()
        finally:
            self._try = None
            self.tried.set()
            timer.cancel()

    async def _repeat(self) -> None:
        while True:
            is_last = self._is_closing
            try:
                async with asyncio.timeout(None) as self._try:
                    error = await self._failure()
                    if error is None:
                        return
                    self.tried.set()
                    if not is_last:
                        await asyncio.sleep(_RECORD.between_tries)
            except TimeoutError:
                continue  # the session is closing
            except asyncio.CancelledError:
                # The event loop is stopping, and the session with it.
                self._is_closing = True
                error = SessionClosed()

            if is_last:
                text = "could not update the record of %.500s, so you must adopt or forget it: %s"
                logger.error(text, self._subject, error)
                self._report()
                return

    async def _failure(self) -> Exception | None:
        try:
            await self._call()
        except Exception as error:  # noqa: BLE001 - it may be an app's own store
            return error
        return None

    def _report(self) -> None:
        if self._execution_id is not None and not self._is_reported:
            self._is_reported = True
            report_unrecorded(self._execution_id, self._subject)
