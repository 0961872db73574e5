"""Durable batches (extra `dbos`), which survive crashes and can use several machines."""

from promptlayer_exec._integration import install_hint

try:
    from promptlayer_exec._database.location import shown_database_url
    from promptlayer_exec.dbos._batch import Batch, batch_names
    from promptlayer_exec.dbos._records import BatchStatus, StoredError, StoredOutcome
    from promptlayer_exec.dbos._reports import (
        BatchItem,
        BatchSettings,
        Durations,
        Failure,
        RunAttempt,
        StoredItem,
    )
except ModuleNotFoundError as error:
    error.add_note(f"this needs {install_hint('dbos')}")
    raise

__all__ = [
    "Batch",
    "BatchItem",
    "BatchSettings",
    "BatchStatus",
    "Durations",
    "Failure",
    "RunAttempt",
    "StoredError",
    "StoredItem",
    "StoredOutcome",
    "batch_names",
    "shown_database_url",
]
