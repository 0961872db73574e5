"""What `demo`, `simulate` and `view --demo` show, and the server of `simulate`."""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import attrs

from promptlayer_exec._integration import printable
from promptlayer_exec.cli._exit import PROGRAM, listening
from promptlayer_exec.cli._text import out
from promptlayer_exec.simulator import Scenario, SimNode, SimRequest, Simulator

if TYPE_CHECKING:
    from promptlayer_exec.viewer import Board, History

_LETTER = "I was charged twice for my October plan. Could you look into it? Maria Rossi"
_REPLY = """\
Dear Ms. Rossi,

you are right: your October plan was charged twice, on the 1st and on the 3rd.
We have refunded the second payment of 29.00 EUR; it will reach you within five days.

Kind regards, your support team"""
_NO_INDEX = "The handbook index is not available: HTTP 503 from vector-store"
_PAGE = '<title>Otters</title><script>alert("a script is only text here")</script>'
_REPORT = "# Otters of the Danube delta\n\nNumbers have doubled since 2009; two counts agree."
_CLOSED = "Purchase order PO-4711 is closed: the ERP answered 409 Conflict"
_TRACEBACK = f"""\
Traceback (most recent call last):
  File "/app/nodes/match_order.py", line 41, in run
    order = erp.reserve(invoice["order"], amount=invoice["total"])
  File "/app/clients/erp.py", line 118, in reserve
    raise OrderClosed(message)
OrderClosed: {_CLOSED}"""

DEMO_ID = 787
DEMO_PROGRAM = f"""\
import asyncio
from contextlib import aclosing

from promptlayer_exec import Session


async def main() -> None:
    async with Session() as session:  # its key: $PROMPTLAYER_API_KEY
        execution = session.execution({DEMO_ID})
        async with aclosing(execution.finished_nodes()) as nodes:
            async for node in nodes:
                print(node.name, node.status)
        print(await execution.output())


asyncio.run(main())"""

NOTE = "This is a demonstration on a simulated PromptLayer: nothing is billed."


def support_agent(
    inputs: Mapping[str, Any] | None = None, *, reading: float | None = 0.4, failing: bool = False
) -> Scenario:
    """Return an agent that answers a customer's letter with ten nodes in about seven seconds.

    Its first node takes `reading` seconds; None holds it until `Simulator.finish`.
    """
    letter = {"from": "Maria Rossi", "text": (inputs or {}).get("letter", _LETTER)}
    rules = ["Refunds: a double charge is refunded in full.", "Tone: warm, brief, no jargon."]
    account = {"customer": 40817, "charges": ["10-01 29.00 EUR", "10-03 29.00 EUR"]}
    facts = ["detect language", "search handbook", "look up account"]
    checks = ["check tone", "check facts"]
    nodes = [
        SimNode("read letter", letter, reading),
        SimNode("detect language", "en", 0.5, after=["read letter"]),
        SimNode("classify", {"topic": "billing", "urgency": 2}, 0.9, after=["read letter"]),
        SimNode(
            "search handbook",
            rules,
            1.6,
            after=["classify"],
            status="FAILED" if failing else "SUCCESS",
            error_message=_NO_INDEX,
            raw_error_message={"raw": f"Traceback (most recent call last): ...\n{_NO_INDEX}"},
        ),
        SimNode("look up account", account, 0.8, after=["classify"]),
        SimNode("draft answer", _REPLY, 2.2, after=facts),
        SimNode("check tone", {"ok": True, "score": 0.94}, 0.7, after=["draft answer"]),
        SimNode("check facts", {"ok": True, "claims": 3}, 1.3, after=["draft answer"]),
        SimNode(
            "ask a colleague", after=checks, when=lambda values: not values["check facts"]["ok"]
        ),
        SimNode("final reply", _REPLY, 0.6, [*checks, "ask a colleague"], is_output_node=True),
    ]
    return Scenario(nodes)


def _research_report(inputs: Mapping[str, Any]) -> Scenario:
    topic = inputs.get("topic", "otters")
    counts = [{"year": year, "otters": 40 + 7 * (year - 2009)} for year in range(2009, 2026)]
    sources = ["search the web", "search the archive", "query the counts"]
    nodes = [
        SimNode("plan", {"topic": topic, "questions": 3}, 1.2),
        SimNode("search the web", _PAGE, 4.0, after=["plan"]),
        SimNode("search the archive", ["report-2009.pdf", "report-2021.pdf"], 6.5, after=["plan"]),
        SimNode("query the counts", counts, 2.4, after=["plan"]),
        SimNode("weigh the sources", {"agree": 2, "differ": 1}, 5.0, after=sources),
        SimNode("write the report", _REPORT, 24.0, after=["weigh the sources"]),
        SimNode("review", {"ok": True}, 6.0, after=["write the report"]),
        SimNode("final report", _REPORT, 0.5, after=["review"], is_output_node=True),
    ]
    return Scenario(nodes)


def _invoice_check(inputs: Mapping[str, Any]) -> Scenario:
    invoice = {"invoice": inputs.get("invoice", "INV-2093"), "total": "1,180.00 EUR"}
    nodes = [
        SimNode("read invoice", {**invoice, "order": "PO-4711"}, 1.5),
        SimNode("check sender", "known since 2019", 0.9, after=["read invoice"]),
        SimNode(
            "match purchase order",
            duration=2.8,
            after=["read invoice"],
            status="FAILED",
            error_message=_CLOSED,
            raw_error_message={"raw": _TRACEBACK},
        ),
        SimNode("book payment", after=["check sender", "match purchase order"]),
        SimNode("receipt", after=["book payment"], is_output_node=True),
    ]
    return Scenario(nodes)


def _write_report(inputs: Mapping[str, Any]) -> Scenario:
    """Return what the README and the tutorial run: its output is JSON in a text."""
    topic = inputs.get("topic", "otters")
    status = "FAILED" if topic == "unicorns" else "SUCCESS"
    report = {"title": f"{topic} are fine.".capitalize(), "score": 0.9}
    nodes = [
        SimNode("Plan", "habitat, diet, threats", 0.4),
        SimNode("Search", ["three articles"], 0.8, ["Plan"], status, "nothing found"),
        SimNode("Report", json.dumps(report), 0.6, ["Search"], is_output_node=True),
    ]
    return Scenario(nodes)


def _grade(_: Mapping[str, Any]) -> Scenario:
    return Scenario([SimNode("Grade", 0.9, 0.3, is_output_node=True)])


# The workflows of `view --demo` and `simulate`: what each does, and inputs of a run.
_WORKFLOWS: Mapping[str, tuple[Callable[[Mapping[str, Any]], Scenario], Mapping[str, Any]]] = {
    "support-agent": (support_agent, {"letter": _LETTER}),
    "research-report": (_research_report, {"topic": "otters"}),
    "invoice-check": (_invoice_check, {"invoice": "INV-2093"}),
    "write-report": (_write_report, {"topic": "otters"}),
    "grade": (_grade, {"prompt": "What do otters eat?"}),
}


def add_demo_workflows(simulator: Simulator) -> None:
    for workflow, (scenario, inputs) in _WORKFLOWS.items():
        declared = dict.fromkeys(inputs, "string")
        simulator.add_workflow(workflow, scenario, inputs=declared, definition=scenario({}))


_LETTERS = (
    _LETTER,
    "My invoice of October is missing. Could you send it again?",
    "How do I change the address of my company?",
)
_TOPICS = ("otters", "newts", "storks")


def add_past_runs(simulator: Simulator, history: History, now: float) -> None:
    """Add 36 runs of the days before `now` to a simulator, and to the history of the viewer."""
    for number in range(36):
        is_failing = number in (4, 15)
        if number % 3 == 2:
            workflow, inputs = "research-report", {"topic": _TOPICS[number // 3 % 3]}
            scenario = _research_report(inputs)
        else:
            workflow, inputs = "support-agent", {"letter": _LETTERS[number % 3]}
            scenario = support_agent(inputs, failing=is_failing)
        times = _times_of(scenario, slowness=1 + 0.2 * math.sin(number * 1.7))
        ended = Scenario([attrs.evolve(node, duration=0.0) for node in scenario.nodes])
        began = now - (36 - number) * 5 * 3600
        history.record(
            execution_id=simulator.add_execution(ended),
            workflow=workflow,
            inputs=json.dumps(inputs, indent=2),
            outcome="failed" if is_failing else "succeeded",
            problem=f"search handbook: {_NO_INDEX}" if is_failing else None,
            began=began,
            is_started=True,
            duration=max(end for _, end in times.values()),
            origin=began,
            times=json.dumps(times),
            nodes=len(scenario.nodes),
        )


def _times_of(scenario: Scenario, *, slowness: float) -> dict[str, tuple[float, float]]:
    """Return when each node that can run starts and ends, in seconds."""
    times: dict[str, tuple[float, float]] = {}
    failed = {node.name for node in scenario.nodes if node.status == "FAILED"}
    for node in scenario.nodes:
        if failed.intersection(node.after):
            failed.add(node.name)
        else:
            start = max((times[name][1] for name in node.after), default=0.0)
            times[node.name] = (start, start + slowness * (node.duration or 0.0))
    return times


async def start_runs(board: Board) -> None:
    """Start a run of three workflows once the page of the board is open."""
    await board.opened.wait()
    for workflow in ("support-agent", "research-report", "invoice-check"):
        await board.start(workflow, _WORKFLOWS[workflow][1])


# The node of each execution of `simulate` that ends only after a request.
_HELD = "read letter"
_EXECUTIONS = {
    787: ("ten nodes, succeeds after seven seconds", support_agent(reading=None)),
    788: ("a node fails, so there is no reply", support_agent(reading=None, failing=True)),
}


async def serve(host: str, port: int, webhook_url: str | None) -> None:
    requests: asyncio.Queue[SimRequest] = asyncio.Queue()
    simulator = Simulator(
        host=host,
        port=port,
        log_requests=False,
        on_request=requests.put_nowait,
        webhook_url=webhook_url,
    )
    for execution_id, (_, scenario) in _EXECUTIONS.items():
        simulator.add_execution(scenario, execution_id=execution_id)
    add_demo_workflows(simulator)
    async with AsyncExitStack() as stack:
        with listening(host, port):
            await stack.enter_async_context(simulator)
        out(_introduction(simulator))
        with suppress(asyncio.CancelledError):
            await _print_requests(simulator, requests)


def _introduction(simulator: Simulator) -> str:
    watch = "\n".join(
        f"  {PROGRAM} watch {execution_id}   # {description}"
        for execution_id, (description, _) in _EXECUTIONS.items()
    )
    workflows = "\n".join(f"  {name} ({', '.join(it)})" for name, (_, it) in _WORKFLOWS.items())
    url, secret = simulator.webhook_url, simulator.webhook_secret
    webhook = f"\nIts webhook goes to {url}, with the secret {secret}\n" if url else ""
    return f"""\
A simulated PromptLayer listens at {simulator.base_url} (Ctrl-C ends it).

In another terminal:

  {_set_variable("PROMPTLAYER_BASE_URL", simulator.base_url)}
  {_set_variable("PROMPTLAYER_API_KEY", simulator.api_key)}
{watch}

Each execution begins at its first request. To start another one like the first:

  {PROGRAM} run support-agent -i letter="Where is my refund?"

It knows these workflows, and each name and id that the README and the tutorial use:
{workflows}
{webhook}
Requests:"""


def _set_variable(name: str, value: str) -> str:
    """Return the line that sets an environment variable in the platform's usual shell."""
    return f'$env:{name} = "{value}"' if os.name == "nt" else f"export {name}={value}"


async def _print_requests(simulator: Simulator, requests: asyncio.Queue[SimRequest]) -> NoReturn:
    waiting = {str(execution_id): execution_id for execution_id in _EXECUTIONS}
    while True:
        request = await requests.get()
        query = "&".join(f"{name}={value}" for name, value in request.query.items())
        path = f"{request.path}?{query}" if query else request.path
        out(printable(f"{time.strftime('%H:%M:%S')} {request.method} {path}"))
        requested = request.query.get("workflow_version_execution_id", "")
        if (execution_id := waiting.pop(requested, None)) is not None:
            simulator.finish(execution_id, _HELD)
