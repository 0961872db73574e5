"""The names that batches and their items have in DBOS."""

from __future__ import annotations

from urllib.parse import quote

APPLICATION = "promptlayer-exec"
WORKFLOW = "promptlayer_exec.item"


def queue_name(batch: str) -> str:
    """Return the name of a batch's queue."""
    return f"{APPLICATION}/{batch}"


def workflow_id(batch: str, key: str, attempt: int) -> str:
    """Return the id of the DBOS workflow that runs one attempt of an item."""
    return f"{APPLICATION}/{quote(batch, safe='')}/{attempt}/{key}"


def key_and_attempt(workflow_id: str) -> tuple[str, int]:
    """Return the key and the attempt that are in the id of a workflow."""
    _, _, attempt, key = workflow_id.split("/", 3)
    return key, int(attempt)
