"""The file of a batch's items, in JSON Lines or CSV, and the check of its lines."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from promptlayer_exec import NotFound, RequestError, Session, StartRequest, Unauthorized
from promptlayer_exec._advice import explain
from promptlayer_exec._integration import MAX_ID, definition, is_from_gateway, printable
from promptlayer_exec._ways_out import suggest
from promptlayer_exec.cli._exit import THIS_SUBJECT, Misuse
from promptlayer_exec.cli._options import near_workflow, needs
from promptlayer_exec.cli._printing import err, quoted, shorten

if TYPE_CHECKING:
    from promptlayer_exec.dbos import Batch

csv.field_size_limit(2**31 - 1)  # a cell can be as long as any input

_FIELDS: dict[str, tuple[Any, str]] = {
    "key": (str, "a string"),
    "inputs": (dict, "an object"),
    "workflow": (str | int, "a name or an id"),
    "label": (str, "a string"),
    "version": (int, "a number"),
    "metadata": (dict, "an object of strings"),
}
_METADATA = "metadata."
_INPUT = "inputs."


class ItemFile:
    """The items in a file, checked on creation. Each iteration reads the file again.

    `workflow` is for lines without one.
    """

    def __init__(self, path: Path, workflow: str | None) -> None:
        self._path = path
        self._name = printable(str(path))
        self._workflow = workflow
        self.lines: dict[str, int] = {}  # line numbers by key
        # Line numbers by workflow, label and version, and then by the names of the inputs.
        self._starts: dict[Any, dict[tuple[str, ...], list[int]]] = {}

        if path.is_fifo() or path.is_char_device():
            raise Misuse(f"{self._name} is not a regular file: save the items to one first")

        problems: dict[int, str] = {}
        for number, line in self._lines():
            try:
                self._note_line(number, line)
            except Misuse as error:
                problems[number] = str(error)
        self._refuse(problems)
        if not self.lines:
            raise Misuse(f"{self._name} has no items")

    def _note_line(self, number: int, line: bytes | dict[str, Any]) -> None:
        request = self._request(line)

        first = self.lines.setdefault(request.key, number)
        if first != number and request.key == _digest(line):
            raise Misuse(f"this line equals line {first}: give it a key to run it twice")
        if first != number:
            raise Misuse(f"the key {quoted(request.key)} is already used in line {first}")

        target = request.workflow, request.label, request.version
        names = tuple(request.inputs)
        self._starts.setdefault(target, {}).setdefault(names, []).append(number)

    def _refuse(self, problems: Mapping[int, str]) -> None:
        """Raise `Misuse` if any line has a problem. Name each problem once, with its lines."""
        lines: dict[str, list[int]] = {}
        for number, problem in sorted(problems.items()):
            lines.setdefault(problem, []).append(number)

        mistakes = [f"{_numbered(numbers)}: {problem}" for problem, numbers in lines.items()]
        if not mistakes:
            return
        if len(mistakes) == 1:
            raise Misuse(f"{self._name}, {mistakes[0]}. Nothing was added")

        shown, hidden = mistakes[:20], mistakes[20:]
        for mistake in shown:
            err(mistake)
        more = f" ({len(hidden)} more mistakes are not shown)" if hidden else ""
        raise Misuse(f"{self._name} has {len(problems)} invalid lines{more}. Nothing was added")

    async def check_inputs(self, session: Session, batch: Batch, base_url: str | None) -> None:
        """Refuse lines that cannot run, unless the batch has them already."""
        problems = await self._find_problems(session, base_url)
        keys = {number: key for key, number in self.lines.items() if number in problems}
        known = await batch.kinds(keys.values())
        new = {number: problem for number, problem in problems.items() if keys[number] not in known}
        self._refuse(new)

    async def _find_problems(self, session: Session, base_url: str | None) -> dict[int, str]:
        """Return what is wrong with the workflow or the inputs of lines, by their numbers.

        It requests the definition of each workflow once. If a request fails, it stops and leaves
        the rest unchecked: with a server that is down, each request would take seconds.
        """
        problems: dict[int, str] = {}

        for (workflow, label, version), given in self._starts.items():
            try:
                found = await definition(session, workflow, label=label, version=version)
            except Unauthorized:
                THIS_SUBJECT.get().note = "Nothing was added"
                raise
            except RequestError as error:
                if not isinstance(error, NotFound) or is_from_gateway(error):
                    err(f"could not check the inputs: {explain(error)}")
                    break
                likely = await near_workflow(session, workflow)
                problem = _not_found(workflow, label, version, likely, base_url)
                for numbers in given.values():
                    problems |= dict.fromkeys(numbers, problem)
                continue

            not_required = set[str]()
            for names, numbers in given.items():
                try:
                    found.check_inputs(dict.fromkeys(names))
                except ValueError as error:
                    problems |= dict.fromkeys(numbers, needs(error, workflow, base_url))
                else:
                    not_required |= {*names} - {*(found.required_inputs or names)}
            if not_required:
                listed = shorten(", ".join(map(quoted, sorted(not_required))), 200)
                err(f"note: {_named(workflow)} does not require {listed} (sent anyway)")

        return problems

    def __iter__(self) -> Iterator[StartRequest]:
        for _, line in self._lines():
            yield self._request(line)

    def _lines(self) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
        """Yield the number and the text of each line, or the cells of each row by column."""
        try:
            if self._path.suffix.lower() == ".csv":
                yield from self._rows()
                return

            with self._path.open("rb") as file:
                if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                    file.seek(0)
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, line
        except OSError as error:
            raise Misuse(f"cannot read {self._name}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise Misuse(f"{self._name} is not UTF-8 text: save it as 'CSV UTF-8'") from error
        except csv.Error as error:
            raise Misuse(f"{self._name} is not CSV: {error}") from error

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with self._path.open(encoding="utf-8-sig", newline="") as file:
            # Excel writes semicolons in countries with a comma as the decimal mark.
            header = re.sub('"[^"]*("|$)', "", file.readline())
            separator = next((character for character in ",;\t" if character in header), ",")
            file.seek(0)

            reader = csv.DictReader(file, strict=True, delimiter=separator)
            columns = reader.fieldnames or []
            meanings = Counter(map(_meaning, columns))
            same = [printable(name) for name in columns if meanings[_meaning(name)] > 1]
            if same:
                listed = ", ".join(dict.fromkeys(same))
                raise Misuse(f"{self._name} has columns of the same name: {listed}")

            for row in reader:
                yield reader.line_num, row

    def _request(self, line: bytes | dict[str, Any]) -> StartRequest:
        """Return the item of a line, or raise `Misuse` with the reason why it is none."""
        fields = _parse(line) if isinstance(line, bytes) else _row_fields(line)
        if "key" not in fields:
            fields["key"] = _digest(line)
        return _checked({"workflow": self._workflow} | fields)


def _numbered(numbers: list[int]) -> str:
    """Return `line 7`, `lines 7, 8`, or `lines 7, 8, 9 and 4 more`."""
    text = "line " if len(numbers) == 1 else "lines "
    text += ", ".join(map(str, numbers[:3]))
    if len(numbers) > 3:
        text += f" and {len(numbers) - 3} more"
    return text


def _digest(line: bytes | dict[str, Any]) -> str:
    if not isinstance(line, bytes):
        line = json.dumps(line).encode()
    return hashlib.sha256(line.strip()).hexdigest()[:20]


def _meaning(column: str) -> str:
    """Return the name of a column, with its prefix if it is an input."""
    if column.startswith(_METADATA) or column in _FIELDS.keys() - {"inputs", "metadata"}:
        return column
    return _INPUT + column.removeprefix(_INPUT)


def _row_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an item from the cells of a row. An empty one is a missing field."""
    if None in row or None in row.values():
        raise Misuse("must have as many cells as the first line has columns")

    fields: dict[str, Any] = {"inputs": {}}
    for column, text in row.items():
        name = _meaning(column)
        if name.startswith(_INPUT):
            fields["inputs"][name.removeprefix(_INPUT)] = text
        elif text and name.startswith(_METADATA):
            fields.setdefault("metadata", {})[name.removeprefix(_METADATA)] = text
        elif text and name == "version" and text.isdecimal():
            fields[name] = int(text)
        elif text:
            fields[name] = text
    return fields


def _checked(fields: dict[str, Any]) -> StartRequest:
    for name, value in fields.items():
        if name not in _FIELDS:
            known = ", ".join(_FIELDS)
            raise Misuse(f"{quoted(name)} is not one of {known}")

        kind, expected = _FIELDS[name]
        if name == "workflow" and value is None:
            continue
        if not isinstance(value, kind) or isinstance(value, bool):
            raise Misuse(f'"{name}" must be {expected}')
        if isinstance(value, int) and not 1 <= value <= MAX_ID:
            raise Misuse(f'"{name}" must be between 1 and 2**63-1')

    if not all(isinstance(value, str) for value in fields.get("metadata", {}).values()):
        raise Misuse('"metadata" must be an object of strings')
    if "label" in fields and "version" in fields:
        raise Misuse('use "label" or "version", not both')

    request = StartRequest(**fields)
    if request.workflow in (None, ""):
        raise Misuse('no workflow: give --workflow NAME, or add a "workflow" to the line')
    if not request.key:
        raise Misuse('"key" must not be empty')
    return request


def _parse(text: bytes) -> dict[str, Any]:
    """Return the fields of a line. null means a missing field, except for the inputs."""
    try:
        # With the line's end, what ends too early would be invalid in column 1 of the next.
        line = text.decode().rstrip("\r\n")
        fields = json.loads(line, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise Misuse(f"not UTF-8 text: byte {error.start + 1} is invalid") from error
    except json.JSONDecodeError as error:
        raise Misuse(f"not valid JSON: {error.msg}, column {error.colno}") from error

    if not isinstance(fields, dict):
        raise Misuse('not a JSON object like {"key": "a", "inputs": {}}')
    return {name: value for name, value in fields.items() if value is not None or name == "inputs"}


def _refuse_constant(constant: str) -> NoReturn:
    raise Misuse(f"{constant} is not a JSON number")


def _not_found(
    workflow: str | int,
    label: str | None,
    version: int | None,
    likely: str | None,
    base_url: str | None,
) -> str:
    which = ""
    if label is not None:
        which = f" with the label {quoted(label)}"
    if version is not None:
        which = f" with a version {version}"
    question = "" if likely is None else f" Did you mean {quoted(likely)}?"
    command = suggest("workflows", base_url)
    return f"there is no {_named(workflow)}{which}.{question} `{command}` lists names and labels"


def _named(workflow: str | int) -> str:
    return f"workflow {quoted(str(workflow))}"
