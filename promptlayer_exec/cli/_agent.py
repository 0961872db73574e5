"""A believable workflow for the simulator: an agent that answers a customer's letter."""

from typing import Any

from promptlayer_exec.simulator import Scenario, SimNode

LETTER = "I was charged twice for my October plan. Could you look into it? Maria Rossi"
_REPLY = """\
Dear Ms. Rossi,

you are right: your October plan was charged twice, on the 1st and on the 3rd.
We have refunded the second payment of 29.00 EUR; it will reach you within five days.

Kind regards, your support team"""


def support_agent(
    letter: Any = LETTER, *, reading: float | None = 0.4, failing: bool = False
) -> Scenario:
    """Return an agent of ten nodes that needs about seven seconds.

    Args:
        letter: what the customer writes.
        reading: seconds that its first node takes; None holds it until it is told to finish.
        failing: whether a node fails, so that there is no reply.
    """
    outage = "The handbook index is not available: HTTP 503 from vector-store"
    return Scenario(
        [
            SimNode("read letter", {"from": "Maria Rossi", "text": letter}, reading),
            SimNode("detect language", "en", 0.5, after=["read letter"]),
            SimNode("classify", {"topic": "billing", "urgency": 2}, 0.9, after=["read letter"]),
            SimNode(
                "search handbook",
                ["Refunds: a double charge is refunded in full.", "Tone: warm, brief, no jargon."],
                1.6,
                after=["classify"],
                status="FAILED" if failing else "SUCCESS",
                error_message=outage,
                raw_error_message={"raw": f"Traceback (most recent call last): ...\n{outage}"},
            ),
            SimNode(
                "look up account",
                {"customer": 40817, "charges": ["10-01 29.00 EUR", "10-03 29.00 EUR"]},
                0.8,
                after=["classify"],
            ),
            SimNode(
                "draft answer",
                _REPLY,
                2.2,
                after=["detect language", "search handbook", "look up account"],
            ),
            SimNode("check tone", {"ok": True, "score": 0.94}, 0.7, after=["draft answer"]),
            SimNode("check facts", {"ok": True, "claims": 3}, 1.3, after=["draft answer"]),
            SimNode(
                "ask a colleague",
                after=["check tone", "check facts"],
                when=lambda values: not values["check facts"]["ok"],
            ),
            SimNode(
                "final reply",
                _REPLY,
                0.6,
                after=["check tone", "check facts", "ask a colleague"],
                is_output_node=True,
            ),
        ]
    )
