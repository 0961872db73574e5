"""Believable workflows for the viewer's demonstration: one takes long, and one fails."""

import json
from collections.abc import Mapping
from typing import Any

from promptlayer_exec.simulator import Scenario, SimNode, Simulator

from ._agent import LETTER, support_agent

_PAGE = """\
<html><head><title>The Eurasian otter</title></head>
<body><script>alert("a page's script is only text here")</script>
<p>Otters of the Danube delta eat mostly fish.</p></body></html>"""
_REPORT = """\
# Otters of the Danube delta

Numbers have doubled since 2009. Two of the three counts agree; the third one
covers the southern arm alone, and is left out."""
_MISMATCH = "Purchase order PO-4711 is closed: the ERP answered 409 Conflict"
_TRACEBACK = f"""\
Traceback (most recent call last):
  File "/app/nodes/match_order.py", line 41, in run
    order = erp.reserve(invoice["order"], amount=invoice["total"])
  File "/app/clients/erp.py", line 118, in reserve
    raise OrderClosed(message)
OrderClosed: {_MISMATCH}"""

STARTS: Mapping[str, Mapping[str, Any]] = {
    "support-agent": {"letter": LETTER},
    "research-report": {"topic": "otters"},
    "invoice-check": {"invoice": "INV-2093"},
}


def add_agents(simulator: Simulator) -> None:
    """Let a simulator know the workflows of `STARTS`."""
    simulator.add_workflow(
        "support-agent", lambda inputs: support_agent(inputs.get("letter", LETTER))
    )
    simulator.add_workflow("research-report", _research_report)
    simulator.add_workflow("invoice-check", _invoice_check)


def _research_report(inputs: Mapping[str, Any]) -> Scenario:
    topic = inputs.get("topic", "otters")
    counts = [{"year": year, "otters": 40 + 7 * (year - 2009)} for year in range(2009, 2026)]
    sources = ["search the web", "search the archive", "query the counts"]
    return Scenario(
        [
            SimNode("plan", {"topic": topic, "questions": 3}, 1.2),
            SimNode("search the web", _PAGE, 4.0, after=["plan"]),
            SimNode("search the archive", ["report-2009.pdf", "report-2021.pdf"], 6.5, ["plan"]),
            SimNode("query the counts", counts, 2.4, after=["plan"]),
            SimNode("weigh the sources", {"agree": 2, "differ": 1}, 5.0, after=sources),
            SimNode("write the report", _REPORT, 24.0, after=["weigh the sources"]),
            SimNode("review", {"ok": True}, 6.0, after=["write the report"]),
            SimNode("final report", _REPORT, 0.5, after=["review"], is_output_node=True),
        ]
    )


def _invoice_check(inputs: Mapping[str, Any]) -> Scenario:
    invoice = {"invoice": inputs.get("invoice", "INV-2093"), "total": "1,180.00 EUR"}
    return Scenario(
        [
            SimNode("read invoice", {**invoice, "order": "PO-4711"}, 1.5),
            SimNode("check sender", "known since 2019", 0.9, after=["read invoice"]),
            SimNode(
                "match purchase order",
                duration=2.8,
                after=["read invoice"],
                status="FAILED",
                error_message=_MISMATCH,
                raw_error_message={"raw": _TRACEBACK},
            ),
            SimNode("book payment", after=["check sender", "match purchase order"]),
            SimNode("receipt", after=["book payment"], is_output_node=True),
        ]
    )


def invitation() -> str:
    """Return what the page says of the demonstration."""
    topic = json.dumps({"topic": "newts"})
    return (
        "This is a demonstration, on a simulated PromptLayer: nothing is billed. To start another "
        f"run, give the name of one of these workflows, such as research-report with {topic}."
    )
