"""The recipe for Temporal, with its development server."""

from __future__ import annotations

import asyncio
import gc
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from temporalio.client import Client, WorkflowFailureError
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from promptlayer_exec import Session
from promptlayer_exec.simulator import Fault, Simulator
from promptlayer_exec.starts import SQLStartStore

QUEUE = "reports"


@pytest.fixture(scope="module", autouse=True)
def _let_the_runtime_end() -> Iterator[None]:
    yield
    gc.collect()
    # Threads of Temporal's runtime that still run when the interpreter ends abort the process.
    time.sleep(1)


@pytest.fixture
def page(load: Callable[..., ModuleType]) -> ModuleType:
    """Return the recipe."""
    return load("Temporal", "temporal_recipe")


@pytest.fixture
async def client(server: Simulator, page: ModuleType) -> AsyncIterator[Client]:
    """Return a client of a server for which one worker runs the recipe."""
    environment = await WorkflowEnvironment.start_local(
        dev_server_existing_path=shutil.which("temporal"), dev_server_log_level="error"
    )
    async with environment, Session(starts=SQLStartStore()) as session:
        reports = page.Reports(session)
        activities = [reports.start_report, reports.follow_report]
        workflows = [page.WriteReport]
        async with Worker(
            environment.client, task_queue=QUEUE, workflows=workflows, activities=activities
        ):
            yield environment.client


async def write(client: Client, page: ModuleType, topic: str) -> Any:
    """Run the recipe's workflow."""
    run = page.WriteReport.run
    return await client.execute_workflow(run, topic, id=f"report-{topic}", task_queue=QUEUE)


async def test_a_workflow_returns_the_report(
    server: Simulator, client: Client, page: ModuleType
) -> None:
    """The run can be found by the Temporal workflow's id."""
    assert await write(client, page, "otters") == "Otters are fine."
    (run,) = server.runs
    assert run.body["metadata"]["temporal_workflow"] == "report-otters"
    assert run.body["metadata"]["promptlayer_exec.key"].startswith("temporal/report-otters/")


async def test_a_repeated_activity_follows_the_same_execution(
    server: Simulator, client: Client, page: ModuleType
) -> None:
    """The first attempt to follow it fails, and the second one starts no run."""
    server.inject(Fault.status(403, execution_id=1001))
    assert await write(client, page, "otters") == "Otters are fine."
    assert len(server.runs) == 1


@pytest.mark.parametrize("topic", ["unicorns", "otters"])
async def test_what_a_retry_would_pay_for_is_not_retried(
    server: Simulator, client: Client, page: ModuleType, topic: str
) -> None:
    """A failed execution, and a start whose answer was lost, fail the workflow."""
    if topic == "otters":
        server.inject(Fault.disconnect(), path="/run")
    with pytest.raises(WorkflowFailureError) as caught:
        await asyncio.wait_for(write(client, page, topic), 20)
    error = caught.value.cause.cause
    assert isinstance(error, ApplicationError)
    assert error.type == ("StartUnknown" if topic == "otters" else "Failed")
    assert len(server.runs) == 1
