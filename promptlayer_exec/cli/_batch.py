"""Durable batches: what the `batch` commands do."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import attrs

from promptlayer_exec import RetryPolicy, Session

from ._batch_lines import Inputs, Results
from ._batch_progress import BatchProgress, Failures, counted, items
from ._ending import ExitCode, Misuse, Subject
from ._session import open_session
from ._streams import err, out
from ._text import printable

if TYPE_CHECKING:
    from promptlayer_exec.dbos import Batch, StoredOutcome

_REFRESH = 0.25
_SQLITE = "sqlite:///"
_GO_ON = "no item is lost: give the same command again to go on"


@dataclass(frozen=True)
class Settings:
    """What `batch run` and `batch work` have in common.

    Attributes:
        database: its URL.
        base_url: the server, if not the one from the environment.
        max_in_flight: how many items are under way at most, over all workers.
        rate: requests per second at most, over all workers.
        outage: seconds for which a server in trouble is asked again.
        restart_unknown: whether to start those again of which nobody knows.
    """

    database: str
    base_url: str | None
    max_in_flight: int
    rate: float
    outage: float
    restart_unknown: bool


async def run_batch(
    name: str,
    path: Path,
    workflow: str | None,
    results: Path | None,
    *,
    settings: Settings,
    subject: Subject,
) -> ExitCode:
    """Add a file's items to a batch, work on it, and write the outcomes."""
    inputs = Inputs(path, workflow)
    with closing(Results(results)) as lines:
        progress = BatchProgress()
        batch = _batch(name, settings)
        try:
            new = await batch.add(inputs)
        except (TypeError, ValueError) as error:
            raise Misuse(str(error)) from error
        subject.remark = _GO_ON
        known = f", {inputs.count - new} of them known already" if new < inputs.count else ""
        err(f"batch {printable(name)}: {items(inputs.count)}{known}")
        if await _has_nothing_to_do(batch, settings):
            err("all of them ended before: to run them again, give the batch another --name")
        with progress.shown(), _outages_told(progress):
            await _together(batch.work(), _follow(batch, progress), _write(batch.outcomes(), lines))
    return await _conclude(name, batch)


async def work_on_batch(name: str | None, settings: Settings, subject: Subject) -> ExitCode:
    """Work on a batch that is there."""
    name = _chosen(name, await _names(settings.database))
    subject.remark = _GO_ON
    progress = BatchProgress()
    batch = _batch(name, settings)
    with progress.shown(), _outages_told(progress):
        await _together(batch.work(), _follow(batch, progress))
    return await _conclude(name, batch)


async def show_status(name: str | None, database: str, *, as_json: bool) -> ExitCode:
    """Print how far the batches of a database are."""
    names = await _names(database)
    for each in names if name is None else [_chosen(name, names)]:
        status = await _extra().Batch(each, database_url=database, session=Session).status()
        fields = {"batch": each} | attrs.asdict(status)
        out(json.dumps(fields) if as_json else counted(each, status))
    return ExitCode.SUCCEEDED


async def _has_nothing_to_do(batch: "Batch", settings: Settings) -> bool:
    status = await batch.status()
    restarted = status.unknown if settings.restart_unknown else 0
    return status.finished - restarted == status.total


class _Teller(logging.Handler):
    """Tells what the log warns of: of an outage once, however many requests fail in it."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(printable(record.getMessage()))


@contextmanager
def _outages_told(progress: BatchProgress) -> Iterator[None]:
    log, teller = logging.getLogger("promptlayer_exec"), _Teller(progress.warn)
    log.addHandler(teller)
    try:
        yield
    finally:
        log.removeHandler(teller)


def _extra() -> ModuleType:
    try:
        from promptlayer_exec import dbos  # noqa: PLC0415 - an extra of its own
    except ModuleNotFoundError as error:
        raise Misuse(
            "batches need the extra dbos: pip install 'promptlayer-exec[cli,dbos]'"
        ) from error
    return dbos


def _batch(name: str, settings: Settings) -> "Batch":
    def session() -> Session:
        retry = RetryPolicy(outage=settings.outage, watch_outage=settings.outage)
        return open_session(settings.base_url, retry)

    session()  # so that a missing key is told before anything is stored
    batch: Batch = _extra().Batch(
        name,
        database_url=settings.database,
        session=session,
        max_in_flight=settings.max_in_flight,
        rate=settings.rate,
        restart_unknown=settings.restart_unknown,
    )
    return batch


def _check_there(database: str) -> None:
    """Keep a question from making an empty file."""
    if database.startswith(_SQLITE) and not Path(database.removeprefix(_SQLITE)).exists():
        raise Misuse(f"there is no database {printable(database)}")


async def _names(database: str) -> list[str]:
    _check_there(database)
    names: list[str] = await _extra().batch_names(database)
    return names


def _chosen(name: str | None, names: list[str]) -> str:
    if name is None and len(names) == 1:
        return names[0]
    if name in names:
        return name
    known = ", ".join(map(printable, names)) or "none"
    what = "give --name" if name is None else f"there is no batch '{printable(name)}'"
    raise Misuse(f"{what}: the database has {known}")


async def _together(*works: Coroutine[Any, Any, object]) -> None:
    """Do works until the first has ended that must not go on alone, or fails."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        task.result()


async def _follow(batch: "Batch", progress: BatchProgress) -> None:
    while True:
        status = await batch.status()
        progress.show(status)
        if status.finished == status.total:
            return
        await asyncio.sleep(_REFRESH)


async def _write(outcomes: "AsyncGenerator[StoredOutcome, None]", lines: Results) -> None:
    async with aclosing(outcomes):
        async for outcome in outcomes:
            lines.write(outcome)


async def _conclude(name: str, batch: "Batch") -> ExitCode:
    failures = Failures()
    async with aclosing(batch.outcomes()) as outcomes:
        async for outcome in outcomes:
            failures.see(outcome)
    status = await batch.status()
    err(counted(name, status))
    for line in failures.lines():
        err(line)
    if status.unknown:
        err(
            "unknown: nobody knows whether these runs were started, and billed: look in"
            " PromptLayer, then start them again with --restart-unknown, or leave them"
        )
    return ExitCode.SUCCEEDED if status.succeeded == status.total else ExitCode.FAILED
