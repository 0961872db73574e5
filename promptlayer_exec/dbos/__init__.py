"""Durable batches (extra `dbos`): they survive a crash, and spread over machines."""

from promptlayer_exec.dbos._batch import Batch, batch_names
from promptlayer_exec.dbos._values import BatchStatus, StoredError, StoredOutcome

__all__ = ["Batch", "BatchStatus", "StoredError", "StoredOutcome", "batch_names"]
