"""The request that a key belongs to: its stored form, its digest, and how two requests differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from promptlayer_exec import KeyConflict, StartRequest

# Not `callback_url`, which decides where PromptLayer reports, not what it runs.
_IDENTITY = ("workflow", "inputs", "label", "version", "metadata")
_MISSING = object()


class Row(NamedTuple):
    """A new item: its key, its request as JSON, and the digest of the request."""

    key: str
    request: str
    digest: str


def encode(request: StartRequest, inputs: dict[str, Any]) -> Row:
    """Return the row of a request whose inputs are in JSON form."""
    fields = {
        "workflow": request.workflow,
        "inputs": inputs,
        "label": request.label,
        "version": request.version,
        "metadata": None if request.metadata is None else dict(request.metadata),
        "callback_url": request.callback_url,
    }
    identity = json.dumps({name: fields[name] for name in _IDENTITY}, sort_keys=True)
    return Row(request.key, json.dumps(fields), hashlib.sha256(identity.encode()).hexdigest())


def another_request(batch: str, row: Row, stored: str) -> KeyConflict:
    """Return the error of a key that belongs to another request, given as JSON.

    It names the fields that differ, without their values.
    """
    before, after = json.loads(stored), json.loads(row.request)
    names = [path for name in _IDENTITY for path in _paths(name, before[name], after[name])]

    what = ", ".join(names[:5])
    if len(names) > 5:
        what += f" and {len(names) - 5} more"

    return KeyConflict(
        f"the key {row.key!r:.100} of batch {batch!r} belongs to another request, which differs in"
        f" {what}, so nothing was added",
        advice="Use another key, or another batch.",
        key=row.key,
        batch=batch,
    )


def by_key(batch: str, rows: Iterable[Row], found: dict[str, Row] | None = None) -> dict[str, Row]:
    """Return rows by their keys, together with those that were found before.

    Raises:
        KeyConflict: two of one key are different requests.
    """
    found = {} if found is None else found
    for row in rows:
        known = found.setdefault(row.key, row)
        if known.digest != row.digest:
            raise another_request(batch, row, known.request)
    return found


def _paths(path: str, before: Any, after: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in before | after:
            entries = before.get(name, _MISSING), after.get(name, _MISSING)
            yield from _paths(f"{path}.{name:.40}", *entries)
    elif _compared(before) != _compared(after):
        yield path


def _compared(value: Any) -> str:
    """Return a value in a form to compare as JSON: True is not 1."""
    return json.dumps(value, default=id, sort_keys=True)
