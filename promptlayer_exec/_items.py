"""The items of a session's fan-outs: ids, handles and requests, and the outcomes of them all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from contextlib import aclosing
from functools import partial
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from promptlayer_exec._engine.tasks import clock, is_cancelled
from promptlayer_exec._execution import Execution
from promptlayer_exec._fanout import Outcome, RunningItem, Spawn, fan_out, report_abandoned
from promptlayer_exec._models import StartRequest
from promptlayer_exec._output import check_type
from promptlayer_exec._policies import check_timeout
from promptlayer_exec._settings import check_count

if TYPE_CHECKING:
    from promptlayer_exec._session import Session

ItemT = TypeVar("ItemT")


def outcomes_of(
    session: Session,
    items: Iterable[ItemT] | AsyncIterable[ItemT],
    *,
    max_in_flight: int,
    timeout: float | EllipsisType | None,
    into: Any,
) -> AsyncGenerator[Outcome[ItemT, Any], None]:
    """Do what `Session.as_completed` does."""
    if not isinstance(items, Iterable | AsyncIterable):
        raise TypeError(f"items must be an iterable or async iterable, not {items!r:.100}")
    if into is not None:
        check_type(into, session._settings.converter)
    timeout = check_timeout(timeout)

    async def open_client() -> Spawn:
        return (await session._open()).lifetime.spawn

    async def run_item(running: RunningItem[ItemT]) -> Any:
        item, execution = running.item, None
        if not isinstance(item, StartRequest):
            execution = running.execution = _handle(session, item)
        if is_cancelled():  # before it began; its error has the id all the same
            raise asyncio.CancelledError
        deadline = session._settings.deadline(timeout, now=clock())
        if isinstance(item, StartRequest):
            began = partial(setattr, running, "start")
            execution = running.execution = await session._start(item, deadline, began=began)
        return await cast(Execution, execution)._output(deadline, into)

    return fan_out(
        items,
        run_item,
        max_in_flight=check_count("max_in_flight", max_in_flight),
        open_client=open_client,
    )


async def collected(
    completed: AsyncGenerator[Outcome[ItemT, Any], None],
) -> list[Outcome[ItemT, Any]]:
    """Return all outcomes in the order of the items; if that fails, no started run is lost."""
    outcomes = []
    try:
        async with aclosing(completed):
            async for outcome in completed:
                outcomes.append(outcome)  # noqa: PERF401 - not inside of aclosing
    except BaseException:
        for outcome in outcomes:
            report_abandoned(outcome)
        raise
    return sorted(outcomes, key=lambda outcome: outcome.index)


def _handle(session: Session, item: Any) -> Execution:
    """Return the handle of an item that is not a `StartRequest`."""
    if not isinstance(item, Execution):
        try:
            return session.execution(item)
        except TypeError:
            raise TypeError(
                "an item must be an execution id, an Execution or a StartRequest,"
                f" not {item!r:.100}"
            ) from None
    if item._session is None:  # it was unpickled
        return Execution(session, item.id, item.workflow, item.warning)
    if item._session is not session:
        raise ValueError(f"execution {item.id} belongs to another session: pass its id instead")
    return item
