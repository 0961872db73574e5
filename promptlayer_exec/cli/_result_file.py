"""The results of a batch, as lines on standard output or in a file, or as a table in CSV."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import AsyncIterable, Iterator
from contextlib import aclosing, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from promptlayer_exec._integration import printable
from promptlayer_exec.cli._exit import Misuse, hint
from promptlayer_exec.cli._printing import out

if TYPE_CHECKING:
    from promptlayer_exec.dbos import Batch, StoredOutcome

if sys.platform == "win32":  # pragma: no cover
    import msvcrt
else:
    import fcntl

csv.field_size_limit(2**31 - 1)  # a cell can be as long as any output


class Result(NamedTuple):
    """A result in a file."""

    key: str
    finished: str
    succeeded: bool


async def write_results(batch: Batch, file: Results, *, until_done: bool) -> None:
    """Write the results of a batch. With `until_done`, wait for the rest of the items."""
    async with aclosing(batch.outcomes(until_done=until_done)) as outcomes:
        if file is not None:
            await file.write_all(outcomes)
            return

        async for outcome in outcomes:
            out(outcome.to_json())


@contextmanager
def open_results(path: Path | None, *, helping: str = "") -> Iterator[Results]:
    """Open the results at a path, whose suffix decides the format. None means standard output.

    It locks the file, because two writers would write each result twice. If the command fails
    before it writes anything, it removes a new file.

    `helping` is the command with which to help another process that has locked it.
    """
    if path is None:
        yield None
        return

    name = printable(str(path))
    is_table = path.suffix.lower() == ".csv"
    # A table gets replaced, which Windows refuses for an open file: so another file is locked.
    locked = path.with_name(path.name + ".lock") if is_table else path
    try:
        if path.is_char_device():  # reading it to its end would take forever
            raise Misuse(f"{name} is a device: give a file, or omit --out")
        is_new = not locked.exists()
        opened = _open_locked(locked, name)
    except _Locked as error:
        way_out = hint("If it runs this batch, help it with:", helping) if helping else ""
        problem = f"another process is writing to {name}: use another --out"
        raise Misuse(problem, hint=way_out) from error
    except OSError as error:
        raise _cannot_write(name, error) from error

    file: LineFile | TableFile | None = None
    with opened:
        try:
            file = TableFile(path, name) if is_table else LineFile(path, opened, name)
            yield file
        finally:
            is_written = isinstance(file, LineFile) and file.is_written
            if is_table or (is_new and not is_written):
                _remove(locked, opened)


class LineFile:
    """Results as lines appended to a file."""

    def __init__(self, path: Path, file: FileIO, name: str) -> None:
        self.name = name
        self.results: set[Result] = set()
        self.is_written = False
        self._file = file
        self._length = 0  # of the whole lines, without one that a crash cut off

        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                is_whole = line.endswith(b"\n")
                if not is_whole and _is_cut_off(line):
                    break
                try:
                    fields = json.loads(line)
                    key, finished = str(fields["key"]), str(fields["finished"])
                    result = Result(key, finished, fields["succeeded"])
                except (ValueError, TypeError, KeyError) as error:
                    problem = f"line {number} of {name} is not a result. The file is unchanged"
                    raise Misuse(problem) from error
                if is_whole:
                    self.results.add(result)
                    self._length += len(line)

    async def write_all(self, outcomes: AsyncIterable[StoredOutcome]) -> None:
        """Write each result as soon as there is one, unless the file already contains it."""
        self.is_written = True
        self._file.truncate(self._length)
        async for outcome in outcomes:
            if Result(outcome.key, outcome.finished.isoformat(), outcome.succeeded) in self.results:
                continue

            line = outcome.to_json().encode() + b"\n"
            try:
                while line:  # a write can be partial, for example when the disk gets full
                    line = line[self._file.write(line) :]
            except OSError as error:
                raise _cannot_write(self.name, error) from error


def _is_cut_off(line: bytes) -> bool:
    """Return True for a line that is only part of a result, because of a crash."""
    start = b'{"key": "'
    if line[: len(start)] != start[: len(line)]:
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


class TableFile:
    """Results as a table in CSV. It writes the whole file, and then moves it into place."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self._path = path

        try:
            self.results = set(_read_csv(path))
        except FileNotFoundError:
            self.results = set()
        except (OSError, ValueError, KeyError, csv.Error) as error:
            problem = f"cannot read results from {name}: use another file"
            raise Misuse(problem) from error

    async def write_all(self, outcomes: AsyncIterable[StoredOutcome]) -> None:
        """Write all results, and then replace the file."""
        part = self._path.with_name(self._path.name + ".part")
        try:
            await _write_csv(part, outcomes)
            part.replace(self._path)
        except OSError as error:
            raise _cannot_write(self.name, error) from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


Results: TypeAlias = LineFile | TableFile | None


async def _write_csv(path: Path, outcomes: AsyncIterable[StoredOutcome]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        columns = "key execution_id succeeded output error_type error_message started finished"
        writer.writerow(columns.split())
        async for outcome in outcomes:
            writer.writerow(_cells(outcome))


def _cells(outcome: StoredOutcome) -> tuple[object, ...]:
    output = outcome.output
    if outcome.succeeded and not isinstance(output, str):
        output = json.dumps(output)

    error = outcome.error
    return (
        outcome.key,
        outcome.execution_id,
        json.dumps(outcome.succeeded),
        output,
        error and error.type,
        error and error.message,
        outcome.started and outcome.started.isoformat(),
        outcome.finished.isoformat(),
    )


def _read_csv(path: Path) -> Iterator[Result]:
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield Result(row["key"], row["finished"], row["succeeded"] == "true")


def _open_locked(path: Path, name: str) -> FileIO:
    """Open and lock a file, or raise an `OSError` if that fails."""
    while True:
        file = path.open("a+b", buffering=0)
        try:
            _lock(file, name)
            if _is_at(path, file):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _is_at(path: Path, file: FileIO) -> bool:
    """Return False if the file's last owner removed it before this process locked it."""
    if sys.platform == "win32":  # pragma: no cover - it does not remove an open file
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


class _Locked(Exception):
    """Another process has locked the file."""


def _lock(file: FileIO, name: str) -> None:
    try:
        if sys.platform == "win32":  # pragma: no cover
            file.seek(2**62)  # far beyond what anybody writes
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # the latter on Windows
        raise _Locked from error
    except OSError as error:
        raise Misuse(f"cannot lock {name}: {error.strerror or error}") from error


def _remove(path: Path, file: FileIO) -> None:
    """Remove a locked file, and unlock it."""
    # Windows does not remove an open file. Elsewhere, remove it before the lock is released, or the
    # next owner loses its file.
    if sys.platform == "win32":  # pragma: no cover
        file.close()
    with suppress(OSError):
        path.unlink()


def _cannot_write(name: str, error: OSError) -> Misuse:
    return Misuse(f"cannot write to {name}: {error.strerror or error}")
