"""The cells of docs/notebooks.md, in a kernel, and as nbconvert shows them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ExecutePreprocessor

from promptlayer_exec.simulator import Simulator


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


@pytest.mark.timeout(120)
def test_a_cell_that_is_interrupted_and_run_again_starts_each_row_once(
    server: Simulator, kernel: KernelManager, recipe: Callable[..., list[str]]
) -> None:
    """200 rows are 200 runs, also after the kernel has died; a progress bar counts the rows."""
    setup, fill, show = recipe("A column of a DataFrame", "notebooks.md")

    client = connected(kernel)
    assert client.execute(setup, reply=True, timeout=60)["content"]["status"] == "ok"
    client.execute(fill)
    asyncio.run(asyncio.wait_for(server.wait_for_requests(80), 30))
    kernel.interrupt_kernel()
    assert client.get_shell_msg(timeout=60)["content"]["status"] == "error"
    assert 0 < len(server.runs) < 200

    for cells in ([fill, show], [setup, fill, show]):
        shown = []
        for cell in cells:
            reply = client.execute_interactive(cell, timeout=60, output_hook=shown.append)
            assert reply["content"]["status"] == "ok", reply["content"]
        assert "200/200" in str([message["content"] for message in shown])
        assert "Otters are fine." in shown[-2]["content"]["data"]["text/plain"]
        assert sorted(run.inputs["topic"] for run in server.runs) == sorted(
            f"otter {number}" for number in range(200)
        )
        client.stop_channels()
        kernel.restart_kernel(now=True)
        client = connected(kernel)
    client.stop_channels()
