"""The recipes of two pages, each with its framework: `nox -s frameworks`."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from promptlayer_exec.simulator import Scenario, SimNode, Simulator

DOCS = Path(__file__).parents[2] / "docs"


def blocks_of(heading: str, page: str = "frameworks.md") -> list[str]:
    """Return the code blocks of a section."""
    _, _, section = (DOCS / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    section = section.partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


@pytest.fixture
def recipe() -> Callable[..., list[str]]:
    """Return a function that returns the code blocks of a section."""
    return blocks_of


def write_report(inputs: Any) -> Scenario:
    """Take a moment, and fail for unicorns."""
    status = "FAILED" if inputs["topic"] == "unicorns" else "SUCCESS"
    report = SimNode("Report", "Otters are fine.", 0.2, ["Plan"], status, is_output_node=True)
    return Scenario([SimNode("Plan", "a plan", 0.2), report])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Simulator]:
    """Return a simulator that sessions find in the environment."""
    with Simulator() as sim:
        monkeypatch.setenv("PROMPTLAYER_API_KEY", sim.api_key)
        monkeypatch.setenv("PROMPTLAYER_BASE_URL", sim.base_url)
        monkeypatch.setenv("PROMPTLAYER_EXEC_DB", f"sqlite:///{tmp_path / 'starts.sqlite'}")
        definition = write_report({"topic": "otters"})
        sim.add_workflow("write-report", write_report, definition=definition)
        yield sim


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """Return a function that imports the code of a section as a module."""
    names = []

    def load(heading: str, name: str, *, blocks: int | None = None) -> ModuleType:
        (tmp_path / f"{name}.py").write_text("\n\n".join(blocks_of(heading)[:blocks]))
        monkeypatch.syspath_prepend(str(tmp_path))
        names.append(name)
        return importlib.import_module(name)

    yield load
    for name in names:
        del sys.modules[name]


# Takes the body of a request with the messages so far, and returns the next message.
Model = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture
async def serve_model() -> AsyncIterator[Callable[[Model], Awaitable[None]]]:
    """Return a function that serves a model on this machine, to the OpenAI Agents SDK."""
    import agents  # only two of the recipes have it
    from openai import AsyncOpenAI

    async with AsyncExitStack() as stack:

        async def serve(model: Model) -> None:
            async def complete(request: web.Request) -> web.Response:
                body = await request.json()
                choice = {"index": 0, "finish_reason": "stop", "message": model(body)}
                answer = {"id": "1", "object": "chat.completion", "created": 0, "choices": [choice]}
                return web.json_response({**answer, "model": body["model"]})

            app = web.Application()
            app.router.add_post("/v1/chat/completions", complete)
            server = await stack.enter_async_context(TestServer(app))
            client = AsyncOpenAI(api_key="key", base_url=str(server.make_url("/v1")))
            agents.set_tracing_disabled(disabled=True)
            agents.set_default_openai_api("chat_completions")
            agents.set_default_openai_client(client, use_for_tracing=False)
            await stack.enter_async_context(client)

        yield serve
