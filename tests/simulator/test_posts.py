"""The simulator's webhooks and callbacks, and the faults of both, over real sockets."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

from promptlayer_exec import Session
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.webhooks import read_callback, read_webhook

HELD = Scenario([SimNode("Report", "AAA", None, is_output_node=True)])


@pytest.fixture
async def receiver() -> AsyncIterator[Simulator]:
    """Return a server that records what is posted to it: another simulator."""
    async with Simulator() as simulator:
        yield simulator


async def complete_run(sim: Simulator, session: Session, **options: Any) -> int:
    """Start a run of a held workflow, complete it, and return its id."""
    if not sim.runs:
        sim.add_workflow("write-report é", HELD)
    execution = await session.start("write-report é", **options)
    sim.finish(execution.id, "Report")
    return execution.id


async def test_a_complete_run_is_a_signed_webhook(
    sim: Simulator, session: Session, receiver: Simulator
) -> None:
    """The body is compact JSON; the signature is over another spelling of it, and right."""
    sim.webhook_url = f"{receiver.base_url}/webhook"
    execution_id = await complete_run(sim, session)
    await sim.wait_for_posts(1)
    (request,) = receiver.requests
    assert (request.method, request.path) == ("POST", "/webhook")
    assert request.headers["Content-Type"] == "application/json"
    signature = request.headers["X-PromptLayer-Signature"]
    webhook = read_webhook(request.body, signature, sim.webhook_secret)
    assert (webhook.event_type, webhook.execution_id) == ("agent_run_finished", execution_id)
    assert (webhook.workflow, webhook.workflow_id) == ("write-report é", 1)
    assert webhook.timestamp is not None
    assert abs((datetime.now(UTC) - webhook.timestamp).total_seconds()) < 60
    assert request.body.decode() != json.dumps(webhook.payload, sort_keys=True)
    (post,) = sim.posts
    assert (post.kind, post.execution_id, post.url) == ("webhook", execution_id, sim.webhook_url)
    assert (post.body, post.status) == (request.body, 404)  # which is this receiver's answer
    assert post.headers["X-PromptLayer-Signature"] == signature


async def test_only_runs_that_were_started_over_the_api_are_webhooks(
    sim: Simulator, session: Session, receiver: Simulator
) -> None:
    """Not the executions that a test adds, and not the runs before the URL was set."""
    sim.add_workflow("write-report é", HELD)
    early = await session.start("write-report é")
    sim.webhook_url = receiver.base_url
    sim.finish(early.id, "Report")
    sim.finish(sim.add_execution(HELD), "Report")
    execution_id = await complete_run(sim, session)
    await sim.wait_for_posts(1)
    assert [post.execution_id for post in sim.posts] == [execution_id]


async def test_a_run_may_be_both_a_webhook_and_a_callback(receiver: Simulator) -> None:
    """The URL and the secret of webhooks can be given when the simulator is made.

    A session's start asks for all nodes, so its callback has them.
    """
    async with (
        Simulator(webhook_url=f"{receiver.base_url}/w", webhook_secret="x") as other,
        Session(other.api_key, base_url=other.base_url) as client,
    ):
        await complete_run(other, client, callback_url=f"{receiver.base_url}/c")
        await other.wait_for_posts(2)
    assert {(post.kind, post.status) for post in other.posts} == {
        ("webhook", 404),
        ("callback", 404),
    }
    by_path = {request.path: request for request in receiver.requests}
    signature = by_path["/w"].headers["X-PromptLayer-Signature"]
    assert read_webhook(by_path["/w"].body, signature, "x").execution_id == 1001
    assert "X-PromptLayer-Signature" not in by_path["/c"].headers
    assert read_callback(by_path["/c"].body).output["Report"]["value"] == "AAA"


async def test_a_webhook_can_be_repeated(
    sim: Simulator, session: Session, receiver: Simulator
) -> None:
    """All copies are the same bytes, as when PromptLayer sends one again; the next is normal."""
    sim.webhook_url = receiver.base_url
    sim.inject(Fault.repeat_post("webhook", 3))
    await complete_run(sim, session)
    await sim.wait_for_posts(3)
    assert len({post.body for post in sim.posts}) == 1
    await complete_run(sim, session)
    await sim.wait_for_posts(4)
    assert [post.execution_id for post in sim.posts] == [1001, 1001, 1001, 1002]


async def test_faults_concern_one_kind_and_one_execution(
    sim: Simulator, session: Session, receiver: Simulator
) -> None:
    """The webhook of the same run, and other callbacks, are posted once."""
    sim.webhook_url = receiver.base_url
    sim.inject(Fault.repeat_post("callback", execution_id=1001))
    for _ in range(2):
        await complete_run(sim, session, callback_url=receiver.base_url)
    await sim.wait_for_posts(5)
    posts = sorted((post.kind, post.execution_id) for post in sim.posts)
    callbacks = [("callback", 1001), ("callback", 1001), ("callback", 1002)]
    assert posts == [*callbacks, ("webhook", 1001), ("webhook", 1002)]


async def test_a_webhook_can_be_late(sim: Simulator, session: Session, receiver: Simulator) -> None:
    """It comes that much after the completion; a fault of posts affects no request."""
    sim.webhook_url = receiver.base_url
    sim.inject(Fault.delay_post("webhook", 0.05))
    began = time.monotonic()
    await complete_run(sim, session)
    assert await session.execution(1001).output() == "AAA"
    await sim.wait_for_posts(1)
    assert time.monotonic() - began >= 0.05


async def test_a_callback_can_be_lost(
    sim: Simulator, session: Session, receiver: Simulator
) -> None:
    """It is not posted, nor logged; the webhook of the same run and later callbacks are."""
    sim.webhook_url = receiver.base_url
    sim.inject(Fault.drop_post("callback"))
    for _ in range(2):
        await complete_run(sim, session, callback_url=receiver.base_url)
    await sim.wait_for_posts(3)
    posts = sorted((post.kind, post.execution_id) for post in sim.posts)
    assert posts == [("callback", 1002), ("webhook", 1001), ("webhook", 1002)]


def test_unusable_faults_are_named() -> None:
    """The kind and the number of webhooks are checked."""
    with pytest.raises(ValueError, match='kind must be "webhook" or "callback", got \'push\''):
        Fault.repeat_post("push")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="times must be at least 1"):
        Fault.delay_post("callback", 1, times=0)
