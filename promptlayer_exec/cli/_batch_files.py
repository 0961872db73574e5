"""The files of a batch: its items in JSON Lines or CSV, and its results in these or Parquet."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import AsyncIterable, Container, Iterator, Mapping
from contextlib import aclosing, closing
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias

from promptlayer_exec import StartRequest
from promptlayer_exec.cli._exit import Misuse
from promptlayer_exec.cli._stdio import Writer, err, out
from promptlayer_exec.cli._text import printable, shorten

if TYPE_CHECKING:
    from promptlayer_exec.cli._inputs import Target
    from promptlayer_exec.dbos import Batch, StoredOutcome

if sys.platform == "win32":  # pragma: no cover
    import msvcrt
else:
    import fcntl

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
_RESULT_START = b'{"key": "'
_COLUMNS = (
    *("key", "execution_id", "succeeded", "output"),
    *("error_type", "error_message", "started", "finished"),
)
_RESULT_COLUMNS = ["key", "finished", "succeeded", "execution_id", "error_type"]
_ROW_GROUP = 1000


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
        # The numbers of the lines, by what is started and by the names of its inputs.
        self.starts: dict[Target, dict[tuple[str, ...], list[int]]] = {}
        if path.is_fifo() or path.is_char_device():
            raise Misuse(f"{self._name} is read twice: write the items to a regular file first")
        problems: dict[int, str] = {}
        first_lines: dict[str, int] = {}
        for number, line in self._lines():
            try:
                request = self._request(number, line)
            except Misuse as error:
                problems[number] = str(error)
                continue
            first = first_lines.setdefault(request.key, number)
            if first == number:
                target = request.workflow, request.label, request.version
                names = tuple(request.inputs)
                self.starts.setdefault(target, {}).setdefault(names, []).append(number)
                continue
            what = f"the key '{shorten(printable(request.key), 100)}' is already used in"
            if request.key == _digest(line):
                what = "a key is missing: without one, this line is the same item as"
            problems[number] = f"{what} line {first}"
        self.refuse(problems)
        if not first_lines:
            raise Misuse(f"{self._name} has no items")
        self.count = len(first_lines)

    def refuse(self, problems: Mapping[int, str]) -> None:
        """Report what is wrong with lines, by their numbers, and raise `Misuse` if something is."""
        for number, problem in islice(sorted(problems.items()), _MAX_SHOWN):
            err(f"line {number}: {problem}")
        if problems:
            count = f"{len(problems)} invalid line{'s' * (len(problems) > 1)}"
            shown = f", {_MAX_SHOWN} of them shown" if len(problems) > _MAX_SHOWN else ""
            raise Misuse(f"{self._name} has {count}{shown}; nothing was added")

    def keys(self, numbers: Container[int]) -> Iterator[tuple[int, str]]:
        """Yield the number and the key of those of the lines."""
        for number, line in self._lines():
            if number in numbers:
                yield number, self._request(number, line).key

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
        raise Misuse("must have as many cells as the first line has columns")
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


class Result(NamedTuple):
    """A result that a file has; `may_be_paid` unless the start was refused."""

    key: str
    finished: str
    succeeded: bool
    may_be_paid: bool


def _result(key: str, finished: str, succeeded: bool, execution_id: Any, kind: Any) -> Result:
    is_paid = succeeded or bool(execution_id) or kind == "StartUnknown"
    return Result(key, finished, succeeded, is_paid)


def open_results(path: Path | None) -> Results:
    """Return the results for a path, by its suffix; standard output for none."""
    if path is None:
        return StandardOutput()
    return (TableFile if path.suffix.lower() in _TABLES else LineFile)(path)


async def write_results(batch: Batch, file: Results, *, until_done: bool) -> None:
    """Write the results of a batch; `until_done`, also those of the items that end later."""
    async with aclosing(batch.outcomes(until_done=until_done)) as outcomes:
        await file.write_all(outcomes)


class StandardOutput:
    """Results on standard output, one a line: it gets all of them."""

    name = "standard output"

    def __init__(self) -> None:
        self._writer = Writer("stdout")

    def results(self) -> Iterator[Result]:
        """Yield nothing."""
        return iter(())

    async def write_all(self, outcomes: AsyncIterable[StoredOutcome]) -> None:
        """Write all results, as soon as they are read there."""
        async for outcome in outcomes:
            await self._writer.call(out, outcome.to_json())

    def close(self) -> None:
        """Stop writing."""
        self._writer.close()


class LineFile:
    """Results, one a line, in a file that is continued.

    The file is locked until it is closed: with two writers, each result would be there twice.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = printable(str(path))
        self._written: set[tuple[str, str]] = set()
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise _cannot_write(self.name, error) from error
        try:
            _lock(self._file, self.name)
            end = 0
            for result, length in self._read(self._file):
                self._written.add(result[:2])
                end += length
            self._file.truncate(end)  # without a last line that a crash cut off
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise _cannot_write(self.name, error) from error
            raise

    def results(self) -> Iterator[Result]:
        """Yield the results that the file has."""
        with self._path.open("rb") as file:
            for result, _ in self._read(file):
                yield result

    def _read(self, file: IO[bytes]) -> Iterator[tuple[Result, int]]:
        """Yield each result with the length of its line, except an incomplete last one."""
        file.seek(0)
        for number, line in enumerate(file, 1):
            is_whole = line.endswith(b"\n")
            try:
                fields = json.loads(line)
                result = _result(
                    str(fields["key"]),
                    str(fields["finished"]),
                    fields["succeeded"],
                    fields.get("execution_id"),
                    (fields.get("error") or {}).get("type"),
                )
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                # What a power failure cuts off can be zeros.
                text = line.rstrip(b"\0")
                is_start = text[: len(_RESULT_START)] == _RESULT_START[: len(text)]
                if is_start and not is_whole and isinstance(error, ValueError):
                    return
                where = f"{self.name}, line {number}"
                raise Misuse(f"{where}, is not a result; the file is unchanged") from error
            if not is_whole:
                return
            yield result, len(line)

    async def write_all(self, outcomes: AsyncIterable[StoredOutcome]) -> None:
        """Write all results, each at once."""
        async for outcome in outcomes:
            self.write(outcome)

    def write(self, outcome: StoredOutcome) -> None:
        """Write a line and flush it, unless the file already contains it."""
        if (outcome.key, outcome.finished.isoformat()) in self._written:
            return
        try:
            self._file.write(outcome.to_json().encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self.name, error) from error

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError as error:  # a line that could not be written is tried once more
            raise _cannot_write(self.name, error) from error


class TableFile:
    """Results as a table, CSV or Parquet, which is written as a whole and then put in place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = printable(str(path))
        self._table = _TABLES[path.suffix.lower()]
        if self._table is _Parquet:
            _pyarrow()  # before hours of work, not after them
        self._part = path.with_name(path.name + ".part")
        try:
            self._lock = self._part.open("ab")
        except OSError as error:
            raise _cannot_write(self.name, error) from error
        try:
            _lock(self._lock, self.name)
        except BaseException:
            self._lock.close()
            raise

    def results(self) -> Iterator[Result]:
        """Yield the results that the file has."""
        if self._path.exists():
            try:
                yield from self._table.read(self._path)
            except (OSError, ValueError, KeyError, csv.Error) as error:
                what = f"{self.name} has no results that can be read: use another file"
                raise Misuse(what) from error

    async def write_all(self, outcomes: AsyncIterable[StoredOutcome]) -> None:
        """Write all results, and then replace the file."""
        try:
            with closing(self._table(self._part)) as table:
                async for outcome in outcomes:
                    table.write(outcome)
            self._part.replace(self._path)
        except OSError as error:
            raise _cannot_write(self.name, error) from error

    def close(self) -> None:
        """Unlock the file."""
        self._part.unlink(missing_ok=True)
        self._lock.close()


class _Csv:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(_COLUMNS)

    def write(self, outcome: StoredOutcome) -> None:
        row = _row(outcome)
        if row["succeeded"] and not isinstance(outcome.output, str):
            row["output"] = json.dumps(outcome.output)
        for name in ("started", "finished"):
            row[name] = row[name] and row[name].isoformat()
        row["succeeded"] = json.dumps(row["succeeded"])
        self._writer.writerow(row.values())

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def read(path: Path) -> Iterator[Result]:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                values: list[Any] = [row[name] for name in _RESULT_COLUMNS]
                values[2] = row["succeeded"] == "true"
                yield _result(*values)


class _Parquet:
    def __init__(self, path: Path) -> None:
        arrow = _pyarrow()
        kinds: dict[str, Any] = dict.fromkeys(_COLUMNS, arrow.string())
        kinds |= {"execution_id": arrow.int64(), "succeeded": arrow.bool_()}
        kinds |= dict.fromkeys(("started", "finished"), arrow.timestamp("us", tz="UTC"))
        self._schema = arrow.schema(kinds)
        self._writer = arrow.parquet.ParquetWriter(path, self._schema)
        self._rows: list[dict[str, Any]] = []

    def write(self, outcome: StoredOutcome) -> None:
        row = _row(outcome)
        if row["succeeded"]:
            row["output"] = json.dumps(outcome.output)
        row["error_message"] = row["error_message"] and _valid(row["error_message"])
        self._rows.append(row)
        if len(self._rows) == _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(_pyarrow().Table.from_pylist(self._rows, self._schema))
        self._rows = []

    def close(self) -> None:
        self._flush()
        self._writer.close()

    @staticmethod
    def read(path: Path) -> Iterator[Result]:
        with _pyarrow().parquet.ParquetFile(path) as file:
            for part in file.iter_batches(columns=_RESULT_COLUMNS):
                for row in part.to_pylist():
                    values = [row[name] for name in _RESULT_COLUMNS]
                    values[1] = row["finished"].isoformat()
                    yield _result(*values)


_TABLES: dict[str, type[_Csv | _Parquet]] = {".csv": _Csv, ".parquet": _Parquet}
Results: TypeAlias = StandardOutput | LineFile | TableFile


def _row(outcome: StoredOutcome) -> dict[str, Any]:
    error = outcome.error
    return {
        "key": outcome.key,
        "execution_id": outcome.execution_id,
        "succeeded": outcome.succeeded,
        "output": outcome.output,
        "error_type": error and error.type,
        "error_message": error and error.message,
        "started": outcome.started,
        "finished": outcome.finished,
    }


def _valid(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _pyarrow() -> ModuleType:
    try:
        import_module("pyarrow.parquet")  # optional, and slow
        return import_module("pyarrow")
    except ModuleNotFoundError as error:
        raise Misuse("Parquet needs pyarrow: pip install pyarrow") from error


def _lock(file: IO[bytes], name: str) -> None:
    try:
        if sys.platform == "win32":  # pragma: no cover
            file.seek(2**62)  # a byte that nobody writes
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        what = f"another process is writing to {name}: let it do so, and help it with `batch work`"
        raise Misuse(f"{what}, or use another --out") from error
    except OSError as error:
        raise Misuse(f"cannot lock {name}: {error.strerror or error}") from error


def _cannot_write(name: str, error: OSError) -> Misuse:
    return Misuse(f"cannot write to {name}: {error.strerror or error}")
