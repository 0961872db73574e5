"""The results of a batch: lines on standard output or in a file, or a table in CSV or Parquet."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import AsyncIterable, Iterator
from contextlib import aclosing, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeAlias

from promptlayer_exec._integration import printable
from promptlayer_exec.cli._exit import Misuse
from promptlayer_exec.cli._text import out

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
_RESULT_COLUMNS = ["key", "finished", "succeeded"]
_CSV, _PARQUET = ".csv", ".parquet"
_ROW_GROUP = 1000


class Result(NamedTuple):
    """A result that a file has."""

    key: str
    finished: str
    succeeded: bool


async def write_results(batch: Batch, file: Results, *, until_done: bool) -> None:
    """Write the results of a batch; `until_done`, also those of the items that end later."""
    async with aclosing(batch.outcomes(until_done=until_done)) as outcomes:
        if file is not None:
            await file.write_all(outcomes)
            return
        async for outcome in outcomes:
            out(outcome.to_json())


@contextmanager
def open_results(path: Path | None) -> Iterator[Results]:
    """Open the results at a path, by its suffix; None stands for standard output."""
    if path is None:
        yield None
        return
    file = (TableFile if path.suffix.lower() in (_CSV, _PARQUET) else LineFile)(path)
    try:
        yield file
    finally:
        file.close()


class LineFile:
    """Results, one a line, in a file that is continued.

    The file is locked until it is closed: with two writers, each result would be there twice.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = printable(str(path))
        self.results: set[Result] = set()
        self._is_unused = False
        self._whole: int | None = None  # how many bytes to keep when the first line is written
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
            self._whole = self._read()
            self._is_unused = is_new and not self._whole
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise _cannot_write(self.name, error) from error
            raise

    def _read(self) -> int:
        """Read the results, and return the length of their lines, without an incomplete one."""
        self._file.seek(0)
        length = 0
        for number, line in enumerate(self._file, 1):
            is_whole = line.endswith(b"\n")
            try:
                fields = json.loads(line)
                result = Result(str(fields["key"]), str(fields["finished"]), fields["succeeded"])
            except (ValueError, TypeError, KeyError) as error:
                # What a power failure cuts off can be zeros.
                text = line.rstrip(b"\0")
                is_start = text[: len(_RESULT_START)] == _RESULT_START[: len(text)]
                if is_start and not is_whole and isinstance(error, ValueError):
                    break
                where = f"{self.name}, line {number}"
                raise Misuse(f"{where}, is not a result; the file is unchanged") from error
            if is_whole:
                self.results.add(result)
                length += len(line)
        return length

    async def write_all(self, outcomes: AsyncIterable[StoredOutcome]) -> None:
        """Write each result at once, unless the file already contains it."""
        self._is_unused = False
        async for outcome in outcomes:
            result = Result(outcome.key, outcome.finished.isoformat(), outcome.succeeded)
            if result in self.results:
                continue
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
        self._is_csv = path.suffix.lower() == _CSV
        if not self._is_csv:
            _pyarrow()  # before hours of work, not after them
        self._part = path.with_name(path.name + ".part")
        try:
            self._locked = self._part.open("ab")
        except OSError as error:
            raise _cannot_write(self.name, error) from error
        try:
            _lock(self._locked, self.name)
            self.results = self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> set[Result]:
        try:
            return set((_read_csv if self._is_csv else _read_parquet)(self._path))
        except FileNotFoundError:
            return set()
        except (OSError, ValueError, KeyError, csv.Error) as error:
            what = f"{self.name} has no results that can be read: use another file"
            raise Misuse(what) from error

    async def write_all(self, outcomes: AsyncIterable[StoredOutcome]) -> None:
        """Write all results, and then replace the file."""
        try:
            await (_write_csv if self._is_csv else _write_parquet)(self._part, outcomes)
            self._part.replace(self._path)
        except OSError as error:
            raise _cannot_write(self.name, error) from error

    def close(self) -> None:
        """Unlock the file."""
        self._part.unlink(missing_ok=True)
        self._locked.close()


Results: TypeAlias = LineFile | TableFile | None


def _row(outcome: StoredOutcome, output: str | None) -> dict[str, Any]:
    error_type, error_message = outcome.error or (None, None)
    times = outcome.started, outcome.finished
    start = outcome.key, outcome.execution_id, outcome.succeeded, output
    return dict(zip(_COLUMNS, (*start, error_type, error_message, *times), strict=True))


async def _write_csv(path: Path, outcomes: AsyncIterable[StoredOutcome]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        async for outcome in outcomes:
            output = outcome.output
            if outcome.succeeded and not isinstance(output, str):
                output = json.dumps(output)
            row = _row(outcome, output) | {"succeeded": json.dumps(outcome.succeeded)}
            for name in ("started", "finished"):
                row[name] = row[name] and row[name].isoformat()
            writer.writerow(row.values())


def _read_csv(path: Path) -> Iterator[Result]:
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield Result(row["key"], row["finished"], row["succeeded"] == "true")


async def _write_parquet(path: Path, outcomes: AsyncIterable[StoredOutcome]) -> None:
    arrow = _pyarrow()
    kinds: dict[str, Any] = dict.fromkeys(_COLUMNS, arrow.string())
    kinds |= {"execution_id": arrow.int64(), "succeeded": arrow.bool_()}
    kinds |= dict.fromkeys(("started", "finished"), arrow.timestamp("us", tz="UTC"))
    schema = arrow.schema(kinds)
    rows: list[dict[str, Any]] = []
    with arrow.parquet.ParquetWriter(path, schema) as writer:
        async for outcome in outcomes:
            row = _row(outcome, json.dumps(outcome.output) if outcome.succeeded else None)
            if (text := row["error_message"]) is not None:
                row["error_message"] = text.encode(errors="backslashreplace").decode()
            rows.append(row)
            if len(rows) == _ROW_GROUP:
                writer.write_table(arrow.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(arrow.Table.from_pylist(rows, schema))


def _read_parquet(path: Path) -> Iterator[Result]:
    with _pyarrow().parquet.ParquetFile(path) as file:
        for part in file.iter_batches(columns=_RESULT_COLUMNS):
            for row in part.to_pylist():
                yield Result(row["key"], row["finished"].isoformat(), row["succeeded"])


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
