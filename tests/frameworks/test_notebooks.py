"""The cells of docs/notebooks.md, in a kernel, and as nbconvert shows them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ExecutePreprocessor

from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_changes_in_place(server: Simulator, recipe: Callable[..., list[str]]) -> None:
    """After the cells were run, the one table that was shown has the final nodes."""
    blocks = recipe("One run", "notebooks.md")
    cells = [nbformat.v4.new_code_cell(block.rstrip()) for block in blocks]
    notebook = nbformat.v4.new_notebook(cells=cells)
    ExecutePreprocessor(timeout=60, kernel_name="python3").preprocess(notebook)
    outputs = (cell.outputs for cell in notebook.cells)
    workflow, started, followed, output, graph, closed = outputs
    assert "<svg" in workflow[0].data["text/html"]
    (run,) = server.runs
    assert started[0].data["text/plain"] == str(run.execution_id)
    (table,) = followed
    shown = table.data["text/html"]
    assert "<table" in shown
    assert "SUCCESS" in shown
    assert "RUNNING" not in shown
    assert output[0].data["text/plain"] == "'Otters are fine.'"
    assert "SUCCESS" in graph[0].data["text/html"]
    assert closed == []
    html, _ = HTMLExporter().from_notebook_node(notebook)
    assert f"<b>Execution {run.execution_id}</b> · succeeded" in html


@pytest.fixture
def kernel(server: Simulator, tmp_path: Path) -> Iterator[KernelManager]:
    """Return the manager of a kernel whose working directory is empty."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path))
    yield manager
    manager.shutdown_kernel(now=True)


def connected(kernel: KernelManager) -> BlockingKernelClient:
    """Return a client of a kernel that has started."""
    client: BlockingKernelClient = kernel.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    return client


def run_cell(client: BlockingKernelClient, cell: str) -> str:
    """Run a cell, which must succeed, and return what it shows last, as text."""
    shown: list[Any] = []
    reply = client.execute_interactive(cell, timeout=60, output_hook=shown.append)
    assert reply["content"]["status"] == "ok", reply["content"]
    texts = [it["content"]["data"]["text/plain"] for it in shown if "data" in it["content"]]
    return "".join(texts[-1:])


@pytest.mark.timeout(120)
def test_a_cell_that_is_interrupted_and_run_again_starts_each_row_once(
    server: Simulator, kernel: KernelManager, recipe: Callable[..., list[str]]
) -> None:
    """200 rows are 200 runs, also after the kernel has died; a progress bar counts the rows."""
    setup, fill, show, count, *_ = recipe("A column of a DataFrame", "notebooks.md")

    client = connected(kernel)
    run_cell(client, setup)
    client.execute(fill)
    asyncio.run(asyncio.wait_for(server.wait_for_requests(80), 30))
    kernel.interrupt_kernel()
    assert client.get_shell_msg(timeout=60)["content"]["status"] == "error"
    assert 0 < len(server.runs) < 200

    for has_died in (False, True):
        if has_died:
            client.stop_channels()
            kernel.restart_kernel(now=True)
            client = connected(kernel)
            run_cell(client, setup)
        assert "200/200" in run_cell(client, f"{fill}\nstr(bar)")
        assert "Otters are fine." in run_cell(client, show)
        assert "Series([]" in run_cell(client, count)
        assert sorted(run.inputs["topic"] for run in server.runs) == sorted(
            f"otter {number}" for number in range(200)
        )
    client.stop_channels()


@pytest.mark.timeout(120)
def test_failed_rows_run_again_and_objects_become_columns(
    server: Simulator, kernel: KernelManager, recipe: Callable[..., list[str]]
) -> None:
    """A cell counts the errors; the keys of failed runs are forgotten, and of no other rows."""
    setup, fill, _, count, forget, settle, join = recipe("A column of a DataFrame", "notebooks.md")
    with_type = "session.as_completed(requests, timeout=3600, into=dict)"
    assert with_type in (DOCS / "notebooks.md").read_text(encoding="utf-8")
    fill = fill.replace("session.as_completed(requests, timeout=3600)", with_type)
    outputs = {"otter 7": "no object"}
    failing = {"otter 8", "otter 9"}

    def write_object(inputs: Any) -> Scenario:
        topic = inputs["topic"]
        status = "FAILED" if topic in failing else "SUCCESS"
        output = outputs.get(topic, '{"text": "Otters are fine.", "words": 3}')
        return Scenario([SimNode("Report", output, 0.1, [], status, is_output_node=True)])

    server.add_workflow("write-object", write_object)
    fill = fill.replace("write-report", "write-object")
    client = connected(kernel)
    for cell in (setup, fill):
        run_cell(client, cell)
    counted = run_cell(client, count)
    assert re.findall(r"^(\w+) +(\d+)$", counted, re.MULTILINE) == [
        ("ExecutionFailed", "2"),
        ("InvalidOutput", "1"),
    ]

    failing.clear()
    for cell in (forget, fill):
        run_cell(client, cell)
    assert re.findall(r"^(\w+) +(\d+)$", run_cell(client, count), re.MULTILINE) == [
        ("InvalidOutput", "1")
    ]
    assert len(server.runs) == 202

    run_cell(client, 'await store.forget("otter 9")')
    server.inject(Fault.status(503), path="/run")
    run_cell(client, fill)
    assert "StartUnknown" in run_cell(client, count)
    for cell in (settle, fill):
        run_cell(client, cell)
    assert len(server.runs) == 203
    assert run_cell(client, f"sorted(({join}).columns)") == str(
        ["error", "reason", "report", "run", "text", "topic", "words"]
    )
    client.stop_channels()
