"""Example workflows and executions, for demonstrations and for the README and the tutorial.

They change with those. The module is not part of the public API.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from promptlayer_exec.simulator._scenario import Scenario, SimNode
from promptlayer_exec.simulator._simulator import Simulator

_LETTER = "I was charged twice for my October plan. Could you look into it? Maria Rossi"
_REPLY = """\
Dear Ms. Rossi,

you are right: your October plan was charged twice, on the 1st and on the 3rd.
We have refunded the second payment of 29.00 EUR; it will reach you within five days.

Kind regards, your support team"""
_NO_INDEX = "The handbook index is not available: HTTP 503 from vector-store"


def support_agent(
    inputs: Mapping[str, Any] | None = None, *, reading: float | None = 0.4, failing: bool = False
) -> Scenario:
    """Return an agent of ten nodes that replies to a customer's letter in about seven seconds.

    Its first node takes `reading` seconds. None holds it until `Simulator.finish`.
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
    page = '<title>Otters</title><script>alert("a script is only text here")</script>'
    report = "# Otters of the Danube delta\n\nNumbers have doubled since 2009; two counts agree."
    counts = [{"year": year, "otters": 40 + 7 * (year - 2009)} for year in range(2009, 2026)]
    sources = ["search the web", "search the archive", "query the counts"]

    nodes = [
        SimNode("plan", {"topic": topic, "questions": 3}, 1.2),
        SimNode("search the web", page, 4.0, after=["plan"]),
        SimNode("search the archive", ["report-2009.pdf", "report-2021.pdf"], 6.5, after=["plan"]),
        SimNode("query the counts", counts, 2.4, after=["plan"]),
        SimNode("weigh the sources", {"agree": 2, "differ": 1}, 5.0, after=sources),
        SimNode("write the report", report, 24.0, after=["weigh the sources"]),
        SimNode("review", {"ok": True}, 6.0, after=["write the report"]),
        SimNode("final report", report, 0.5, after=["review"], is_output_node=True),
    ]
    return Scenario(nodes)


def _invoice_check(inputs: Mapping[str, Any]) -> Scenario:
    invoice = {"invoice": inputs.get("invoice", "INV-2093"), "total": "1,180.00 EUR"}
    problem = "Purchase order PO-4711 is closed: the ERP answered 409 Conflict"
    traceback = f"""\
Traceback (most recent call last):
  File "/app/nodes/match_order.py", line 41, in run
    order = erp.reserve(invoice["order"], amount=invoice["total"])
  File "/app/clients/erp.py", line 118, in reserve
    raise OrderClosed(message)
OrderClosed: {problem}"""

    nodes = [
        SimNode("read invoice", {**invoice, "order": "PO-4711"}, 1.5),
        SimNode("check sender", "known since 2019", 0.9, after=["read invoice"]),
        SimNode(
            "match purchase order",
            duration=2.8,
            after=["read invoice"],
            status="FAILED",
            error_message=problem,
            raw_error_message={"raw": traceback},
        ),
        SimNode("book payment", after=["check sender", "match purchase order"]),
        SimNode("receipt", after=["book payment"], is_output_node=True),
    ]
    return Scenario(nodes)


def _write_report(inputs: Mapping[str, Any]) -> Scenario:
    """Return the workflow of the README and the tutorial, whose output is JSON in a string."""
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


@attrs.frozen
class ExampleWorkflow:
    """The scenario of a workflow's runs, and example inputs."""

    scenario: Callable[[Mapping[str, Any]], Scenario]
    inputs: Mapping[str, Any]


WORKFLOWS: Mapping[str, ExampleWorkflow] = {
    "support-agent": ExampleWorkflow(support_agent, {"letter": _LETTER}),
    "research-report": ExampleWorkflow(_research_report, {"topic": "otters"}),
    "invoice-check": ExampleWorkflow(_invoice_check, {"invoice": "INV-2093"}),
    "write-report": ExampleWorkflow(_write_report, {"topic": "otters"}),
    "grade": ExampleWorkflow(_grade, {"prompt": "What do otters eat?"}),
}


def add_workflows(simulator: Simulator) -> None:
    """Add all example workflows to a simulator."""
    for name, example in WORKFLOWS.items():
        declared = dict.fromkeys(example.inputs, "string")
        definition = example.scenario({})
        simulator.add_workflow(name, example.scenario, inputs=declared, definition=definition)


@attrs.frozen
class ExampleExecution:
    """An execution whose `FIRST_NODE` runs until `Simulator.finish`."""

    description: str
    scenario: Scenario


FIRST_NODE = "read letter"
EXECUTIONS: Mapping[int, ExampleExecution] = {
    787: ExampleExecution("ten nodes, succeeds after seven seconds", support_agent(reading=None)),
    788: ExampleExecution(
        "a node fails, so there is no reply", support_agent(reading=None, failing=True)
    ),
}


@attrs.frozen
class ExampleRun:
    """A run of the past, and why it failed, if it did."""

    workflow: str
    inputs: Mapping[str, Any]
    scenario: Scenario
    problem: str | None = None


def past_run(number: int) -> ExampleRun:
    """Return a run of the past. A few fail, and every third is of another workflow."""
    if number % 3 == 2:
        topic = ("otters", "newts", "storks")[number // 3 % 3]
        inputs = {"topic": topic}
        return ExampleRun("research-report", inputs, _research_report(inputs))

    letters = (_LETTER, "My invoice of October is missing. Could you send it again?")
    inputs = {"letter": letters[number % 3]}
    if number in (4, 15):
        problem = f"search handbook: {_NO_INDEX}"
        return ExampleRun("support-agent", inputs, support_agent(inputs, failing=True), problem)
    return ExampleRun("support-agent", inputs, support_agent(inputs))


def node_times(scenario: Scenario, *, slowness: float) -> dict[str, tuple[float, float]]:
    """Return when each node that can run starts and finishes, in seconds."""
    times: dict[str, tuple[float, float]] = {}
    failed = {node.name for node in scenario.nodes if node.status == "FAILED"}

    for node in scenario.nodes:
        if failed.intersection(node.after):
            failed.add(node.name)
        else:
            start = max((times[name][1] for name in node.after), default=0.0)
            times[node.name] = (start, start + slowness * (node.duration or 0.0))

    return times
