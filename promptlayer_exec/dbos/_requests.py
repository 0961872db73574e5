"""What a key stands for: the stored form of a request, its digest, and how two requests differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from promptlayer_exec import StartRequest

# Not `callback_url`: it is where to report, and not what to run.
_IDENTITY = ("workflow", "inputs", "label", "version", "metadata")
_MOST_DIFFERENCES = 5
_MISSING = object()


class Row(NamedTuple):
    """An item as it is added: its key, its request as JSON, and the digest of the request."""

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


def another_request(batch: str, row: Row, stored: str) -> ValueError:
    """Return the error of a key that stands for another request; it shows what differs, no values.

    `stored` is the JSON of that request.
    """
    before, after = json.loads(stored), json.loads(row.request)
    names = [path for name in _IDENTITY for path in _paths(name, before[name], after[name])]
    more = len(names) - _MOST_DIFFERENCES
    what = ", ".join(names[:_MOST_DIFFERENCES]) + (f" and {more} more" if more > 0 else "")
    return ValueError(
        f"the key {row.key!r:.100} of batch {batch!r} stands for another request ({what} differs):"
        " give this one another key, or add it to another batch; it was not added"
    )


def by_key(batch: str, rows: Iterable[Row]) -> dict[str, Row]:
    """Return rows by their keys; raise ValueError if two of one key are different requests."""
    found: dict[str, Row] = {}
    for row in rows:
        known = found.setdefault(row.key, row)
        if known.digest != row.digest:
            raise another_request(batch, row, known.request)
    return found


def _paths(path: str, before: Any, after: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for name in before | after:
            yield from _paths(
                f"{path}.{name:.40}", before.get(name, _MISSING), after.get(name, _MISSING)
            )
    elif json.dumps(before, default=id, sort_keys=True) != json.dumps(
        after, default=id, sort_keys=True
    ):
        yield path
