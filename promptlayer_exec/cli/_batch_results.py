"""The results of a batch: lines on standard output or in a file, or a table in CSV or Parquet."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import AsyncIterable, Iterator
from contextlib import aclosing, closing, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeAlias

from promptlayer_exec.cli._exit import Misuse
from promptlayer_exec.cli._text import Writer, out, printable

if TYPE_CHECKING:
    from promptlayer_exec.dbos import Batch, StoredOutcome

if sys.platform == "win32":  # pragma: no cover
    import msvcrt
else:
    import fcntl

csv.field_size_limit(2**31 - 1)  # a cell can be as long as any output

_RESULT_START = b'{"key": "'
_COLUMNS = (
    *("key", "execution_id", "succeeded", "output"),
    *("error_type", "error_message", "started", "finished"),
)
_RESULT_COLUMNS = ["key", "finished", "succeeded", "execution_id", "error_type"]
_ROW_GROUP = 1000


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
        self._is_unused = False
        self._whole: int | None = 0  # how many bytes to keep when the first line is written
        try:
            if path.is_char_device():  # to read what it has would take for ever
                raise Misuse(f"{self.name} is a device: name a file, or omit --out")
            is_new = not path.exists()
            self._file = path.open("a+b")
        except OSError as error:
            raise _cannot_write(self.name, error) from error
        try:
            _lock(self._file, self.name)
            path.stat()  # a command that was refused may just have removed it
            for result, length in self._read(self._file):
                self._written.add(result[:2])
                self._whole += length
            self._is_unused = is_new and not self._whole
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
        self._is_unused = False
        async for outcome in outcomes:
            self.write(outcome)

    def write(self, outcome: StoredOutcome) -> None:
        """Write a line and flush it, unless the file already contains it."""
        if (outcome.key, outcome.finished.isoformat()) in self._written:
            return
        try:
            if self._whole is not None:
                self._file.truncate(self._whole)  # without a last line that a crash cut off
                self._whole = None
            self._file.write(outcome.to_json().encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise _cannot_write(self.name, error) from error

    def close(self) -> None:
        """Close the file, and remove it if it was made for a command that was refused."""
        if self._is_unused:
            with suppress(OSError):  # Windows does not remove an open file
                self._path.unlink()
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
