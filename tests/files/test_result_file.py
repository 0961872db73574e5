"""Files of results, on every system: these tests need neither signals nor a terminal."""

from __future__ import annotations

import csv
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import attrs
import pytest

from promptlayer_exec.cli._exit import Misuse
from promptlayer_exec.cli._result_file import open_results

NOW = datetime(2026, 5, 1, 22, 0, tzinfo=UTC)


@attrs.frozen
class Outcome:
    """As much of a `StoredOutcome` as is written: that class needs PostgreSQL's library."""

    key: str
    execution_id: int = 7
    succeeded: bool = True
    output: str = "done"
    error: None = None
    started: datetime = NOW
    finished: datetime = NOW

    def to_json(self) -> str:
        """Return a line."""
        return f'{{"key": "{self.key}", "finished": "{NOW.isoformat()}", "succeeded": true}}'


async def outcomes(*keys: str) -> AsyncIterator[Outcome]:
    """Yield outcomes with these keys."""
    for key in keys:
        yield Outcome(key)


async def test_a_table_is_replaced(tmp_path: Path) -> None:
    """Nothing else is left beside it."""
    path = tmp_path / "out.csv"
    for keys in (("a",), ("a", "b")):
        with open_results(path) as file:
            await file.write_all(outcomes(*keys))
    with path.open(encoding="utf-8", newline="") as lines:
        assert [row["key"] for row in csv.DictReader(lines)] == ["a", "b"]
    assert os.listdir(tmp_path) == ["out.csv"]  # noqa: PTH208


async def test_lines_are_continued(tmp_path: Path) -> None:
    """A line that a crash has cut off is replaced."""
    path = tmp_path / "out.jsonl"
    with open_results(path) as file:
        await file.write_all(outcomes("a"))
    with path.open("ab") as lines:
        lines.write(b'{"key": "')
    with open_results(path) as file:
        await file.write_all(outcomes("a", "b"))
    text = path.read_text(encoding="utf-8")
    assert text.splitlines() == [Outcome(key).to_json() for key in "ab"]


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
async def test_a_file_has_one_writer(tmp_path: Path, name: str) -> None:
    """The second command is told; what writes nothing leaves nothing."""
    path = tmp_path / name
    with open_results(path):
        second = pytest.raises(Misuse, match="another process is writing to")
        with second, open_results(path):
            pass
    assert os.listdir(tmp_path) == []  # noqa: PTH208
    with open_results(path) as file:
        await file.write_all(outcomes("a"))
    assert os.listdir(tmp_path) == [name]  # noqa: PTH208
