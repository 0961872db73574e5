"""Arguments and options that commands share, the values of inputs and metadata, and their check."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeAlias

import typer

from promptlayer_exec import NotFound, RequestError, Session
from promptlayer_exec._integration import DEFINITION_TIMEOUT, MAX_ID, printable
from promptlayer_exec.cli._exit import describe, suggest
from promptlayer_exec.cli._text import err, shorten

# A workflow with its label and version; the names of the inputs that the lines of a file give it.
Target: TypeAlias = tuple[str | int, str | None, int | None]
Given: TypeAlias = Mapping[tuple[str, ...], list[int]]
_STDIN = "-"


def seconds(text: str, *, default: bool | str = True) -> Any:
    """Return an option in seconds with a help text."""
    return typer.Option(metavar="SECONDS", callback=_check_seconds, help=text, show_default=default)


def _check_seconds(value: float | None) -> float | None:
    if value is not None and not 0 <= value < math.inf:
        raise typer.BadParameter("must be a number of seconds, 0 or more")
    return value


def _parse_number(text: str, kind: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= MAX_ID:
        raise typer.BadParameter(f"must be {kind}, got {shorten(printable(text), 40)!r}")
    return int(text)


def parse_id(text: str) -> int:
    return _parse_number(text, "an execution id, a number such as the 787 that `run` prints")


ExecutionId = Annotated[
    int, typer.Argument(metavar="ID", parser=parse_id, help="Id of the execution.")
]
WorkflowName = Annotated[
    str, typer.Argument(metavar="WORKFLOW", help="Name or id of the workflow.")
]
Label = Annotated[str | None, typer.Option(metavar="NAME", help="Label of the version.")]
Version = Annotated[
    int | None,
    typer.Option(
        metavar="NUMBER",
        parser=partial(_parse_number, kind="a number from 1"),
        help="Number of the version, instead of --label.",
    ),
]
JsonLines = Annotated[bool, typer.Option("--json", help="Write JSON Lines.")]
BaseUrl = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Server to use.",
        show_default="$PROMPTLAYER_BASE_URL or https://api.promptlayer.com",
    ),
]
Outage = Annotated[
    float | None,
    seconds(
        "Maximum time to keep retrying while the server is unreachable or failing.",
        default="60 for a request, 600 for a watch",
    ),
]
NoPush = Annotated[
    bool,
    typer.Option(
        "--no-push",
        help="Only poll: do not listen for completions that PromptLayer pushes.",
    ),
]
Host = Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")]
Port = Annotated[
    int,
    typer.Option(metavar="PORT", min=0, max=65535, help="Port to listen on; 0 takes a free port."),
]


def read_inputs(arguments: Iterable[str]) -> dict[str, Any]:
    """Return the input variables given with `--input`; the last value of a key wins."""
    inputs: dict[str, Any] = {}
    for key, separator, rest in map(_split, arguments):
        if separator == "=":
            inputs[key] = _parse_value(key, rest)
        elif key:
            inputs[key] = _read_text(rest)
        else:
            inputs |= _read_object(rest)
    return inputs


def refuse_arguments(arguments: list[str]) -> None:
    """Refuse inputs without their option."""
    if arguments:
        given = _quoted(arguments[0])
        _refuse(f"{given} is not expected; inputs are given with -i: -i {given}")


def read_metadata(arguments: Iterable[str]) -> dict[str, str]:
    """Return the texts given with `--metadata`; the last text of a key wins."""
    metadata = {}
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if not (key and separator):
            _refuse(f"{_quoted(argument)} is not KEY=TEXT", "--metadata")
        metadata[key] = text
    return metadata


def _split(argument: str) -> tuple[str, str, str]:
    """Return the key, the separator and the rest of an input; the key of `@FILE` is empty."""
    match = re.fullmatch(r"(?!=)([^=@]*)([=@])(.*)", argument, re.DOTALL)
    if match is None:
        _refuse(f"{_quoted(argument)} is not KEY=VALUE, KEY@FILE or @FILE")
    return match[1], match[2], match[3]


def _parse_value(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith(("[", "{", '"')):
            err(
                f"warning: the value of {_quoted(key)} looks like JSON but is not valid, and is"
                f" sent as text: {error}"
            )
        return text
    except (ValueError, RecursionError) as error:  # too many digits, or nested too deeply
        _refuse(f"the value of {_quoted(key)} cannot be read: {error}")


def _read_object(path: str) -> dict[str, Any]:
    name = _file_name(path)
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        _refuse(f"{name} is not valid JSON: {error}")
    if not isinstance(value, dict):
        start = _quoted(json.dumps(value))
        _refuse(f'{name} must contain a JSON object like {{"name": "Maria"}}, not {start}')
    return value


def _read_text(path: str) -> str:
    try:
        data = sys.stdin.buffer.read() if path == _STDIN else Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        _refuse(f"cannot read {_file_name(path)}: {error.strerror or error}")
    except UnicodeDecodeError as error:
        _refuse(f"{_file_name(path)} is not UTF-8 text: byte {error.start + 1} is invalid")


def _file_name(path: str) -> str:
    return "standard input" if path == _STDIN else _quoted(path)


def _quoted(text: str) -> str:
    return f"'{shorten(printable(text), 100)}'"


def _refuse(message: str, option: str = "--input") -> NoReturn:
    raise typer.BadParameter(message, param_hint=f"'{option}'")


async def find_problems(
    session: Session, starts: Mapping[Target, Given], base_url: str | None
) -> dict[int, str]:
    """Return what is wrong with the workflow or the inputs of lines, by their numbers.

    The definition of each workflow is read once. After one that cannot be read, which is reported,
    no other is asked for, and the rest is unchecked: a server that is down would cost a few seconds
    for each.
    """
    problems: dict[int, str] = {}
    for (workflow, label, version), given in starts.items():
        try:
            async with asyncio.timeout(DEFINITION_TIMEOUT):
                found = await session.workflow(workflow, label=label, version=version)
        except NotFound:
            which = "" if label is None else f" with the label '{shorten(printable(label), 40)}'"
            which += "" if version is None else f" with a version {version}"
            what = f"there is no {_named(workflow)}{which}; `{suggest('workflows', base_url)}`"
            what += " lists names and labels"
            problems |= {number: what for numbers in given.values() for number in numbers}
            continue
        except (RequestError, TimeoutError) as error:
            late = f"{_named(workflow)}: no answer within {DEFINITION_TIMEOUT:g} s"
            err(f"inputs are not checked: {describe(error) or late}")
            break
        for names, numbers in given.items():
            try:
                found.check_inputs(dict.fromkeys(names))
            except ValueError as error:
                problems |= dict.fromkeys(numbers, needs(error, workflow, base_url))
    return problems


def needs(error: ValueError, workflow: str | int, base_url: str | None) -> str:
    """Say that inputs are missing, and how to find out which there are."""
    command = suggest(f"workflow {shlex.quote(str(workflow))}", base_url)
    return f"{error}; `{command}` shows what it needs"


def _named(workflow: str | int) -> str:
    return f"workflow '{shorten(printable(str(workflow)), 100)}'"
