"""The values that options give as `KEY=VALUE`, and what `--input` can read beside them."""

import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import typer

from ._streams import err
from ._text import printable, shorten

_STDIN = "-"


def read_inputs(arguments: Iterable[str]) -> dict[str, Any]:
    """Return the input variables that the `--input` options give; the last of a key counts.

    Raises:
        typer.BadParameter: one of them is no such option, or what it names cannot be read.
    """
    parts = [_split(argument) for argument in arguments]
    if sum(part[1:] == ("@", _STDIN) for part in parts) > 1:
        _refuse("standard input can be read only once: give @- once")
    inputs: dict[str, Any] = {}
    for key, separator, rest in parts:
        if separator == "=":
            inputs[key] = _value(key, rest)
        elif key:
            inputs[key] = _read_text(rest)
        else:
            inputs |= _read_object(rest)
    return inputs


def read_metadata(arguments: Iterable[str]) -> dict[str, str]:
    """Return the strings that the `--metadata` options give; the last of a key counts.

    Raises:
        typer.BadParameter: one of them is no `KEY=VALUE`.
    """
    metadata = {}
    for argument in arguments:
        key, separator, text = _decoded(argument, "--metadata").partition("=")
        if not (key and separator):
            _refuse(f"{_quoted(argument)} is not KEY=VALUE", "--metadata")
        metadata[key] = text
    return metadata


def _split(argument: str) -> tuple[str, str, str]:
    """Return the key, the separator and what follows it; the key is empty before a `@FILE`."""
    match = re.fullmatch(r"([^=@]*)([=@])(.*)", _decoded(argument), re.DOTALL)
    if match is None:
        _refuse(f"{_quoted(argument)} is none of KEY=VALUE, KEY@FILE and @FILE")
    key, separator, rest = match.groups()
    if separator == "=" and not key:
        _refuse(f"{_quoted(argument)} has no key before the '='")
    return key, separator, rest


def _value(key: str, text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith(("[", "{", '"')):
            err(
                f"warning: the value of {_quoted(key)} begins like JSON but is none, and is sent as"
                f" text: {_mistake(error)}"
            )
        return text
    except (ValueError, RecursionError) as error:  # too many digits, or too deep
        _refuse(f"the value of {_quoted(key)} cannot be read: {error}")
    if isinstance(value, float) and not math.isfinite(value):
        _refuse(
            f"the value of {_quoted(key)} is no number of JSON's; the text is written"
            f" '{printable(key)}={printable(json.dumps(text))}'"
        )
    return value


def _read_object(path: str) -> dict[str, Any]:
    name = _name(path)
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        _refuse(f"{name} is no JSON: {_mistake(error)}")
    except (ValueError, RecursionError) as error:
        _refuse(f"{name} cannot be read: {error}")
    if not isinstance(value, dict):
        start = _quoted(json.dumps(value))
        _refuse(f'{name} must hold a JSON object, such as {{"name": "Maria"}}, not {start}')
    return value


def _read_text(path: str) -> str:
    try:
        data = _read_stdin() if path == _STDIN else Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        _refuse(f"cannot read {_name(path)}: {error.strerror or error}")
    except UnicodeDecodeError as error:
        _refuse(f"{_name(path)} is not UTF-8 text: byte {error.start + 1} is none of it")


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise OSError("it is closed")
    return sys.stdin.buffer.read()


def _name(path: str) -> str:
    return "standard input" if path == _STDIN else _quoted(path)


def _mistake(error: json.JSONDecodeError) -> str:
    return f"{error.msg}, line {error.lineno}, column {error.colno}"


def _decoded(argument: str, option: str = "--input") -> str:
    try:
        argument.encode()
    except UnicodeEncodeError:
        _refuse(f"{_quoted(argument)} is not text in this terminal's encoding", option)
    return argument


def _quoted(text: str) -> str:
    return f"'{shorten(printable(text), 100)}'"


def _refuse(message: str, option: str = "--input") -> NoReturn:
    raise typer.BadParameter(message, param_hint=f"'{option}'")
