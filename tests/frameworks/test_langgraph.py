"""The recipe for LangGraph, with a checkpointer."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from promptlayer_exec import Forbidden
from promptlayer_exec.simulator import Fault, Simulator


@pytest.fixture
def page(load: Callable[..., ModuleType]) -> ModuleType:
    """Return the recipe."""
    return load("LangGraph", "langgraph_recipe")


async def test_a_graph_shows_progress(
    server: Simulator, page: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """The nodes' progress is streamed, and the report is in the state."""
    graph = page.make_graph(InMemorySaver())
    assert await page.write_report(graph, "otters", "thread-1") == "Otters are fine."
    printed = capsys.readouterr().out.splitlines()
    assert (printed[0], printed[-1]) == ("  0%", "100%")


async def test_an_interrupted_graph_follows_its_execution(
    server: Simulator, page: ModuleType
) -> None:
    """It starts no second run."""
    graph = page.make_graph(InMemorySaver())
    server.inject(Fault.status(403, execution_id=1001))
    with pytest.raises(Forbidden):
        await page.write_report(graph, "otters", "thread-1")
    assert await page.write_report(graph, "otters", "thread-1") == "Otters are fine."
    assert len(server.runs) == 1
