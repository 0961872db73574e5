"""What the viewer remembers of executions, in a real file."""

from __future__ import annotations

import sqlite3
import stat
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import pytest

from promptlayer_exec import ConfigurationError, NodeTimes, Session
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.viewer import Board, History
from promptlayer_exec.viewer import _history as histories
from promptlayer_exec.viewer._timeline import Timeline

DONE = Scenario([SimNode("n", "v", is_output_node=True)])


@pytest.fixture
async def history(tmp_path: Path) -> AsyncIterator[History]:
    """Return a history of one server that remembers five executions."""
    history = History(tmp_path / "state" / "history.sqlite", server="http://a", limit=5)
    yield history
    await history.aclose()


def _record(history: History, execution_id: int | None, **fields: Any) -> None:
    given = {"workflow": "w", "outcome": "succeeded", "began": 1000.0 + (execution_id or 0)}
    history.record(execution_id=execution_id, **{**given, **fields})


async def ids(history: History, text: str = "", **filters: Any) -> list[str | None]:
    """Return the ids of a search."""
    return [entry["execution_id"] for entry in (await history.search(text, **filters))["entries"]]


async def test_only_the_latest_are_remembered(history: History, tmp_path: Path) -> None:
    """The newest come first; ids of another server are others."""
    for execution_id in range(1, 8):
        _record(history, execution_id)
    assert await ids(history) == ["7", "6", "5", "4", "3"]
    other = History(tmp_path / "state" / "history.sqlite", server="http://b", limit=5)
    assert await ids(other) == []
    _record(other, 7, outcome="failed")
    assert (await history.search())["counts"]["failed"] == 0
    await other.delete_all()
    await other.aclose()
    assert len(await ids(history)) == 5


async def test_the_file_is_for_its_user_alone(history: History, tmp_path: Path) -> None:
    """It holds inputs; what is deleted is overwritten."""
    _record(history, 1, inputs='{"letter": "a secret of Maria"}')
    await ids(history)
    path = tmp_path / "state" / "history.sqlite"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    await history.delete_all()
    await history.aclose()
    assert b"secret of Maria" not in path.read_bytes()


async def test_only_one_write_waits_for_a_locked_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is queued behind it is not recorded, and delays neither reading nor closing."""
    limits = attrs.evolve(histories.LIMITS, locked_file=0.2)
    monkeypatch.setattr(histories, "LIMITS", limits)
    history = History(tmp_path / "state" / "history.sqlite", server="http://a")
    assert await ids(history) == []
    other = sqlite3.connect(tmp_path / "state" / "history.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    for execution_id in range(1, 21):
        _record(history, execution_id)
    assert await history.find(1) is None
    assert time.monotonic() - began < 3.5  # 4 s, if each waited
    other.execute("ROLLBACK")
    other.close()
    _record(history, 21)
    assert await ids(history) == ["21"]
    await history.aclose()


async def test_a_search_finds_each_word_literally(history: History) -> None:
    """Words are found in workflow, id, inputs and error; percent signs are no patterns."""
    _record(history, 11, inputs='{"topic": "Otters 100%"}')
    _record(history, 12, workflow="other_flow", outcome="failed", problem="plan: HTTP 503")
    _record(history, None, outcome="unknown", began=5000.0, problem="no answer")
    assert await ids(history, "otters 100%") == ["11"]
    assert await ids(history, "0%") == ["11"]
    assert await ids(history, "503") == ["12"]
    assert await ids(history, "other_flow") == ["12"]
    assert await ids(history, "otherXflow") == []
    assert await ids(history, "12") == ["12"]
    assert await ids(history, outcome="failed") == ["12"]
    assert await ids(history, workflow="w") == [None, "11"]
    assert await ids(history, since=1012.0) == [None, "12"]
    found = await history.search(outcome="unknown")
    assert found["counts"] == {"running": 0, "succeeded": 1, "failed": 1, "lost": 0, "unknown": 1}
    assert found["matching"] == 1


async def test_what_is_known_is_kept(history: History) -> None:
    """A later visit adds what is new; a line that was deleted stays deleted."""
    _record(history, 1, outcome="running", inputs="{}", is_started=True, label="prod")
    _record(history, 1, outcome="succeeded", workflow=None, duration=2.5)
    known = await history.find(1)
    assert known is not None
    assert (known["workflow"], known["inputs"], known["label"]) == ("w", "{}", "prod")
    assert (known["outcome"], known["duration"], known["is_started"]) == ("succeeded", 2.5, 1)
    await history.delete(known["key"])
    history.update(1, outcome="failed")
    assert await history.find(1) is None
    assert await ids(history) == []


async def test_text_that_utf_8_cannot_hold_is_escaped(history: History) -> None:
    """Long inputs are not kept."""
    _record(history, 1, workflow="half \ud800", inputs="x" * 300_000)
    known = await history.find(1)
    assert known is not None
    assert (known["workflow"], known["inputs"]) == ("half \\ud800", None)


async def test_trends_are_the_latest_durations_of_each_workflow(history: History) -> None:
    """Durations of runs that others started are minimums."""
    _record(history, 1, duration=2.0, is_started=True)
    _record(history, 2, duration=3.0, outcome="failed")
    _record(history, 3, duration=None)
    _record(history, 4, workflow="newer", duration=1.0)
    newer, older = await history.trends()
    assert (newer["workflow"], older["workflow"], older["total"]) == ("newer", "w", 2)
    assert [(run["duration"], run["is_minimum"]) for run in older["runs"]] == [
        (2.0, False),
        (3.0, True),
    ]


async def test_a_history_that_cannot_be_used_stops_nothing(
    tmp_path: Path, session: Session, sim: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once, and executions are followed all the same."""
    path = tmp_path / "history.sqlite"
    path.write_text("no database at all, but long enough to be read as one" * 100)
    history = History(path, server="http://a")
    async with session, Board(session, history=history) as board:
        await board.add(sim.add_execution(DONE))
        await board.add(sim.add_execution(DONE))
        while any(card.state != "succeeded" for card in board.cards.values()):
            await board.changed.wait()
    (warning,) = [one.getMessage() for one in caplog.records if "history" in one.getMessage()]
    assert warning == (
        "the history of the viewer is incomplete: cannot use the database"
        f" sqlite:///{path}: file is not a database."
    )


async def test_the_board_remembers_what_it_followed(
    sim: Simulator, viewer: Any, session: Session, tmp_path: Path
) -> None:
    """Another viewer then knows workflow, inputs, outcome and duration."""
    sim.add_workflow("report", DONE)
    content = {"workflow": "report", "inputs": '{"topic": "otters"}', "version": "1"}
    _, started = await viewer.send("POST", "runs", content)
    sim.inject(Fault.disconnect(), path="/run")
    await viewer.send("POST", "runs", content)
    failing = sim.add_execution(Scenario([SimNode("a", status="FAILED", error_message="HTTP 503")]))
    silent = sim.add_execution(Scenario([SimNode("a", when=lambda _: False, is_output_node=True)]))
    for execution_id in (failing, silent):
        await viewer.send("POST", "executions", {"execution_id": str(execution_id)})
    while any(card.state in ("waiting", "running") for card in viewer.board.cards.values()):
        await viewer.board.changed.wait()
    _, found = await viewer.send("GET", "history?search=")
    entries = {entry["execution_id"]: entry for entry in found["entries"]}
    run = entries[started["execution_id"]]
    assert (run["workflow"], run["version"], run["outcome"]) == ("report", 1, "succeeded")
    assert run["duration"] >= 0
    assert entries[str(failing)]["problem"] == "a: HTTP 503"
    assert entries[str(silent)]["problem"] == "No output node succeeded."
    lost = entries[None]
    assert (lost["outcome"], "may have started" in lost["problem"]) == ("unknown", True)
    for line in (run, lost):
        path = f"history/{line['key']}/inputs"
        assert await viewer.send("GET", path) == (200, '{\n  "topic": "otters"\n}')
    assert (await viewer.send("GET", f"history/{entries[str(failing)]['key']}/inputs"))[0] == 404
    again = History(tmp_path / "history.sqlite", server="of a test")
    async with Board(session, history=again) as board:
        await board.add(int(started["execution_id"]))
        card = board.cards[int(started["execution_id"])]
        while card.snapshot is None:
            await board.changed.wait()
        assert (card.workflow, card.version, card.started) == ("report", 1, run["began"])
        assert card.inputs == '{\n  "topic": "otters"\n}'
    assert (await viewer.send("GET", "history/trends"))[1][0]["workflow"] == "report"
    assert (await viewer.send("GET", "history?days=1"))[1]["matching"] == 4
    assert (await viewer.send("DELETE", f"history/{lost['key']}"))[0] == 204
    assert (await viewer.send("GET", "history?outcome=unknown"))[1]["entries"] == []
    assert (await viewer.send("DELETE", "history"))[0] == 204
    assert (await viewer.send("GET", "history"))[1]["matching"] == 0


async def test_what_was_over_before_has_the_times_that_are_remembered(
    sim: Simulator, viewer: Any, session: Session, tmp_path: Path, held: int
) -> None:
    """A run that was followed has its time line at the next visit; another one has no times."""
    board, other = viewer.board, sim.add_execution(DONE)
    for execution_id in (held, other):
        board.follow(execution_id)
    while not all(card.snapshot for card in board.cards.values()):
        await board.changed.wait()
    sim.finish(held, "Answer")
    while board.cards[held].state != "succeeded":
        await board.changed.wait()
    seen = board.cards[held]
    assert seen.duration == seen.elapsed == seen.snapshot.elapsed
    assert seen.timeline.nodes["Plan"] == NodeTimes()  # it was over at the first poll
    assert seen.timeline.nodes["Answer"].running is not None
    assert board.cards[other].duration is None
    await board.history.find(held)  # once what was recorded before it is in the file
    again = History(tmp_path / "history.sqlite", server="of a test")
    async with session, Board(session, history=again) as later:
        for execution_id in (held, other):
            later.follow(execution_id)
        while not all(card.snapshot for card in later.cards.values()):
            await later.changed.wait()
        card = later.cards[held]
        assert card.duration == pytest.approx(seen.duration, abs=0.001)
        assert card.timeline.origin == seen.timeline.origin
        answer, before = card.timeline.nodes["Answer"], seen.timeline.nodes["Answer"]
        assert answer.final == pytest.approx(before.final, abs=0.001)
        assert later.cards[other].timeline == Timeline()


async def test_a_run_goes_on_where_the_last_viewer_left_it(
    sim: Simulator, session: Session, tmp_path: Path, held: int
) -> None:
    """Its times count from the first viewer's first poll; an end in between was not seen."""
    origins = []
    for visit in range(3):
        history = History(tmp_path / "history.sqlite", server="of a test")
        async with session, Board(session, history=history) as board:
            board.follow(held)
            while board.cards[held].snapshot is None:
                await board.changed.wait()
            card = board.cards[held]
            origins.append(card.timeline.origin)
            if visit == 1:
                assert card.elapsed > card.snapshot.elapsed
        if visit == 1:
            sim.finish(held, "Answer")
    assert origins[0] == origins[1] == origins[2]
    assert (card.state, card.duration) == ("succeeded", None)
    assert card.timeline.nodes["Answer"].final is None


async def test_an_error_of_the_file_is_an_answer(viewer: Any, tmp_path: Path) -> None:
    """The page shows it in place of the list."""
    (tmp_path / "history.sqlite").mkdir()
    status, answer = await viewer.send("GET", "history")
    assert status == 503
    path = tmp_path / "history.sqlite"
    assert answer["message"] == f"cannot use the history {path}: Is a directory."


async def test_a_file_of_another_version_is_named(history: History, tmp_path: Path) -> None:
    """The error has its path, and what to do with it."""
    await ids(history)
    path = tmp_path / "state" / "history.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("ALTER TABLE executions DROP COLUMN failed_node")
    reopened = History(path, server="http://a")
    with pytest.raises(ConfigurationError) as caught:
        await reopened.search()
    await reopened.aclose()
    assert str(caught.value) == (
        f"cannot use the history {path}: another version of promptlayer-exec wrote it."
        " Delete it to start a new one."
    )


async def test_a_lost_execution_is_remembered_as_such(
    sim: Simulator, viewer: Any, held: int
) -> None:
    """Its line says why it is no longer followed."""
    before = time.time()
    viewer.board.follow(held)
    while viewer.board.cards[held].snapshot is None:
        await viewer.board.changed.wait()
    sim.inject(Fault.status(403))
    while viewer.board.cards[held].is_lost is False:
        await viewer.board.changed.wait()
    (entry,) = (await viewer.send("GET", "history?outcome=lost"))[1]["entries"]
    assert (entry["outcome"], entry["nodes"]) == ("lost", 2)
    assert "403 Forbidden" in entry["problem"]
    assert before <= entry["began"] + 1


async def test_what_is_usual_are_medians_of_at_least_three_successes(history: History) -> None:
    """Failed runs are only counted; the latest two successes are named."""
    for execution_id, seconds in ((1, 4.0), (2, 8.0)):
        _record(history, execution_id, duration=seconds, times='{"n": [1.0, 3.0]}')
    _record(history, 3, outcome="failed", duration=900.0)
    assert (await history.usual("w"))["duration"] is None
    _record(history, 4, duration=90.0, times='{"n": [1.0, 4.0], "m": [null, 2.0]}')
    usual = await history.usual("w")
    assert usual["duration"] == 8.0
    assert usual["nodes"] == {"n": 2.0}
    assert usual["successes"] == [
        {"execution_id": "4", "ended": 1094.0},
        {"execution_id": "2", "ended": 1010.0},
    ]
    assert (usual["failed"], usual["total"]) == (1, 4)
