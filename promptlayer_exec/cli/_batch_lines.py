"""The file of inputs of a batch, and the file of its results."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from promptlayer_exec import StartRequest

from ._ending import Misuse
from ._streams import err, out
from ._text import printable, shorten

if TYPE_CHECKING:
    from promptlayer_exec.dbos import StoredOutcome

_SHOWN = 20
_BEGINNING = b'{"key": "'
_FIELDS = {
    "key": (str, "a string"),
    "inputs": (dict, "an object"),
    "workflow": (str | int, "a name or an id"),
    "label": (str, "a string"),
    "version": (int, "a number"),
    "metadata": (dict, "an object of strings"),
}


class Inputs:
    """The items that a file gives, one a line.

    Args:
        path: the file.
        workflow: for the lines that name none.

    Raises:
        Misuse: it cannot be read, or some lines are wrong: all of them are told.
    """

    def __init__(self, path: Path, workflow: str | None) -> None:
        self._path = path
        self._workflow = workflow
        self.count = 0
        self._check()

    def _check(self) -> None:
        name = printable(str(self._path))
        if self._path.is_fifo() or self._path.is_char_device():
            raise Misuse(f"{name} is no file: it is read twice, so write the items to a file first")
        problems = []
        lines: dict[str, int] = {}
        for number, text in self._lines():
            try:
                request = _request(number, text, self._workflow)
            except _Wrong as error:
                problems.append(f"line {number}: {error}")
                continue
            first = lines.setdefault(request.key, number)
            if first != number:
                quoted = shorten(printable(request.key), 100)
                problems.append(f"line {number}: the key '{quoted}' is that of line {first}, too")
            self.count += 1
        if problems:
            for problem in problems[:_SHOWN]:
                err(problem)
            count = f"{len(problems)} line{'s' * (len(problems) > 1)}"
            shown = f", of which {_SHOWN} are shown" if len(problems) > _SHOWN else ""
            raise Misuse(f"{name} has {count} that cannot be used{shown}; nothing was added")
        if not self.count:
            raise Misuse(f"{name} has no items")

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
            name = printable(str(self._path))
            raise Misuse(f"cannot read {name}: {error.strerror or error}") from error


class _Wrong(Exception):
    """A line gives no item; it says why."""


def _request(number: int, text: bytes, workflow: str | None) -> StartRequest:
    """Return the item that a line gives.

    Raises:
        _Wrong: it gives none.
    """
    fields = _object(text)
    for name, value in fields.items():
        if name not in _FIELDS:
            known = ", ".join(_FIELDS)
            raise _Wrong(f"'{shorten(printable(name), 40)}' is none of {known}")
        kind, expected = _FIELDS[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise _Wrong(f'"{name}" is {expected}')
    if not all(isinstance(value, str) for value in fields.get("metadata", {}).values()):
        raise _Wrong('"metadata" is an object of strings')
    if "label" in fields and "version" in fields:
        raise _Wrong('"label" and "version" exclude each other')
    workflow = fields.get("workflow", workflow)
    if workflow is None or workflow == "":
        raise _Wrong('it has no "workflow", and --workflow is not given')
    if fields.get("key") == "":
        raise _Wrong('"key" is empty')
    return StartRequest(
        workflow,
        fields.get("inputs", {}),
        label=fields.get("label"),
        version=fields.get("version"),
        metadata=fields.get("metadata"),
        key=fields.get("key", str(number)),
    )


def _object(text: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text.decode(), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise _Wrong(f"it is not UTF-8 text: byte {error.start + 1} is none of it") from error
    except json.JSONDecodeError as error:
        raise _Wrong(f"it is no JSON: {error.msg}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # too many digits, or too deep
        raise _Wrong(f"it cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise _Wrong('it is no JSON object such as {"key": "a", "inputs": {}}')
    if not isinstance(fields.get("inputs", {}), dict):
        raise _Wrong('"inputs" is an object')
    return {name: value for name, value in fields.items() if value is not None}


def _refuse(constant: str) -> NoReturn:
    raise _Wrong(f"{constant} is no number of JSON's")


class Results:
    """Where outcomes go, one a line: a file that is continued, or standard output.

    Args:
        path: the file; None for standard output.

    Raises:
        Misuse: it cannot be written to, or holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._written: set[tuple[str, str]] = set()
        if path is not None:
            try:
                self._file = path.open("a+b")
                self._continue(path, self._file)
            except OSError as error:
                self.close()
                raise self._misuse(error) from error

    def _continue(self, path: Path, file: IO[bytes]) -> None:
        file.seek(0)
        end = 0
        for number, line in enumerate(file, 1):
            try:
                outcome = _outcome(line)
            except (ValueError, TypeError, KeyError) as error:
                self.close()
                raise Misuse(
                    f"{printable(str(path))}, line {number}, is no result: it is left as it is"
                ) from error
            if outcome is None:
                break
            self._written.add(outcome)
            end += len(line)
        file.truncate(end)

    def write(self, outcome: "StoredOutcome") -> None:
        """Write a line at once, unless it is there already."""
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
        return Misuse(f"cannot write to {printable(str(self._path))}: {error.strerror or error}")


def _outcome(line: bytes) -> tuple[str, str] | None:
    """Return the key of the outcome that a line holds, and when it was known.

    None stands for a line that a process did not write to its end, because it was killed.

    Raises:
        ValueError, TypeError, KeyError: the line is somebody else's.
    """
    is_whole = line.endswith(b"\n")
    try:
        fields = json.loads(line)
    except ValueError:
        if is_whole or line[: len(_BEGINNING)] != _BEGINNING[: len(line)]:
            raise
        return None
    outcome = (str(fields["key"]), str(fields["finished"]))
    return outcome if is_whole else None
