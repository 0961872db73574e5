"""The `batch` commands that lead out of an item's state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import attrs
import typer

from promptlayer_exec import NotFound, RequestError, Unauthorized
from promptlayer_exec._advice import explain
from promptlayer_exec._integration import printable
from promptlayer_exec._ways_out import (
    PROGRAM,
    command_about,
    out_of_item,
    out_of_items,
    out_of_mistaken_run,
    way_state,
)
from promptlayer_exec.cli import _batch_lookup as lookup
from promptlayer_exec.cli import _batch_options as options
from promptlayer_exec.cli._exit import Misuse, Subject, command, hint, run_command, way_hints
from promptlayer_exec.cli._options import BaseUrl, Database, ExecutionId, open_session, seconds
from promptlayer_exec.cli._printing import err, quoted

if TYPE_CHECKING:
    from promptlayer_exec.dbos import Batch

# Seconds to retry a request for a run that somebody found.
_READ_WITHIN = 30.0


@command
async def recheck(
    name: options.OnlyBatch = None,
    database: Database = None,
    base_url: BaseUrl = None,
    *,
    same_server: options.SameServer = False,
) -> None:
    """Follow every run without an output again, and start none.

    This costs nothing. A batch gives up a run that it cannot read, or that does not end, but the
    run may have an output by now.
    """
    chosen, batch = await lookup.chosen_batch(name, database, base_url, same_server=same_server)
    flags = await lookup.working_flags(batch, chosen, database, base_url, same_server=same_server)
    count = await batch.recheck()
    _report(chosen, 0, count, flags)


def retry(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="KEY", help="Only the items with these keys.")
    ] = None,
    name: options.OnlyBatch = None,
    database: Database = None,
    base_url: BaseUrl = None,
    *,
    same_server: options.SameServer = False,
    failed: Annotated[bool, typer.Option("--failed", help="Start failed items again.")] = False,
    unknown: Annotated[
        bool,
        typer.Option(
            "--unknown", help="Start unknown items again. You may pay for some of them twice."
        ),
    ] = False,
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="Pay for a second run of each KEY, even if the first succeeded, or may still be"
            " running.",
        ),
    ] = False,
    is_confirmed: Annotated[
        bool, typer.Option("--yes", help="Skip the confirmation prompt of --again.")
    ] = False,
) -> None:
    """Start items again that did not succeed.

    With keys, only those items are started. Keys without an option mean --failed. If a run may
    still bring an output, it is followed again instead, for free, unless you pass --again.
    """
    wanted = _Choice(keys or [], failed, unknown, again)

    async def choose() -> tuple[str, Batch, str]:
        """Return the batch, and the options of commands about it, if the items can run again."""
        wanted.check()
        chosen, batch = await lookup.chosen_batch(name, database, base_url, same_server=same_server)
        flags = await lookup.working_flags(
            batch, chosen, database, base_url, same_server=same_server
        )
        await _check(chosen, batch, wanted, flags, lookup.command_flags(chosen, database))
        return chosen, batch, flags

    shown_flags = ""

    async def describe() -> None:
        nonlocal shown_flags
        chosen, _, shown_flags = await choose()
        count = lookup.item_count(len(wanted.keys))
        err(f"batch {printable(chosen)}: a second run of {count}, billed like the first")

    async def retry_chosen() -> None:
        chosen, batch, flags = await choose()
        undecided = await wanted.count_undecided(batch)
        count = await wanted.retry(batch)
        followed = min(undecided, count)
        _report(chosen, count - followed, followed, flags)

    if again and not is_confirmed:
        lookup.confirm(
            describe(),
            "Pay for a second run of each?",
            act="paying for a second run",
            repeat=lambda: command_about(
                "batch retry", f" --again --yes{shown_flags}", *wanted.keys
            ),
            unchanged="nothing was changed",
        )
    raise typer.Exit(run_command(retry_chosen(), Subject()))


@command
async def give_up(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="KEY", help="Only the items with these keys.")
    ] = None,
    name: options.OnlyBatch = None,
    database: Database = None,
    base_url: BaseUrl = None,
    *,
    running_for: Annotated[
        float | None,
        seconds("Only items that have been followed for this long, such as 1h.", default=False),
    ] = None,
    same_server: options.SameServer = False,
) -> None:
    """End items that the batch follows, before their runs end.

    They fail, with the ids of their runs, which continue on PromptLayer. `batch recheck` follows
    them again, for free, and `batch retry KEY --again` pays for a second run.
    """
    if not keys and running_for is None:
        raise Misuse("give the keys of items, or --running-for 1h for all that take longer")

    chosen, batch = await lookup.chosen_batch(name, database, base_url, same_server=same_server)
    flags = await lookup.working_flags(batch, chosen, database, base_url, same_server=same_server)
    count = await batch.give_up(keys or None, running_for=running_for or 0.0)
    if not count and keys:
        raise await _not_given_up(chosen, batch, keys, flags)
    if not count:
        err(f"batch {printable(chosen)}: there is no item to give up")
        return
    err(f"batch {printable(chosen)}: gave up {lookup.item_count(count)}")
    ways = out_of_items("undecided", flags)
    if keys and len(keys) == 1:
        ways = out_of_item("undecided", keys[0], flags)
    for line in way_hints(ways):
        err(line)


@command
async def adopt(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Key of an unknown item.")],
    execution_id: ExecutionId,
    name: options.OnlyBatch = None,
    database: Database = None,
    base_url: BaseUrl = None,
    *,
    same_server: options.SameServer = False,
) -> None:
    """Follow the run that you found for an unknown item, and start none.

    Look for the run in PromptLayer: its metadata has promptlayer_exec.batch and
    promptlayer_exec.key. PromptLayer's API has no metadata of a run, so this cannot check them.
    """
    chosen, batch = await lookup.chosen_batch(name, database, base_url, same_server=same_server)
    flags = await lookup.working_flags(batch, chosen, database, base_url, same_server=same_server)
    kinds = await batch.kinds([key])
    if key not in kinds:
        raise Misuse(f"batch '{printable(chosen)}' has no item {quoted(key)}")
    if kinds[key] != "unknown":
        state = "has not finished" if kinds[key] is None else f"has {kinds[key]}"
        problem = f"item {quoted(key)} {state}, and is not unknown"
        reading_flags = lookup.command_flags(chosen, database)
        raise await _with_ways(problem, batch, key, flags, reading_flags)

    async with open_session(base_url, _READ_WITHIN) as session:
        try:
            await session.execution(execution_id).snapshot()
        except NotFound as error:
            raise Misuse(explain(error)) from error
        except Unauthorized:
            raise
        except RequestError as error:  # the run exists, or nobody knows
            err(f"cannot read execution {execution_id} yet: {explain(error)}")
    try:
        is_adopted = await batch.adopt(key, execution_id)
    except ValueError as error:  # another item has this run
        ways = way_hints([*out_of_item("unknown", key, flags), out_of_mistaken_run(flags)])
        raise Misuse(printable(str(error)), hint="\n".join(ways)) from error
    if not is_adopted:
        raise await _not_adopted(batch, key)

    text = f"batch {printable(chosen)}: a worker will follow execution {execution_id} for item"
    err(lookup.work_hint(f"{text} {quoted(key)}", flags))
    watch = command_about("watch", await lookup.server_flag(batch, base_url), str(execution_id))
    check = "nothing has checked that this is the run of that item: look at its metadata in"
    err(hint(f"{check} PromptLayer, or at its nodes with:", watch))


async def _not_adopted(batch: Batch, key: str) -> Misuse:
    """Return why an item that was unknown could not adopt a run: it has one by now."""
    execution_id = await _latest_run(batch, key)
    if execution_id is None:
        return Misuse(f"item {quoted(key)} is no longer unknown")
    return Misuse(f"item {quoted(key)} has execution {execution_id} by now")


async def _latest_run(batch: Batch, key: str) -> int | None:
    """Return the id of the run that an item's latest attempt has started, or None."""
    item = await batch.item(key)
    if item is None or not item.attempts:
        return None
    return item.attempts[-1].execution_id


async def _not_given_up(name: str, batch: Batch, keys: list[str], flags: str) -> Misuse:
    """Return why no item could be given up, with the command to run next."""
    kinds = await batch.kinds(keys)
    key = next((key for key in keys if key not in kinds), None)
    if key is not None:
        return Misuse(f"batch '{printable(name)}' has no item {quoted(key)}")

    key, kind = next(iter(kinds.items()))
    if kind is not None:
        state = "is unknown" if kind == "unknown" else f"has {kind}"
        problem = f"item {quoted(key)} {state}, so there is no run to give up"
        return await _with_ways(problem, batch, key, flags)

    if await _latest_run(batch, key) is not None:
        return Misuse(f"item {quoted(key)} has not been followed for that long")
    return Misuse(
        f"item {quoted(key)} has no known run yet",
        hint=hint("start or continue it with:", f"{PROGRAM} batch work{flags}"),
    )


@attrs.frozen
class _Choice:
    """Which items to retry. Without an option, keys mean failed items."""

    keys: list[str]
    failed: bool
    unknown: bool
    again: bool

    def check(self) -> None:
        """Refuse options that do not go together."""
        is_chosen = self.failed or self.unknown
        if self.again and (is_chosen or not self.keys):
            raise Misuse("give --again with the keys of items, and without --failed or --unknown")
        if not (is_chosen or self.keys):
            raise Misuse("give --failed, --unknown, both, or the keys of failed items")

    @property
    def kinds(self) -> list[str]:
        if self.again:
            return ["succeeded", "failed", "unknown"]
        failed = self.failed or not self.unknown
        return ["failed"] * failed + ["unknown"] * self.unknown

    async def count_undecided(self, batch: Batch) -> int:
        """Return how many of the items are to be followed again, because their runs may go on."""
        if self.again or "failed" not in self.kinds:
            return 0
        if not self.keys:
            return lookup.undecided_count(await batch.failures())
        items = [await batch.item(key) for key in dict.fromkeys(self.keys)]
        return sum(item is not None and way_state(item) == "undecided" for item in items)

    async def retry(self, batch: Batch) -> int:
        if self.again:
            return await batch.retry(keys=self.keys, again=True)

        return await batch.retry(
            failed="failed" in self.kinds, unknown="unknown" in self.kinds, keys=self.keys or None
        )


async def _check(name: str, batch: Batch, wanted: _Choice, flags: str, reading_flags: str) -> None:
    """Refuse the first key whose item cannot run again, with the command to run next."""
    found = await batch.kinds(wanted.keys) if wanted.keys else {}
    for key in wanted.keys:
        if key not in found:
            raise Misuse(f"batch '{printable(name)}' has no item {quoted(key)}")
        if found[key] not in wanted.kinds:
            raise await _refusal(batch, key, flags, reading_flags)


# Why an item cannot run again, by its state.
_NOT_AGAIN = {
    "waiting": "has not finished: no run of it is known yet",
    "sending": "has not finished: no run of it is known yet",
    "following": "has not finished: the batch follows execution",
    "unknown": "is unknown: its run may have started, and you may be billed",
    "failed": "has failed, and is not unknown",
    "succeeded": "has succeeded, so there is nothing to repeat",
}


async def _refusal(batch: Batch, key: str, flags: str, reading_flags: str) -> Misuse:
    item = await batch.item(key)
    if item is None:
        return Misuse(f"there is no item {quoted(key)} by now")

    problem = f"item {quoted(key)} {_NOT_AGAIN[item.state]}"
    if item.state == "following":
        problem += f" {item.attempts[-1].execution_id}"
    return await _with_ways(problem, batch, key, flags, reading_flags)


async def _with_ways(
    problem: str, batch: Batch, key: str, flags: str, reading_flags: str | None = None
) -> Misuse:
    """Return an error about an item, with the commands to run next."""
    item = await batch.item(key)
    if item is None:
        return Misuse(problem)
    ways = out_of_item(way_state(item), key, flags, reading_flags)
    return Misuse(problem, hint="\n".join(way_hints(ways)))


def _report(batch: str, started: int, followed: int, flags: str) -> None:
    """Print how many items start again, and how many are followed again."""
    start = "starts again" if started == 1 else "start again"
    follow = "is followed again" if followed == 1 else "are followed again"
    count = lookup.item_count(started + followed)
    if not started + followed:
        err(f"batch {printable(batch)}: there is no item to run again")
        return

    if started and followed:
        text = f"{count}: {started} {start}, {followed} {follow}"
    else:
        text = f"{count} {start if started else follow}"
    err(lookup.work_hint(f"batch {printable(batch)}: {text}", flags))
