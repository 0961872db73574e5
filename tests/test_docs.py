"""The README and the pages under docs/: their code is run, and their commands are CI's."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from promptlayer_exec import ExecutionStarted, ExecutionTimeout, PollPolicy, Session
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


def test_the_readme_s_first_program_runs(threaded_sim: Simulator) -> None:
    """As a script of its own, with the key in the environment."""
    answer = SimNode("Answer", "forty-two", after=("Plan",), is_output_node=True)
    execution_id = threaded_sim.add_execution(Scenario([SimNode("Plan"), answer]))
    program = next(block for block in blocks("README.md", "python") if "asyncio.run(" in block)
    finished = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program, str(execution_id)],
        env={
            **os.environ,
            "PROMPTLAYER_API_KEY": threaded_sim.api_key,
            "PROMPTLAYER_BASE_URL": threaded_sim.base_url,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.stderr == ""
    assert finished.stdout.splitlines() == [
        "100% Plan: SUCCESS",
        "100% Answer: SUCCESS",
        "forty-two",
    ]


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


async def test_the_errors_in_the_readme_are_what_is_printed(
    sim: Simulator, session: Session, held: int
) -> None:
    """Word for word, for the one that depends on neither port nor number of attempts."""
    shown = blocks("README.md", "text")[0]
    with pytest.raises(ExecutionTimeout) as caught:
        await session.execution(held).wait(timeout=0.5)
    assert f"ExecutionTimeout: {caught.value}" in shown
