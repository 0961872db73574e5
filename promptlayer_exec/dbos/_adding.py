"""How requests become items: threads encode them, and `Addition` checks and stores them."""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from typing import Any

import attrs

from promptlayer_exec import ExecutionTimeout, InvalidInputs, Session, SessionClosed, StartRequest
from promptlayer_exec import _integration as integration
from promptlayer_exec.dbos._requests import Row, by_key, encode
from promptlayer_exec.dbos._store import Store

LONGEST_KEY = 1000


@attrs.frozen
class Portions:
    """How much work to do between two turns of the event loop.

    Attributes:
        requests: one call of a thread encodes this many. Few, because each may have megabytes.
        rows: one transaction inserts at most this many, of at most `bytes`.
    """

    requests: int = 8
    rows: int = 1000
    bytes: int = 2 * 1024 * 1024


PORTIONS = Portions()


@attrs.define(eq=False)
class Sample:
    """A request that represents all those with the same workflow, and the same inputs by type.

    Attributes:
        inputs: those of the request, in JSON form.
    """

    request: StartRequest
    inputs: dict[str, Any]


@attrs.define(eq=False)
class Addition:
    """One call of `Batch.add`, which encodes, checks and stores requests.

    Attributes:
        _open_session: opens the session that checks inputs.
        _samples: one request of each shape. Workflows require inputs by name, so checking these
            checks all.
        _sample_of: the sample with the shape of an item, by the item's key.
    """

    _store: Store
    _batch: str
    _session: Session
    _open_session: Callable[[], AbstractAsyncContextManager[Session]]
    _samples: dict[Hashable, Sample] = attrs.field(init=False, factory=dict)
    _sample_of: dict[str, Sample] = attrs.field(init=False, factory=dict)

    async def add_all(
        self, requests: Iterable[StartRequest], *, before: Callable[[], Awaitable[None]]
    ) -> int:
        """Check all items, then add them, and return how many were new.

        It calls `before` after encoding all, and before it reads or writes anything.
        """
        rows: dict[str, Row] = {}
        async with aclosing(self._encode(requests)) as portions:
            async for portion in portions:
                by_key(self._batch, portion, rows)
        await before()
        return await self._add(rows)

    async def add_as_they_come(self, requests: AsyncIterable[StartRequest]) -> int:
        """Check and add items in portions, and return how many were new."""
        new, size = 0, 0
        rows: dict[str, Row] = {}
        async with aclosing(self._encode(requests)) as portions:
            async for portion in portions:
                by_key(self._batch, portion, rows)
                size += sum(len(row.request) for row in portion)
                if len(rows) >= PORTIONS.rows or size >= PORTIONS.bytes:
                    new += await self._add(rows)
                    rows, size = {}, 0
        return new + await self._add(rows)

    async def _encode(
        self, requests: Iterable[StartRequest] | AsyncIterable[StartRequest]
    ) -> AsyncGenerator[list[Row], None]:
        async with aclosing(integration.each(requests)) as incoming:
            portion: list[StartRequest] = []
            async for request in incoming:
                portion.append(request)
                if len(portion) == PORTIONS.requests:
                    yield await self._store.run_in_thread(self._rows, portion)
                    portion = []
            yield await self._store.run_in_thread(self._rows, portion)

    def _rows(self, requests: Iterable[StartRequest]) -> list[Row]:
        return [self._row(request) for request in requests]

    def _row(self, request: StartRequest) -> Row:
        if not isinstance(request, StartRequest):
            raise TypeError(f"batch item must be a StartRequest, got {request!r:.100}")
        if not isinstance(request.key, str):
            raise TypeError(f"item key must be a str, got {request.key!r:.100}")
        check_text("item key", request.key, LONGEST_KEY, ValueError)

        inputs = integration.encode_inputs(self._session, request)
        row = encode(request, inputs)
        kinds = frozenset((name, type(value)) for name, value in inputs.items())
        shape = (request.workflow, request.label, request.version, kinds)
        self._sample_of[row.key] = self._samples.setdefault(shape, Sample(request, inputs))
        return row

    async def _add(self, rows: dict[str, Row]) -> int:
        """Check rows, and store the new ones, and return how many were new."""
        if not rows:
            return 0
        known = await self._store.run_in_thread(self._store.check, self._batch, rows.values())
        fresh = [row for row in rows.values() if row.key not in known]
        await self._check_inputs(fresh)

        new = 0
        for portion in _portions(fresh):
            new += await self._store.run_in_thread(self._store.add, self._batch, portion)
        for key in rows:
            del self._sample_of[key]
        return new

    async def _check_inputs(self, rows: list[Row]) -> None:
        """Raise `InvalidInputs` if inputs that a workflow requires are missing.

        It does not check known items, because their workflow may have changed since.
        """
        settings = integration.settings(self._session)
        has_key = integration.server_of(self._session)[1] is not None
        if not (rows and settings.check_inputs and has_key):
            return

        # The first item of each sample, by the definition that it needs.
        keys: dict[Hashable, dict[Sample, str]] = {}
        for row in rows:
            sample = self._sample_of[row.key]
            request = sample.request
            of_definition = keys.setdefault((request.workflow, request.label, request.version), {})
            of_definition.setdefault(sample, row.key)

        async with self._open_session() as session:
            # In parallel: if the server is down, each definition takes seconds.
            checks = [_check(session, samples) for samples in keys.values()]
            for error in await asyncio.gather(*checks):
                if error is not None:
                    raise error


async def _check(session: Session, samples: Mapping[Sample, str]) -> InvalidInputs | None:
    """Check samples that need the same definition, and return the first error."""
    for sample, key in samples.items():
        try:
            await integration.check_inputs(session, sample.request, sample.inputs)
        except InvalidInputs as error:
            text = f"nothing was added, because of item {key!r:.100}: {error.args[0]}"
            return InvalidInputs(text, missing=error.missing)
        except (SessionClosed, ExecutionTimeout):  # the worker checks them before it starts them
            break
    return None


def _portions(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield rows in portions for one transaction each."""
    portion: list[Row] = []
    size = 0
    for row in rows:
        portion.append(row)
        size += len(row.request)
        if len(portion) >= PORTIONS.rows or size >= PORTIONS.bytes:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def check_text(what: str, text: Any, longest: int, error: type[ValueError]) -> str:
    with suppress(UnicodeEncodeError):
        if isinstance(text, str) and 1 <= len(text.encode()) <= longest and "\0" not in text:
            return text
    raise error(f"{what} must be 1 to {longest} bytes of text without NUL, got {text!r:.100}")
