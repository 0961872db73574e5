"""The files of a batch: items as JSON Lines and CSV, results as JSON Lines and CSV."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import resource
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from promptlayer_exec import StartRequest
from promptlayer_exec.cli._exit import Misuse
from promptlayer_exec.cli._item_file import ItemFile
from promptlayer_exec.cli._result_file import Result, open_results
from promptlayer_exec.dbos import StoredError, StoredOutcome

NOW = datetime(2026, 5, 1, 22, 0, tzinfo=UTC)
OUTCOMES = (
    StoredOutcome("a", 7, True, {"grade": [1, "é"]}, None, NOW, NOW),
    StoredOutcome("b", 8, True, 'text, with "quotes"\nand lines', None, NOW, NOW),
    StoredOutcome("c", None, False, None, StoredError("StartUnknown", "lost \ud800"), None, NOW),
)


async def each(outcomes: Iterable[StoredOutcome]) -> AsyncIterator[StoredOutcome]:
    """Yield outcomes as `Batch.outcomes` does."""
    for outcome in outcomes:
        yield outcome


def list_parts(directory: Path) -> list[Path]:
    """Return the files that are left of results that were being written."""
    return list(directory.glob("*.part"))


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_row_of_a_csv_file_is_an_item(tmp_path: Path, separator: str) -> None:
    """Columns without a meaning of their own are inputs; a cell can have several lines."""
    path = tmp_path / "night.csv"
    text = (
        "key|topic|inputs.version|workflow|version|metadata.job\r\n"
        'a|"otters,\r\nand seals"|x|||7\r\n'
        "b||y|other|3|\r\n"
    )
    path.write_text(text.replace("|", separator), encoding="utf-8-sig", newline="")
    items = ItemFile(path, "grade")
    assert len(items.lines) == 2
    assert list(items) == [
        StartRequest(
            "grade",
            {"topic": "otters,\r\nand seals", "version": "x"},
            metadata={"job": "7"},
            key="a",
        ),
        StartRequest("other", {"topic": "", "version": "y"}, version=3, key="b"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        'key,"n; in t; or kg"\na,1\n',
        '"n; in t; or kg",key\n1,a\n',
        'key;"n, in t"\na;1\n',
        "key,n; in t; or kg\na,1\n",
    ],
)
def test_the_separator_is_not_one_in_a_name(tmp_path: Path, text: str) -> None:
    """Where the first line has a comma that is not in quotes, commas separate cells."""
    path = tmp_path / "night.csv"
    path.write_text(text)
    (item,) = ItemFile(path, "grade")
    assert (item.key, [*item.inputs.values()]) == ("a", ["1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("key,n\na,1\na,2\n", "CSV, line 3: the key 'a' is already used in line 2. Nothing"),
        ("n\n1\n2\n1\n", "CSV, line 4: this line equals line 2: give it a"),
        ('n,m\n"1\n",2\n1\n', "CSV, line 4: must have as many cells as the"),
        ("version\nx\n", 'CSV, line 2: "version" must be a number'),
        ("n,n\n1,2\n", "has columns of the same name: n"),
        ("n,inputs.n\n1,2\n", "has columns of the same name: n, inputs.n"),
        ("version\n99999999999999999999\n", 'CSV, line 2: "version" must be between'),
        ("n\n", "has no items"),
        ('n\n"1\n', "is not CSV: unexpected end of data"),
        ("n\n\udcff\n", "is not UTF-8 text: save it as 'CSV UTF-8'"),
    ],
)
def test_an_invalid_csv_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """The message says in which line, and what to do."""
    path = tmp_path / "night.CSV"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(Misuse, match=message):
        ItemFile(path, "grade")


def test_the_default_key_is_a_digest_of_the_line(tmp_path: Path) -> None:
    """A line that is added before it does not change it."""
    path, line = tmp_path / "night.jsonl", '{"inputs": {"n": 1}}\n'
    path.write_text(line)
    (before,) = ItemFile(path, "grade")
    path.write_text('{"inputs": {"n": 0}}\n' + line)
    items = ItemFile(path, "grade")
    assert [item.key for item in items][1] == before.key
    path.write_text(line + line)
    with pytest.raises(Misuse, match="line 2: this line equals line 1: give it a key"):
        ItemFile(path, "grade")


def test_a_device_is_no_file_for_results() -> None:
    """Some can be read without an end."""
    device = pytest.raises(Misuse, match="/dev/full is a device: give a file, or omit --out")
    with device, open_results(Path("/dev/full")):
        pass
    long = pytest.raises(Misuse, match=r"cannot write to .*: File name too long")
    with long, open_results(Path("x" * 300)):
        pass


def test_two_commands_do_not_write_to_one_file(tmp_path: Path) -> None:
    """The second gets an error, whatever the format is, and can use the file after the first."""
    for name in ("out.jsonl", "out.csv"):
        with (
            open_results(tmp_path / name),
            pytest.raises(Misuse, match=f"another process is writing to .*{name}"),
            open_results(tmp_path / name),
        ):
            pass
        with open_results(tmp_path / name):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_second_command_is_told_how_to_help(call: Callable[..., Any], tmp_path: Path) -> None:
    """The command has the name and the database of the batch."""
    (tmp_path / "night.jsonl").write_text('{"key": "a", "workflow": "echo", "inputs": {}}\n')
    with open_results(tmp_path / "out.jsonl"):
        code, _, err = call(
            *("batch", "run", "night.jsonl", "--out", "out.jsonl"),
            *("--db", "sqlite:///a.sqlite"),
        )
    assert code == 2
    assert err == (
        "another process is writing to out.jsonl: use another --out\n"
        "If it runs this batch, help it with:\n"
        "  promptlayer-exec batch work --name night --db sqlite:///a.sqlite\n"
    )


def test_a_lock_on_a_file_that_was_removed_meanwhile_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last owner removes it: the next command locks the file that has the name now."""
    path, lock = tmp_path / "out.csv", fcntl.flock

    def lock_late(file: Any, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        (tmp_path / "out.csv.lock").unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with (
        open_results(path),
        pytest.raises(Misuse, match="another process is writing to"),
        open_results(path),
    ):
        pass


def test_windows_refuses_a_lock_as_it_refuses_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which it does by another error than other systems: the message is the same."""

    def refuse(file: Any, how: int) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(Misuse, match="another process is writing to"), open_results(tmp_path / "o"):
        pass


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="it lists open files on Linux only")
async def test_no_file_that_is_replaced_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows would refuse to replace it."""
    path, replace = tmp_path / "out.csv", Path.replace
    replaced = []

    def check(source: Path, target: Path) -> Path:
        for descriptor in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):
                assert descriptor.readlink() not in (source, target)
        replaced.append(target)
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", check)
    for _ in range(2):
        with open_results(path) as file:
            await file.write_all(each(OUTCOMES))
    assert replaced == [path, path]
    assert os.listdir(tmp_path) == ["out.csv"]  # noqa: PTH208


async def test_a_file_for_results_is_made_if_there_are_none(tmp_path: Path) -> None:
    """Of a batch of which no item has ended; before it is written, an existing one is unchanged."""
    path = tmp_path / "out.jsonl"
    with open_results(path) as file:
        await file.write_all(each(()))
    assert path.read_text() == ""
    path.write_text(torn := '{"key": "')
    with open_results(path):
        assert path.read_text() == torn
    assert path.read_text() == torn


@pytest.mark.parametrize("rest", ["", '{"ke', '{"key": "b", "fini'])
async def test_a_last_line_that_a_crash_cut_is_mended(tmp_path: Path, rest: str) -> None:
    """Also one that lacks only its line break."""
    path = tmp_path / "out.jsonl"
    lines = [outcome.to_json() for outcome in OUTCOMES]
    path.write_text(f"{lines[0]}\n{rest or lines[1]}")
    with open_results(path) as file:
        assert [result.key for result in file.results] == ["a"]
        await file.write_all(each(OUTCOMES))
    assert path.read_text().splitlines() == lines


async def test_a_line_that_cannot_be_written_is_an_error_that_says_so(tmp_path: Path) -> None:
    """Also when the file is closed after it, and the next command mends the file."""
    path = tmp_path / "out.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as a disk that is full
    try:
        with (
            pytest.raises(Misuse, match=r"^cannot write to .*out\.jsonl: File too large$"),
            open_results(path) as file,
        ):
            await file.write_all(each(OUTCOMES[:1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == 100
    with open_results(path) as file:
        await file.write_all(each(OUTCOMES[:1]))
    assert path.read_text() == OUTCOMES[0].to_json() + "\n"


async def test_a_csv_file_of_results(tmp_path: Path) -> None:
    """A text is written as it is, and another output as JSON; the whole file is replaced."""
    path = tmp_path / "out.csv"
    for outcomes in (OUTCOMES[:1], OUTCOMES):
        with open_results(path) as file:
            await file.write_all(each(outcomes))
    with open_results(path) as file:
        results = file.results
    with path.open(encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    assert [row["output"] for row in rows] == [
        json.dumps({"grade": [1, "é"]}),
        OUTCOMES[1].output,
        "",
    ]
    assert rows[2]["error_message"] == "lost \\ud800"
    assert [row["execution_id"] for row in rows] == ["7", "8", ""]
    assert results == {Result(it.key, NOW.isoformat(), it.succeeded) for it in OUTCOMES}
    assert not list_parts(tmp_path)


def test_a_table_that_has_no_results_is_refused(tmp_path: Path) -> None:
    """It is not replaced by accident."""
    path = tmp_path / "out.csv"
    path.write_text("mine\n1\n")
    with pytest.raises(Misuse, match="use another file"), open_results(path):
        pass
    assert path.read_text() == "mine\n1\n"
