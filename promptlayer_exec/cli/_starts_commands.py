"""The `starts` commands: which run each key has started, and what to do about an unknown one."""

from __future__ import annotations

import json
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promptlayer_exec import Session
from promptlayer_exec import _integration as integration
from promptlayer_exec._integration import KEY_METADATA, printable
from promptlayer_exec._ways_out import (
    PROGRAM,
    WayOut,
    command_about,
    database_option,
    is_usual_database,
    out_of_key,
)
from promptlayer_exec.cli import _options as options
from promptlayer_exec.cli._batch_lookup import confirm
from promptlayer_exec.cli._exit import Misuse, Subject, command, hint, run_command, way_hints
from promptlayer_exec.cli._help import Program, help_epilog
from promptlayer_exec.cli._printing import err, out, out_record, quoted, utc_time

if TYPE_CHECKING:
    from promptlayer_exec.starts import SQLStartStore, StoredStart

starts_app = Program(help="List the runs of keys, and settle keys whose run is unknown.")

Key = Annotated[
    str, typer.Argument(metavar="KEY", parser=options.parse_key, help="The key, as of `run --key`.")
]
OlderThan = Annotated[
    float, options.seconds("Only keys that have not changed for this long, such as 1h.")
]
_CHECK = "Check --db or PROMPTLAYER_EXEC_DB"
Unknown = Annotated[bool, typer.Option("--unknown", help="Only keys whose run is unknown.")]


@starts_app.command("list", epilog=help_epilog("starts list --unknown --older-than 1h"))
@command
async def _list(
    database: options.Database = None,
    *,
    unknown: Unknown = False,
    older_than: OlderThan = 0.0,
    as_json: options.JsonLines = False,
) -> None:
    """List the keys in a database, each with the command to run next.

    A key is `sending` while the response may still come, `started` once its run is known, and
    `unknown` if the response was lost.
    """
    count, unsettled = 0, 0
    if _exists(database):
        async with _open_store(database) as store:
            listed = store.unknown if unknown else store.records
            async with aclosing(listed(older_than=older_than)) as records:
                async for record in records:
                    count += 1
                    unsettled += record.state == "unknown"
                    if as_json:
                        out(_json_line(record, database))
                    else:
                        out_record(_line(record), _way_out(record, database))

    elif database is not None:
        raise Misuse(f"there is no file {_path(database).absolute()}. {_CHECK}")

    if not count:
        what = "unknown key" if unknown else "key"
        err(f"there is no {what} in {_where(database)}")
    if unsettled and not as_json:
        err(
            hint(
                f"{unsettled} unknown: each may have started a run, and you may be billed. In"
                f" PromptLayer, search for the metadata {KEY_METADATA} = KEY among the runs of"
                " the time when it was sent. If the run is there, adopt it with the command of its"
                " key. If it is not, forget the key, and start it again:",
                f"{PROGRAM} starts forget KEY...{_database_option(database)}",
            )
        )


@starts_app.command("show", epilog=help_epilog("starts show order-42"))
@command
async def _show(
    key: Key, database: options.Database = None, *, as_json: options.JsonLines = False
) -> None:
    """Print what a key has started, and what to do next (UTC)."""
    async with _open_store(database) as store:
        record = await _record(store, key, database)
    if as_json:
        out(_json_line(record, database))
        return

    out(f"key {printable(key)}: {record.state}")
    out(f"  workflow: {printable(str(record.workflow))}")
    out(f"  server: {printable(record.server)}")
    out(f"  sent: {utc_time(record.created)}")
    if record.attempts > 1:
        out(f"  attempts: {record.attempts}")
    out(f"  {record.state} since: {utc_time(record.updated)}")
    if record.execution_id is not None:
        out(f"  execution: {record.execution_id}")
    if record.reason is not None:
        out(f"  why: {record.reason}")
    for line in _way_lines(record, database):
        err(line)


@starts_app.command("adopt", epilog=help_epilog("starts adopt order-42 787"))
@command
async def _adopt(
    key: Key,
    execution_id: options.ExecutionId,
    database: options.Database = None,
    base_url: options.BaseUrl = None,
) -> None:
    """Record the run that you found for an unknown key, and start none.

    From then on, each start with the key returns this run. The command reads the run once, to check
    that it exists.
    """
    async with _open_store(database) as store:
        record = await _record(store, key, database)
        if record.state == "unknown":
            async with options.open_session(base_url or record.server, None) as session:
                await session.get_results(execution_id)
        try:
            is_adopted = await store.adopt(key, execution_id)
        except ValueError as error:
            raise Misuse(f"{error}, so nothing was changed") from error
        record = await _record(store, key, database)

    if not is_adopted:
        problem = f"the key {quoted(key)} is {record.state}"
        if record.execution_id is not None:
            problem = f"the key {quoted(key)} has started execution {record.execution_id}"
        raise Misuse(
            f"{problem}, so nothing was changed",
            hint=hint("go on with:", _way_out(record, database)),
        )
    err(
        hint(
            f"execution {execution_id} is the run of key {quoted(key)} now. Follow it with:",
            _way_out(record, database),
        )
    )


@starts_app.command(
    "forget",
    epilog=help_epilog("starts forget order-42", "starts forget --unknown --older-than 1d"),
)
def _forget(
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY", parser=options.parse_key, help="Only these keys."),
    ] = None,
    database: options.Database = None,
    *,
    unknown: Unknown = False,
    older_than: OlderThan = 0.0,
    is_confirmed: Annotated[
        bool, typer.Option("--yes", help="Skip the confirmation prompt.")
    ] = False,
) -> None:
    """Forget keys, so that the next start with each pays for a new run.

    A run that they have started keeps running, and is billed. So first look for it in PromptLayer,
    and adopt it if it is there.
    """
    chosen: list[StoredStart] = []

    async def choose() -> None:
        chosen[:] = await _chosen(keys or [], database, unknown=unknown, older_than=older_than)

    async def describe() -> None:
        await choose()
        for record in chosen:
            err(_line(record))

    async def forget() -> None:
        if is_confirmed:
            await choose()
        await _forget_all(chosen, database)

    if not is_confirmed:
        flags = f" --yes{_database_option(database)}"
        repeat = f"{PROGRAM} starts forget --unknown --older-than {older_than:g}{flags}"
        if keys:
            repeat = command_about("starts forget", flags, *keys)
        confirm(
            describe(),
            "Forget these keys, although each may have a run that you pay for?",
            act="forgetting keys",
            repeat=lambda: repeat,
            unchanged="nothing was forgotten",
        )
    raise typer.Exit(run_command(forget(), Subject()))


async def _chosen(
    keys: list[str], database: str | None, *, unknown: bool, older_than: float
) -> list[StoredStart]:
    """Return the records to forget."""
    if bool(keys) == unknown:
        raise Misuse("name the keys to forget, or give --unknown")
    if older_than and not unknown:
        raise Misuse("--older-than needs --unknown")
    if not _exists(database):
        raise Misuse(f"there is no key in {_where(database)}")

    async with _open_store(database) as store:
        if unknown:
            return [record async for record in store.unknown(older_than=older_than)]
        records = [await _record(store, key, database) for key in dict.fromkeys(keys)]

    for record in records:
        if record.state == "sending":
            raise Misuse(
                f"the start request of key {quoted(record.key)} is still on its way, so nothing was"
                " forgotten",
                hint=hint("see what becomes of it with:", _way_out(record, database)),
            )
    return records


async def _forget_all(chosen: list[StoredStart], database: str | None) -> None:
    if not chosen:
        err("there is no unknown key to forget")
        return

    count = 0
    async with _open_store(database) as store:
        for record in chosen:
            # A callback may have settled it meanwhile.
            count += await store.forget(record.key, only_unknown=record.state == "unknown")

    which = "it" if count == 1 else "any of them"
    err(f"forgot {_count(count)}. The next start with {which} pays for a new run")
    runs = [record.execution_id for record in chosen if record.state == "started"]
    if runs:
        err(f"these runs had started, and remain on PromptLayer: {', '.join(map(str, runs))}")
    if count < len(chosen):
        err(f"kept {_count(len(chosen) - count)}, whose run has become known meanwhile")


def _open_store(database: str | None) -> SQLStartStore:
    return options.start_store(database, "the command `starts`")


async def _record(store: SQLStartStore, key: str, database: str | None) -> StoredStart:
    """Return the record of a key, which must have one."""
    record = await store.find(key) if _exists(database) else None
    if record is None:
        raise Misuse(f"nothing has used the key {quoted(key)} in {_where(database)}. {_CHECK}")
    return record


def _line(record: StoredStart) -> str:
    text = f"{record.state} since {utc_time(record.updated)}"
    if record.state != "sending":
        text += f", sent {utc_time(record.created)}"
    if record.execution_id is not None:
        text += f", execution {record.execution_id}"
    text += f", workflow {printable(str(record.workflow))}"
    if record.reason is not None:
        text += f": {record.reason}"
    return f"{printable(record.key)}  {text}"


def _json_line(record: StoredStart, database: str | None) -> str:
    names = ("key", "state", "reason", "workflow", "server", "attempts", "created", "updated")
    fields: dict[str, Any] = {name: getattr(record, name) for name in names}
    id_text = None if record.execution_id is None else str(record.execution_id)
    fields |= {"execution_id": id_text, "metadata": {KEY_METADATA: record.key}}
    fields["command"] = _way_out(record, database)
    return json.dumps(fields, default=datetime.isoformat)


def _way_lines(record: StoredStart, database: str | None) -> list[str]:
    """Return what a person can do about a key, with the commands."""
    lines = way_hints(_ways_out(record, database))
    if record.state == "unknown":
        search = f"{KEY_METADATA} = {printable(record.key)}"
        about = f"Search PromptLayer for the metadata {search}, and the time."
        lines.insert(0, f"it may have started a run. {about}")
    return lines


def _way_out(record: StoredStart, database: str | None) -> str:
    """Return the command to run next for a key."""
    return _ways_out(record, database)[0].command


def _ways_out(record: StoredStart, database: str | None) -> list[WayOut]:
    return out_of_key(
        record.state,
        record.key,
        execution_id=record.execution_id,
        server=_other_server(record),
        flags=_database_option(database),
    )


def _other_server(record: StoredStart) -> str | None:
    """Return the server of a run, if it is not the one that commands use by default."""
    return None if record.server == integration.base_url(Session()) else record.server


def _database_option(database: str | None) -> str:
    if database is None or is_usual_database(database):
        return ""
    return database_option(database, _where(database))


def _where(database: str | None) -> str:
    """Return the URL of the database, without its password."""
    from promptlayer_exec.starts import shown_database_url  # noqa: PLC0415 - an extra

    return printable(shown_database_url(database))


def _exists(database: str | None) -> bool:
    """Return False if the database is a file that does not exist. Looking would create it."""
    _open_store(database)  # explains a malformed URL, or a missing extra
    return _where(database).startswith("postgres") or _path(database).exists()


def _path(database: str | None) -> Path:
    """Return the path in the URL of a SQLite database."""
    return Path(_where(database).removeprefix("sqlite:///").partition("?")[0])


def _count(number: int) -> str:
    return "1 key" if number == 1 else f"{number} keys"
