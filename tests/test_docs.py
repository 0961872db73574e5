"""The README and the pages under docs/: their code is run, and their commands are CI's."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

from promptlayer_exec import ExecutionStarted, ExecutionTimeout, PollPolicy, Session, opentelemetry
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def names(page: str) -> dict[str, Any]:
    """Run the blocks of a page that only define things, and return what they define."""
    namespace: dict[str, Any] = {}
    for block in blocks(page, "python"):
        if "asyncio.run(" not in block:
            exec(compile(block, page, "exec"), namespace)
    return namespace


def test_ci_runs_the_readme_s_test_command() -> None:
    """What a stranger types is what CI runs, and nothing else."""
    command = blocks("README.md", "sh")[1].strip()
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    run = [line for line in script if not line.startswith(("#", "set ", "cd "))]
    assert run == command.split(" && ")


def run_program(
    sim: Simulator, program: str, *arguments: str, cwd: Path | None = None
) -> list[str]:
    """Run a program with the key in the environment, and return the lines that it prints."""
    finished = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program, *arguments],
        env={
            **os.environ,
            "PROMPTLAYER_API_KEY": sim.api_key,
            "PROMPTLAYER_BASE_URL": sim.base_url,
        },
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.stderr == ""
    return finished.stdout.splitlines()


def test_the_readme_s_first_program_runs(threaded_sim: Simulator) -> None:
    """As a script of its own."""
    answer = SimNode("Answer", "forty-two", after=("Plan",), is_output_node=True)
    execution_id = threaded_sim.add_execution(Scenario([SimNode("Plan"), answer]))
    program = next(block for block in blocks("README.md", "python") if "asyncio.run(" in block)
    assert run_program(threaded_sim, program, str(execution_id)) == [
        "100% Plan: SUCCESS",
        "100% Answer: SUCCESS",
        "forty-two",
    ]


def test_the_readme_s_evaluation_is_fifteen_lines_and_runs(
    threaded_sim: Simulator, tmp_path: Path
) -> None:
    """Each result is printed, and what failed and why, with the id that finds it again."""

    def grade(inputs: Any) -> Scenario:
        status = "FAILED" if inputs["prompt"] == "bad" else "SUCCESS"
        return Scenario(
            [SimNode("Grade", 0.9, status=status, error_message="refused", is_output_node=True)]
        )

    threaded_sim.add_workflow("grade", grade)
    program = next(block for block in blocks("README.md", "python") if "as_completed" in block)
    assert len([line for line in program.splitlines() if line]) <= 15
    (tmp_path / "prompts.txt").write_text("one\nbad\ntwo\n")
    printed = run_program(threaded_sim, program, cwd=tmp_path)
    (failed,) = (run.execution_id for run in threaded_sim.runs if run.inputs["prompt"] == "bad")
    assert sorted(printed[:2]) == ["one: 0.9", "two: 0.9"]
    assert printed[2] == "1 of 3 failed"
    assert printed[3].startswith(f"bad: execution {failed}: it failed: 'Grade' FAILED (refused)")


async def test_the_readme_s_example_of_a_test_passes() -> None:
    """It runs as it stands."""
    await names("README.md")["test_my_code"]()


async def test_the_page_on_watching_does_what_it_says(
    sim: Simulator, session: Session, held: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its functions are run against the simulator."""
    page = names("docs/watching.md")
    assert (await page["until_half"](session.execution(held))).progress == 0.5
    result_or_reason = page["result_or_reason"]
    sim.inject(Fault.status(404))
    assert (await result_or_reason(session, held)).startswith("NotFound: execution")
    waiting = asyncio.create_task(result_or_reason(session, held))
    await sim.wait_for_requests(sim.request_count + 1)
    sim.finish(held, "Answer")
    assert await waiting == "succeeded"
    observed = Session(
        sim.api_key, base_url=sim.base_url, poll=PollPolicy.fixed(0.01), observers=[page["observe"]]
    )
    async with observed:
        await observed.execution(held).wait()
    assert re.fullmatch(rf"{held}: \d\.\d+ s, \d+ bytes\n", capsys.readouterr().out)


async def test_the_readme_s_typed_output_is_ten_lines_and_works(
    sim: Simulator, session: Session
) -> None:
    """A start, and an output of the type that was asked for."""
    (block,) = (block for block in blocks("README.md", "python") if "into=" in block)
    assert len([line for line in block.splitlines() if line]) <= 10
    report = {"title": "Otters", "score": 0.9}
    sim.add_workflow("write-report", Scenario([SimNode("Report", report, is_output_node=True)]))
    output = await names("README.md")["write_report"](session, "otters")
    assert (type(output).__name__, output.title, output.score) == ("Report", "Otters", 0.9)
    assert sim.runs[0].inputs == {"topic": "otters"}


async def test_the_page_on_starting_does_what_it_says(
    sim: Simulator, session: Session, capsys: pytest.CaptureFixture[str], recorder: Any
) -> None:
    """Its functions are run against the simulator."""
    page = names("docs/starting.md")
    scenario = Scenario([SimNode("Report", "done", is_output_node=True)])
    sim.add_workflow("reports/weekly", scenario, warning="missing input variables: tone")
    execution = await page["start_report"](session, "otters", "job-1")
    assert await execution.output() == "done"
    assert capsys.readouterr().out == (f"execution {execution.id}: missing input variables: tone\n")
    sim.add_workflow("report", scenario)
    sim.inject(Fault.disconnect())
    started, to_look_up = await page["start_all"](session, {"a": "otters", "b": "newts"})
    assert [run.body["metadata"] for run in sim.runs[1:]] == [{"job": "a"}, {"job": "b"}]
    assert [execution.id for execution in started] == [sim.runs[2].execution_id]
    (line,) = to_look_up
    assert line.startswith("job a: ")
    sim.inject(Fault.delay(0.02))
    starting = asyncio.create_task(session.start("report"))
    await sim.wait_for_requests(sim.request_count + 1)
    starting.cancel()
    page["keep_orphans"](await recorder.next(ExecutionStarted))
    assert page["orphans"] == [sim.runs[3].execution_id]


async def test_the_page_on_observing_does_what_it_says(
    sim: Simulator, open_session: Callable[..., Session], held: int
) -> None:
    """Its observer counts, and it names every metric and attribute that there is."""
    page = names("docs/observing.md")
    async with open_session(observers=[page["count_bytes"]]) as session:
        await session.execution(held).snapshot()
        assert page["received"] == {}  # a single look is no poll
        with pytest.raises(ExecutionTimeout):
            await session.execution(held).wait(timeout=0.05)
    assert page["received"][held] > 100
    text = (ROOT / "docs" / "observing.md").read_text(encoding="utf-8")
    source = inspect.getsource(opentelemetry)
    told = set(re.findall(r'"(promptlayer_exec\.[a-z._]+)"', source))
    shown = set(re.findall(r"`(promptlayer_exec\.[a-z._]+)`", text))
    shown |= {f"promptlayer_exec{suffix}" for suffix in re.findall(r"`(\.[a-z]+)`", text)}
    assert told - shown == {"promptlayer_exec.poll", "promptlayer_exec.progress"}


async def test_the_page_on_fanning_out_does_what_it_says(sim: Simulator) -> None:
    """Its fan-out and its limiter's in-memory form are run; the type checker sees the limiter."""
    page = names("docs/fanning-out.md")

    def grade(inputs: Any) -> Scenario:
        return Scenario([SimNode("Grade", inputs["grade"], is_output_node=True)])

    async def rows() -> AsyncIterator[dict[str, Any]]:
        yield {"id": "a", "grade": 0.5}
        yield {"id": "b", "grade": "none"}

    sim.add_workflow("grade", grade)
    limiter = page["in_memory"](1000)
    limiter.acquire = AsyncMock(side_effect=limiter.acquire)
    async with Session(sim.api_key, base_url=sim.base_url, limiter=limiter) as session:
        lines = sorted(await page["grade"](session, rows()))
    assert lines[0] == "a: 0.50"
    assert lines[1].startswith("b: execution ")
    assert limiter.acquire.await_count == sim.request_count
    checked = (ROOT / "tests" / "typing" / "limiter.py").read_text()
    assert blocks("docs/fanning-out.md", "python")[1] in checked


async def test_the_errors_in_the_readme_are_what_is_printed(
    sim: Simulator, session: Session, held: int
) -> None:
    """Word for word, for the one that depends on neither port nor number of attempts."""
    shown = blocks("README.md", "text")[0]
    with pytest.raises(ExecutionTimeout) as caught:
        await session.execution(held).wait(timeout=0.5)
    assert f"ExecutionTimeout: {caught.value}" in shown
