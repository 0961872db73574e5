"""Arguments and options that commands share, and what they make of them: inputs and a session."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import attrs
import typer

from promptlayer_exec import (
    ConfigurationError,
    Observer,
    PollPolicy,
    PromptLayerExecError,
    RetryPolicy,
    Session,
    StartStore,
)
from promptlayer_exec._advice import explain
from promptlayer_exec._integration import MAX_ID, check_key, install_hint, near, printable
from promptlayer_exec._ways_out import suggest
from promptlayer_exec.cli._exit import Misuse
from promptlayer_exec.cli._printing import err, quoted, shorten, show_warnings

if TYPE_CHECKING:
    from promptlayer_exec.simulator import Simulator
    from promptlayer_exec.starts import SQLStartStore

_LIST_PATIENCE = 3.0  # seconds to list the workflows after one was not found
# The modules whose warnings the commands show as they are.
_SHOWN = ("definitions", "channels", "retry")


# The units of durations, in seconds.
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

# Headings of the options in the help.
CONNECTION = "Connection"
STORAGE = "Storage"


def seconds(text: str, *, default: bool | str = True, heading: str | None = None) -> Any:
    """Return an option in seconds, or in a larger unit, with a help text."""
    return typer.Option(
        metavar="SECONDS",
        parser=parse_seconds,
        help=text,
        show_default=default,
        rich_help_panel=heading,
    )


def parse_seconds(text: str | float) -> float:
    """Return the seconds of a text such as `90`, `90s`, `15m`, `1h`, `1d` or `inf`."""
    number, unit = str(text), 1.0
    if number[-1:] in _UNITS:
        number, unit = number[:-1], _UNITS[number[-1]]
    try:
        amount = float(number) * unit
    except ValueError:
        amount = math.nan
    if not amount >= 0.0:
        expected = "must be seconds, or a duration such as 90s, 15m, 1h or 1d"
        raise typer.BadParameter(f"{expected}, got {quoted(str(text), 40)}")
    return amount


def parse_id(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= MAX_ID:
        expected = "must be an execution id, a number such as 787, as `run` prints it"
        raise typer.BadParameter(f"{expected}, got {shorten(printable(text), 40)!r}")
    return int(text)


def parse_key(text: str) -> str:
    try:
        return check_key(text)
    except ValueError as error:
        raise typer.BadParameter(explain(error)) from error


ExecutionId = Annotated[
    int, typer.Argument(metavar="ID", parser=parse_id, help="Id of the execution, such as 787.")
]
WorkflowName = Annotated[
    str, typer.Argument(metavar="WORKFLOW", help="Name or id of the workflow.")
]
Label = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Label of the version.", show_default="the latest version"),
]
Version = Annotated[
    int | None,
    typer.Option(metavar="NUMBER", min=1, help="Number of the version, instead of --label."),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        parser=parse_key,
        help="Start only one run for this key, such as order-42.",
    ),
]
JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON Lines.")]
BaseUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Server.",
        show_default="$PROMPTLAYER_BASE_URL, or PromptLayer",
        rich_help_panel=CONNECTION,
    ),
]
Outage = Annotated[
    float | None,
    seconds(
        "How long to retry failing requests.",
        default="60 for a request, 600 for a watch",
        heading=CONNECTION,
    ),
]
NoPush = Annotated[
    bool,
    typer.Option(
        "--no-push",
        help="Only poll, without push.",
        rich_help_panel=CONNECTION,
    ),
]
Database = Annotated[
    str | None,
    typer.Option(
        "--db",
        metavar="URL",
        envvar="PROMPTLAYER_EXEC_DB",
        help="Database, sqlite:///FILE or postgresql://...",
        show_default="$PROMPTLAYER_EXEC_DB, or a file per user",
        rich_help_panel=STORAGE,
    ),
]
Host = Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")]
Port = Annotated[
    int,
    typer.Option(metavar="PORT", min=0, max=65535, help="Port to listen on, 0 for a free one."),
]


def read_inputs(arguments: Iterable[str]) -> dict[str, Any]:
    """Return the inputs given with `--input`. If a key comes twice, the last value wins."""
    inputs: dict[str, Any] = {}
    for argument in arguments:
        match = re.fullmatch(r"(?!=)([^=@]*)([=@])(.*)", argument, re.DOTALL)
        if match is None:
            _refuse(f"{quoted(argument)} is not KEY=VALUE, KEY@FILE or @FILE")

        key, separator, rest = match.groups()
        if separator == "=":
            inputs[key] = _parse_value(key, rest)
        elif key:
            inputs[key] = _read_text(rest)
        else:
            inputs |= _read_object(rest)

    return inputs


def read_metadata(arguments: Iterable[str]) -> dict[str, str]:
    """Return the texts given with `--metadata`. If a key comes twice, the last text wins."""
    metadata = {}
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if not (key and separator):
            _refuse(f"{quoted(argument)} is not KEY=TEXT", "--metadata")
        metadata[key] = text
    return metadata


def _parse_value(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith(("[", "{", '"')):
            err(
                f"warning: the value of {quoted(key)} looks like JSON but is not valid ({error}):"
                " sending it as text"
            )
        return text


def _read_object(path: str) -> dict[str, Any]:
    name = _file_name(path)
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        _refuse(f"{name} is not valid JSON: {error}")
    if not isinstance(value, dict):
        start = quoted(json.dumps(value))
        _refuse(f'{name} must contain a JSON object like {{"name": "Maria"}}, not {start}')
    return value


def _read_text(path: str) -> str:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        _refuse(f"cannot read {_file_name(path)}: {error.strerror or error}")
    except UnicodeDecodeError as error:
        _refuse(f"{_file_name(path)} is not UTF-8 text: byte {error.start + 1} is invalid")


def _file_name(path: str) -> str:
    return "standard input" if path == "-" else quoted(path)


def _refuse(message: str, option: str = "--input") -> NoReturn:
    raise typer.BadParameter(message, param_hint=f"'{option}'")


def needs(error: ValueError, workflow: str | int, base_url: str | None) -> str:
    """Return the message that inputs are missing, with the command that lists them."""
    command = suggest(f"workflow {shlex.quote(str(workflow))}", base_url)
    return f"{explain(error)} See its inputs with `{command}`"


async def near_workflow(session: Session, workflow: str | int) -> str | None:
    """Return the name of a workflow that resembles one that does not exist, if there is one.

    It lists the workspace's workflows within a few seconds, or gives up.
    """
    names = list[str]()
    with suppress(PromptLayerExecError, TimeoutError):
        async with asyncio.timeout(_LIST_PATIENCE), aclosing(session.workflows()) as found:
            async for summary in found:
                names.append(summary.name)
    if workflow in names:
        return None  # it lacks only the label or the version
    return next(iter(near(str(workflow), names, 1)), None)


def start_store(database: str | None, needed_by: str) -> SQLStartStore:
    """Return the store of keys and the runs they started, in a database or the default one."""
    try:
        from promptlayer_exec.starts import SQLStartStore  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise Misuse(f"{needed_by} needs {install_hint('cli', 'starts')}") from error
    return SQLStartStore(database)


def open_session(
    base_url: str | None,
    outage: float | None,
    warn: Callable[[str], None] | None = None,
    *,
    longest_retry: float = math.inf,
    wait_timeout: float = 3600.0,
    no_push: bool = False,
    observer: Observer | None = None,
    starts: StartStore | None = None,
) -> Session:
    """Return a session with the key from the environment.

    Watches and single requests retry for `outage` seconds, single requests for at most
    `longest_retry`. The session calls `warn` when an outage begins, and for an input of a doubtful
    type.
    """
    if not os.environ.get("PROMPTLAYER_API_KEY"):
        raise ConfigurationError("there is no API key", setting="api_key")
    if warn is not None:
        show_warnings(warn, of=_SHOWN)

    retry = RetryPolicy()
    if outage is not None:
        retry = RetryPolicy(outage=outage, watch_outage=outage)
    retry = attrs.evolve(retry, outage=min(retry.outage, longest_retry))

    # Print warnings about settings like any other message, without a line of Python code.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        session = Session(
            base_url=base_url,
            retry=retry,
            wait_timeout=wait_timeout,
            observers=[] if observer is None else [observer],
            push=False if no_push else None,
            starts=starts,
        )
    for warning in caught:
        err(f"warning: {printable(str(warning.message))}")

    return session


def demo_session(simulator: Simulator, warn: Callable[[str], None]) -> Session:
    """Return a session on a simulator. It polls often enough to catch short nodes running."""
    show_warnings(warn, of=_SHOWN)
    poll = PollPolicy(floor=0.2, ceiling=0.4)
    return Session(simulator.api_key, base_url=simulator.base_url, poll=poll)
