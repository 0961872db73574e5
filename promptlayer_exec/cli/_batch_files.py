"""The files of a batch: its items, and its results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from promptlayer_exec import StartRequest
from promptlayer_exec.cli._exit import Misuse
from promptlayer_exec.cli._stdio import err, out
from promptlayer_exec.cli._text import printable, shorten

if TYPE_CHECKING:
    from promptlayer_exec.dbos import StoredOutcome

_MAX_SHOWN = 20
_RESULT_START = b'{"key": "'
_FIELDS = {
    "key": (str, "a string"),
    "inputs": (dict, "an object"),
    "workflow": (str | int, "a name or an id"),
    "label": (str, "a string"),
    "version": (int, "a number"),
    "metadata": (dict, "an object of strings"),
}


class ItemFile:
    """The items in a file of JSON Lines, checked first. Each iteration reads the file again.

    `workflow` is the workflow of lines that name none.
    """

    def __init__(self, path: Path, workflow: str | None) -> None:
        self._path = path
        self._name = printable(str(path))
        self._workflow = workflow
        if path.is_fifo() or path.is_char_device():
            raise Misuse(f"{self._name} is read twice: write the items to a regular file first")
        problems = []
        first_lines: dict[str, int] = {}
        for number, text in self._lines():
            try:
                request = _request(number, text, workflow)
            except Misuse as error:
                problems.append(f"line {number}: {error}")
                continue
            first = first_lines.setdefault(request.key, number)
            if first != number:
                key = shorten(printable(request.key), 100)
                problems.append(f"line {number}: the key '{key}' is already used in line {first}")
        for problem in problems[:_MAX_SHOWN]:
            err(problem)
        if problems:
            count = f"{len(problems)} invalid line{'s' * (len(problems) > 1)}"
            shown = f", {_MAX_SHOWN} of them shown" if len(problems) > _MAX_SHOWN else ""
            raise Misuse(f"{self._name} has {count}{shown}; nothing was added")
        if not first_lines:
            raise Misuse(f"{self._name} has no items")
        self.count = len(first_lines)

    def __iter__(self) -> Iterator[StartRequest]:
        for number, text in self._lines():
            yield _request(number, text, self._workflow)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self._path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                    if text.strip():
                        yield number, text
        except OSError as error:
            raise Misuse(f"cannot read {self._name}: {error.strerror or error}") from error


def _request(number: int, text: bytes, workflow: str | None) -> StartRequest:
    """Return the item of a line; if it is not one, the message of the `Misuse` says why."""
    fields = _fields(text)
    for name, value in fields.items():
        if name not in _FIELDS:
            known = ", ".join(_FIELDS)
            raise Misuse(f"'{shorten(printable(name), 40)}' is not one of {known}")
        kind, expected = _FIELDS[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise Misuse(f'"{name}" must be {expected}')
    if not all(isinstance(value, str) for value in fields.get("metadata", {}).values()):
        raise Misuse('"metadata" must be an object of strings')
    if "label" in fields and "version" in fields:
        raise Misuse('use "label" or "version", not both')
    request = StartRequest(**({"workflow": workflow, "key": str(number)} | fields))
    if request.workflow in (None, ""):
        raise Misuse('"workflow" is missing, and --workflow is not given')
    if not request.key:
        raise Misuse('"key" must not be empty')
    return request


def _fields(text: bytes) -> dict[str, Any]:
    """Return the fields of a line; null stands for a missing field, except for the inputs."""
    try:
        fields = json.loads(text.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise Misuse(f"not UTF-8 text: byte {error.start + 1} is invalid") from error
    except json.JSONDecodeError as error:
        raise Misuse(f"not valid JSON: {error.msg}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # too many digits, or nested too deeply
        raise Misuse(f"cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise Misuse('not a JSON object like {"key": "a", "inputs": {}}')
    return {name: value for name, value in fields.items() if value is not None or name == "inputs"}


def _refuse_constant(constant: str) -> NoReturn:
    raise Misuse(f"{constant} is not a JSON number")


class ResultFile:
    """The results, one a line: a file that is continued, or standard output for no path."""

    def __init__(self, path: Path | None) -> None:
        self._name = printable(str(path))
        self._file: IO[bytes] | None = None
        self._written: set[tuple[str, str]] = set()
        if path is not None:
            try:
                with path.open("a+b") as file:
                    self._continue(file)
                self._file = path.open("ab")
            except OSError as error:
                raise self._misuse(error) from error

    def _continue(self, file: IO[bytes]) -> None:
        """Record what the file contains, and cut off an incomplete last line."""
        file.seek(0)
        end = 0
        for number, line in enumerate(file, 1):
            is_whole = line.endswith(b"\n")
            try:
                fields = json.loads(line)
                result = (str(fields["key"]), str(fields["finished"]))
            except (ValueError, TypeError, KeyError) as error:
                is_start = line[: len(_RESULT_START)] == _RESULT_START[: len(line)]
                if is_start and not is_whole and isinstance(error, ValueError):  # a kill cut it off
                    break
                where = f"{self._name}, line {number}"
                raise Misuse(f"{where}, is not a result; the file is unchanged") from error
            if not is_whole:
                break
            self._written.add(result)
            end += len(line)
        file.truncate(end)

    def write(self, outcome: StoredOutcome) -> None:
        """Write a line and flush it, unless the file already contains it."""
        if self._file is None:
            out(outcome.to_json())
            return
        if (outcome.key, outcome.finished.isoformat()) in self._written:
            return
        try:
            self._file.write(outcome.to_json().encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise self._misuse(error) from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _misuse(self, error: OSError) -> Misuse:
        return Misuse(f"cannot write to {self._name}: {error.strerror or error}")
