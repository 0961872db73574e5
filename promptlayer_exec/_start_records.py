"""One run per key: what a session and the store of its starts ask of each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Literal, Protocol

import attrs

StartState = Literal["sending", "started", "unknown"]

# Seconds for which a call of a store waits for its database, unless the caller says otherwise.
PATIENCE = 10.0


@attrs.frozen
class StartClaim:
    """A start that is about to be sent, and that its key is to stand for.

    Attributes:
        key: what the start is known by.
        token: distinguishes this attempt from all others; it is also in the start's callback URL.
        server: the URL of the server that it goes to.
        request: what is asked for, as `fingerprint` returns it.
        request_timeout: seconds after which its sender no longer waits for the response. A start
            whose result is not recorded a few seconds later is taken for lost.
    """

    key: str
    token: str
    server: str
    request: str
    request_timeout: float


@attrs.frozen
class StoredStart:
    """What is recorded about the start that a key stands for.

    Attributes:
        key: the key.
        state: `sending` while the response may still come, `started` once the execution id is
            known, `unknown` if the response was lost: PromptLayer may have started a run.
        execution_id: the id of the run; None unless `started`.
        workflow: the name or id of the workflow.
        attempts: how many times the start has been sent; 1 unless unknown starts are restarted.
        created: when the key was first used (UTC).
        updated: when the record last changed (UTC).
        server: the URL of the server that the start was sent to.
        request: what was asked for, as `fingerprint` returns it.
        token: the token of the latest attempt.
        age: seconds since `updated`, on the store's own clock.
        replaceable: whether the start is unknown, and has been for so long that another claim with
            the same server and request may take its place.
    """

    key: str
    state: StartState
    execution_id: int | None
    workflow: str | int
    attempts: int
    created: datetime
    updated: datetime
    server: str = attrs.field(repr=False)
    request: str = attrs.field(repr=False)
    token: str = attrs.field(repr=False)
    age: float = attrs.field(repr=False)
    replaceable: bool = attrs.field(repr=False)


class StartStore(Protocol):
    """Records which run each key has started, so that none is started twice.

    `promptlayer_exec.starts.SQLStartStore` is one on SQLite or PostgreSQL. Write your own to keep
    the records in a table of your app.

    Each method is atomic, whichever processes call it at the same time, and can be repeated: a
    second call with the same arguments changes nothing and returns the same. All methods take the
    time from one clock, which is the store's.

    All methods wait at most `patience` seconds, and raise `ConfigurationError` if the store cannot
    be used for so long.
    """

    async def find(self, key: str, *, patience: float = PATIENCE) -> StoredStart | None:
        """Return what is recorded for a key, if anything is."""

    async def claim(self, claim: StartClaim, *, patience: float = PATIENCE) -> StoredStart | None:
        """Record that a start is about to be sent, if nothing is recorded for its key.

        A record that is `replaceable`, and has the same server and request, is replaced. The token
        that it had still counts for `record` and `resolve`.

        If the call is cancelled or fails, the claim must not stay: call `release` with its token.

        Returns:
            None if this claim is recorded now, and otherwise the record that is in its way.
        """

    async def record(
        self, key: str, token: str, execution_id: int | None, *, patience: float = PATIENCE
    ) -> bool:
        """Record the id of the run that the start has begun, or None if nobody knows.

        A sender that was thought dead may still record its id, unless another id is recorded.

        Returns:
            Whether this is what is recorded now.
        """

    async def release(self, key: str, token: str, *, patience: float = PATIENCE) -> None:
        """Forget a claim whose request has started nothing.

        If there were earlier attempts, the start is unknown again, as it was before this one.
        """

    async def resolve(self, token: str, execution_id: int, *, patience: float = PATIENCE) -> bool:
        """Record the id of the run that a start has begun, given only the token of its callback.

        Returns:
            Whether this id is recorded now. False if the token is of no start of this store, or if
            another attempt of the start has another id.
        """


def check_key(key: Any) -> str:
    """Return the key of a start, which must be 1 to 500 characters that any database can store."""
    if not isinstance(key, str):
        raise TypeError(f"key must be a str, got {key!r:.100}")

    is_storable = "\0" not in key and not any("\ud800" <= letter <= "\udfff" for letter in key)
    if not (1 <= len(key) <= 500 and is_storable):
        raise ValueError(
            "key must be 1 to 500 characters, without NUL and without lone surrogates,"
            f" got {key!r:.100}"
        )
    return key


def fingerprint(
    key: str,
    *,
    workflow: str | int,
    inputs: Mapping[str, Any],
    label: str | None = None,
    version: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Return what a start asks for, in a form that can be stored and compared.

    Of inputs and metadata it has the names, and a digest of each value, salted with the key. Equal
    requests with one key have equal fingerprints.

    Args:
        key: the start's key.
        workflow: the name or the id of the workflow, as the caller gave it.
        inputs: the inputs in their JSON form.
        label: the label of the version to run.
        version: the number of the version to run.
        metadata: the caller's own metadata.
    """
    parts = {
        "workflow": workflow,
        "label": label,
        "version": version,
        "inputs": {name: _digest(key, value) for name, value in inputs.items()},
        "metadata": {name: _digest(key, value) for name, value in (metadata or {}).items()},
    }
    return json.dumps(parts, sort_keys=True, separators=(",", ":"))


def workflow_of(request: str) -> str | int:
    """Return the workflow that is in a fingerprint."""
    workflow: str | int = json.loads(request)["workflow"]
    return workflow


def differences(stored: str, given: str) -> list[str]:
    """Return what differs between two fingerprints, such as `["label", "inputs.topic"]`."""
    return [*_differing(json.loads(stored), json.loads(given))]


def _differing(stored: dict[str, Any], given: dict[str, Any]) -> Iterator[str]:
    for part in ("workflow", "label", "version"):
        if stored[part] != given[part]:
            yield part

    for part in ("inputs", "metadata"):
        for name in stored[part] | given[part]:
            if stored[part].get(name) != given[part].get(name):
                yield f"{part}.{name:.40}"


def _digest(key: str, value: Any) -> str:
    text = f"{key}\0{json.dumps(value, sort_keys=True)}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]
