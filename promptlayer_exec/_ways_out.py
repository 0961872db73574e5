"""What to do next about an item or a key in each state, as commands that a person can copy.

Internal. The command line prints these commands, and the viewer's page shows them.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

import attrs

from promptlayer_exec._integration import printable

PROGRAM = "promptlayer-exec"


@attrs.frozen
class WayOut:
    """One thing to do next.

    Attributes:
        what: what the command is for, as a line that stands above it.
        command: the command.
    """

    what: str
    command: str


# By the state of one item. The first way out is also that of the item's line in a list.
_OF_ITEM = {
    # If the worker that was sending it is dead, another one finds that it is unknown.
    "waiting": [("start or continue it with", "batch work", "")],
    "sending": [("start or continue it with", "batch work", "")],
    "following": [("end it with", "batch give-up", "KEY")],
    "unknown": [
        ("if you find its run, follow it with", "batch adopt", "KEY ID"),
        ("else start it again, which you pay for, with", "batch retry --unknown", "KEY"),
    ],
    "failed": [("start it again, which you pay for, with", "batch retry", "KEY")],
    # It failed, but nobody knows how its run ends. `retry` follows that run, and starts none.
    "undecided": [
        (
            "its run may still bring an output: follow it again, for free, with",
            "batch retry",
            "KEY",
        ),
        ("or pay for a second run with", "batch retry --again", "KEY"),
    ],
    "succeeded": [
        ("print its request and its history with", "batch show", "KEY"),
        ("pay for a second run with", "batch retry --again", "KEY"),
    ],
}

# By the state of any number of items of one batch.
_OF_ITEMS = {
    "waiting": [("start or continue them with", "batch work", "")],
    "sending": [("start or continue them with", "batch work", "")],
    "following": [
        ("start or continue them with", "batch work", ""),
        ("end those that take too long with", "batch give-up --running-for 1h", ""),
    ],
    "unknown": [
        (
            (
                "unknown items may have started, and you may be billed: look for them in"
                " PromptLayer, and follow what you find with"
            ),
            "batch adopt",
            "KEY ID",
        ),
        ("or start them again, which you pay for, with", "batch retry --unknown", ""),
    ],
    "failed": [("start failed items again, which you pay for, with", "batch retry --failed", "")],
    "undecided": [
        ("follow runs that may still bring an output again, for free, with", "batch recheck", ""),
        ("or pay for a second run of an item with", "batch retry --again", "KEY"),
    ],
    "succeeded": [("write all results with", "batch export", "")],
}

# By the state of a key.
_OF_KEY = {
    "sending": [("it becomes started or unknown by itself. Look again with", "starts show", "KEY")],
    "started": [("follow its run with", "watch", "ID")],
    "unknown": [
        ("if the run is there, record its id", "starts adopt", "KEY ID"),
        ("if it is not there, let the next start pay for a run", "starts forget", "KEY"),
    ],
}


def is_undecided(kind: str, data: Mapping[str, Any]) -> bool:
    """Return True if a stored error has a run that may have an output, or may still bring one."""
    return data.get("execution_id") is not None and kind != "ExecutionFailed"


def way_state(item: Any) -> str:
    """Return the state of a `StoredItem` whose ways out apply."""
    error = None if item.outcome is None else item.outcome.error
    if item.state == "failed" and error is not None and is_undecided(error.type, error.data):
        return "undecided"
    return str(item.state)


def out_of_item(
    state: str,
    key: str,
    flags: str,
    reading_flags: str | None = None,
) -> list[WayOut]:
    """Return what to do next about one item, the usual way first.

    Args:
        state: its state, as in `BatchItem`, or `undecided`, as `way_state` returns it.
        key: its key.
        flags: the options with which a command finds the batch and its server.
        reading_flags: the same for a command that asks no server. None: `flags`.
    """
    ways = []
    for what, command, arguments in _OF_ITEM[state]:
        is_reading = command == "batch show" and reading_flags is not None
        given = [key if argument == "KEY" else argument for argument in arguments.split()]
        shown = command_about(command, reading_flags or "" if is_reading else flags, *given)
        ways.append(WayOut(what, shown))
    return ways


def out_of_items(state: str, flags: str) -> list[WayOut]:
    """Return what to do next about all items of a batch in a state, the usual way first."""
    return [
        WayOut(what, command_about(command, flags, *arguments.split()))
        for what, command, arguments in _OF_ITEMS[state]
    ]


def out_of_mistaken_run(flags: str) -> WayOut:
    """Return what to do next about an item that has adopted the run of another one."""
    what = "if the other item has adopted it by mistake, pay for a run of that one with"
    return WayOut(what, command_about("batch retry --again", flags, "KEY"))


def out_of_key(
    state: str,
    key: str,
    *,
    execution_id: int | None = None,
    server: str | None = None,
    flags: str = "",
) -> list[WayOut]:
    """Return what to do next about a key, the usual way first.

    Args:
        state: its state, as in `StoredStart`.
        key: the key.
        execution_id: the id of its run, if it is known.
        server: the server of its run, if it is not the one that commands use by default.
        flags: the options with which a command finds the store.
    """
    values = {"KEY": key, "ID": "ID" if execution_id is None else str(execution_id)}
    ways = []
    for what, command, arguments in _OF_KEY[state]:
        options = server_option(server) if command == "watch" else flags
        given = [values[argument] for argument in arguments.split()]
        ways.append(WayOut(what, command_about(command, options, *given)))
    return ways


def unknown_keys(flags: str = "") -> str:
    """Return the command that lists the unknown keys of a store, each with its way out."""
    return command_about("starts list --unknown", flags)


def command_about(command: str, flags: str, *arguments: str) -> str:
    """Return a command to type. Its keys may begin with a hyphen, as options do."""
    verb, _, option = command.partition(" --")
    flags = f" --{option}{flags}" if option else flags
    if not arguments:
        return printable(f"{PROGRAM} {verb}{flags}")

    joined = shlex.join(arguments)
    if any(argument.startswith("-") for argument in arguments):
        return printable(f"{PROGRAM} {verb}{flags} -- {joined}")
    return printable(f"{PROGRAM} {verb} {joined}{flags}")


def suggest(command: str, base_url: str | None) -> str:
    """Return a command to type, which uses the same server as this one."""
    return f"{PROGRAM} {command}{server_option(base_url)}"


def server_option(base_url: str | None) -> str:
    """Return the option that a suggested command needs, to use the same server as this one."""
    return "" if base_url is None else f" --base-url {shlex.quote(base_url)}"


def batch_option(name: str) -> str:
    """Return the option with which a suggested command finds a batch."""
    return printable(f" --name {shlex.quote(name)}")


def is_usual_database(database: str | None) -> bool:
    """Return True if commands use a database without an option."""
    return not database or database == os.environ.get("PROMPTLAYER_EXEC_DB")


def database_option(database: str, shown: str) -> str:
    """Return the option that a suggested command needs, to use the same database as this one.

    `shown` is its URL without the password. With one, the command names the environment variable.
    """
    if "***" in shown and "***" not in database:
        return ' --db "${PROMPTLAYER_EXEC_DB:?}"'
    return f" --db {shlex.quote(shown)}"
