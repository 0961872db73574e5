"""The recipe for notebooks, in a kernel, and as nbconvert shows it."""

from __future__ import annotations

from collections.abc import Callable

import nbformat
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ExecutePreprocessor

from promptlayer_exec.simulator import Simulator


def test_the_table_changes_in_place(server: Simulator, recipe: Callable[[str], list[str]]) -> None:
    """After the cells were run, the one table that was shown has the final nodes."""
    cells = [nbformat.v4.new_code_cell(block.rstrip()) for block in recipe("Notebooks")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    ExecutePreprocessor(timeout=60, kernel_name="python3").preprocess(notebook)
    workflow, started, followed, output, closed = (cell.outputs for cell in notebook.cells)
    assert "<svg" in workflow[0].data["text/html"]
    (run,) = server.runs
    assert started[0].data["text/plain"] == str(run.execution_id)
    (table,) = followed
    shown = table.data["text/html"]
    assert "<table" in shown
    assert "SUCCESS" in shown
    assert "RUNNING" not in shown
    assert output[0].data["text/plain"] == "'Otters are fine.'"
    assert closed == []
    html, _ = HTMLExporter().from_notebook_node(notebook)
    assert f"<b>Execution {run.execution_id}</b> · succeeded" in html
