"""The items of a batch in a file: JSON Lines, or CSV."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from promptlayer_exec import StartRequest
from promptlayer_exec.cli._exit import Misuse
from promptlayer_exec.cli._stdio import err
from promptlayer_exec.cli._text import printable, shorten

csv.field_size_limit(2**31 - 1)  # a cell can be as long as any input or output

_MAX_SHOWN = 20
_BOM = b"\xef\xbb\xbf"
_FIELDS = {
    "key": (str, "a string"),
    "inputs": (dict, "an object"),
    "workflow": (str | int, "a name or an id"),
    "label": (str, "a string"),
    "version": (int, "a number"),
    "metadata": (dict, "an object of strings"),
}
_METADATA = "metadata."
_INPUT = "inputs."
_KEY_LENGTH = 20


class ItemFile:
    """The items in a file, checked first. Each iteration reads the file again.

    Args:
        path: a file of JSON Lines; of CSV, if its suffix is `.csv`.
        workflow: the workflow of lines that name none.
    """

    def __init__(self, path: Path, workflow: str | None) -> None:
        self._path = path
        self._name = printable(str(path))
        self._workflow = workflow
        # The number of the first line without a key, and whether the numbers of lines are the keys.
        self.first_without_key: int | None = None
        self.is_numbered = False
        if path.is_fifo() or path.is_char_device():
            raise Misuse(f"{self._name} is read twice: write the items to a regular file first")
        problems = []
        first_lines: dict[str, int] = {}
        for number, line in self._lines():
            try:
                request = self._request(number, line)
            except Misuse as error:
                problems.append(f"line {number}: {error}")
                continue
            first = first_lines.setdefault(request.key, number)
            if first == number:
                continue
            what = f"the key '{shorten(printable(request.key), 100)}' is already used in"
            if request.key == _digest(line):
                what = "a key is missing: without one, this line is the same item as"
            problems.append(f"line {number}: {what} line {first}")
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
        for number, line in self._lines():
            yield self._request(number, line)

    def _lines(self) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
        """Yield the number and the text of each line, or the cells of each row by column."""
        try:
            if self._path.suffix.lower() == ".csv":
                yield from self._rows()
                return
            with self._path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    text = line.removeprefix(_BOM) if number == 1 else line
                    if text.strip():
                        yield number, text
        except OSError as error:
            raise Misuse(f"cannot read {self._name}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise Misuse(f"{self._name} is not UTF-8 text: save it as 'CSV UTF-8'") from error
        except csv.Error as error:
            raise Misuse(f"{self._name} is not CSV: {error}") from error

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with self._path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            if repeated := {printable(name) for name in columns if columns.count(name) > 1}:
                raise Misuse(f"{self._name} has columns of the same name: {', '.join(repeated)}")
            while True:
                number = reader.line_num + 1  # a cell can have several lines
                row = next(reader, None)
                if row is None:
                    return
                yield number, row

    def _request(self, number: int, line: bytes | dict[str, Any]) -> StartRequest:
        """Return the item of a line; if it is not one, the message of the `Misuse` says why."""
        fields = _parse(line) if isinstance(line, bytes) else _named(line)
        if "key" not in fields:
            if self.first_without_key is None:
                self.first_without_key = number
            fields["key"] = str(number) if self.is_numbered else _digest(line)
        return _checked({"workflow": self._workflow} | fields)


def _digest(line: bytes | dict[str, Any]) -> str:
    text = line.strip() if isinstance(line, bytes) else json.dumps(line).encode()
    return hashlib.sha256(text).hexdigest()[:_KEY_LENGTH]


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an item from the cells of a row; an empty one is a missing field."""
    if None in row or None in row.values():
        raise Misuse("has not as many cells as the first line has names of columns")
    inputs: dict[str, str] = {}
    metadata: dict[str, str] = {}
    fields: dict[str, Any] = {"inputs": inputs}
    for name, text in row.items():
        if name.startswith(_METADATA):
            if text:
                metadata[name.removeprefix(_METADATA)] = text
        elif name not in _FIELDS or name in ("inputs", "metadata"):
            inputs[name.removeprefix(_INPUT)] = text
        elif text:
            fields[name] = text
    if metadata:
        fields["metadata"] = metadata
    if "version" in fields:
        try:
            fields["version"] = int(fields["version"])
        except ValueError:
            raise Misuse('"version" must be a number') from None
    return fields


def _checked(fields: dict[str, Any]) -> StartRequest:
    for name, value in fields.items():
        if name not in _FIELDS:
            known = ", ".join(_FIELDS)
            raise Misuse(f"'{shorten(printable(name), 40)}' is not one of {known}")
        kind, expected = _FIELDS[name]
        if name == "workflow" and value is None:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            raise Misuse(f'"{name}" must be {expected}')
    if not all(isinstance(value, str) for value in fields.get("metadata", {}).values()):
        raise Misuse('"metadata" must be an object of strings')
    if "label" in fields and "version" in fields:
        raise Misuse('use "label" or "version", not both')
    request = StartRequest(**fields)
    if request.workflow in (None, ""):
        raise Misuse('"workflow" is missing, and --workflow is not given')
    if not request.key:
        raise Misuse('"key" must not be empty')
    return request


def _parse(text: bytes) -> dict[str, Any]:
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
