"""Durable batches (extra `dbos`): they survive crashes, and several machines can share one."""

from promptlayer_exec._integration import install_hint

try:
    from promptlayer_exec.dbos._batch import Batch, batch_names
    from promptlayer_exec.dbos._values import BatchStatus, StoredError, StoredOutcome
except ModuleNotFoundError as error:
    error.add_note(f"this needs an extra: {install_hint('dbos')}")
    raise

__all__ = ["Batch", "BatchStatus", "StoredError", "StoredOutcome", "batch_names"]
