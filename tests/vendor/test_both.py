"""PromptLayer's SDK and this package in one environment, and in one event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from promptlayer import AsyncPromptLayer, PromptLayer

from promptlayer_exec import PollPolicy, Session, WatchWoken
from promptlayer_exec.simulator import Scenario, SimNode, Simulator

NEVER = PollPolicy.fixed(3600.0)


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    """Return a simulator that both clients find in the environment."""
    with Simulator() as simulator:
        monkeypatch.setenv("PROMPTLAYER_API_KEY", simulator.api_key)
        monkeypatch.setenv("PROMPTLAYER_BASE_URL", simulator.base_url)
        simulator.add_workflow("w", Scenario([SimNode("Answer", "42", 0.3, is_output_node=True)]))
        yield simulator


def test_both_clients_are_pushed_in_one_loop(sim: Simulator) -> None:
    """Each gets the results of its own runs; this one by messages, as it never polls again."""
    woken: list[Any] = []

    async def run() -> list[str]:
        async with Session(poll=NEVER, observers=[woken.append]) as session:
            theirs = AsyncPromptLayer()
            runs = [call for _ in range(3) for call in (session.run("w"), theirs.run_workflow("w"))]
            return await asyncio.wait_for(asyncio.gather(*runs), 20)

    assert asyncio.run(run()) == ["42"] * 6
    assert "push" in [event.source for event in woken if isinstance(event, WatchWoken)]


def test_the_synchronous_client_runs_beside_a_session(sim: Simulator) -> None:
    """A program that migrates call by call has both."""
    theirs: list[str] = []

    async def run() -> str:
        async with Session() as session:
            return await session.run("w")

    client = PromptLayer()
    thread = threading.Thread(target=lambda: theirs.append(client.run_workflow("w", timeout=20)))
    thread.start()
    assert asyncio.run(run()) == "42"
    thread.join(20)
    assert theirs == ["42"]
