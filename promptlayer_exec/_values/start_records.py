"""One run per key: the Protocol between a session and its start store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Literal, Protocol

import attrs

StartState = Literal["sending", "started", "unknown"]

# What a start with a key adds to the run's metadata, so that you find the run on PromptLayer.
KEY_METADATA = "promptlayer_exec.key"


@attrs.frozen
class StartClaim:
    """A claim to a key, by a request that a session is about to send.

    Attributes:
        key: the key of the request.
        token: a unique id of this attempt, which is also in the run's callback URL.
        server: the URL of the server.
        request: the request's `fingerprint`.
        request_timeout: seconds after which the sender stops waiting for the response. If it
            records no result within a few more seconds, the response counts as lost.
    """

    key: str
    token: str
    server: str
    request: str
    request_timeout: float


@attrs.frozen
class StoredStart:
    """The record of a key: which request it belongs to, and which run that request started.

    Attributes:
        key: the key.
        state: `sending` while the response may still come, `started` once the execution id is
            known, `unknown` if the response was lost: PromptLayer may have started a run.
        execution_id: the id of the run, None unless `started`.
        workflow: the name or id of the workflow.
        attempts: how often a session sent the request. More than 1 only if sessions resend unknown
            starts.
        created: when a session first used the key (UTC), just before it sent the request.
        updated: when the record last changed (UTC).
        server: the URL of the server.
        request: the request's `fingerprint`.
        token: the token of the latest attempt.
        age: seconds since `updated`, on the store's own clock.
        replaceable: whether the state has been `unknown` for long enough that another claim with
            the same server and request may replace it.
        earlier_token: the token of the attempt before the latest one, if there was one.
        reason: why the state is `unknown`, or None.
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
    earlier_token: str | None = attrs.field(default=None, repr=False)
    reason: str | None = None


class StartStore(Protocol):
    """Records which run each key has started, so that no key starts two.

    `promptlayer_exec.starts.SQLStartStore` does so in SQLite or PostgreSQL. Write your own to keep
    the records in your app's tables.

    Each method must be atomic across processes, and repeatable: a second call with the same
    arguments changes nothing and returns the same. All methods use the store's own clock.

    All methods wait at most `patience` seconds. Whatever they raise, except for `KeyConflict` and
    `ConfigurationError`, reaches the caller as the cause of a `StoreUnavailable`.
    """

    async def find(self, key: str, *, patience: float = 5.0) -> StoredStart | None:
        """Return the record of a key, or None if it has none."""

    async def claim(self, claim: StartClaim, *, patience: float = 5.0) -> StoredStart | None:
        """Record that a session is about to send a request, unless its key already has a record.

        A `replaceable` record with the same server and request gives way. Its token still counts
        for `record` and `resolve`.

        If the caller cancels it or it fails, the claim must not stay: call `release` with its
        token.

        Args:
            claim: the key, and the request to send for it.
            patience: how long to wait for the store, in seconds.

        Returns:
            None if it recorded this claim, or else the record that is in the way.
        """

    async def record(
        self, key: str, token: str, execution_id: int | None, *, patience: float = 5.0
    ) -> bool:
        """Record the id of the run that the request started, or None if the response was lost.

        A sender that counted as dead may still record its id, unless there already is another id.

        Args:
            key: the key.
            token: the token of the claim.
            execution_id: the id of the run, or None if the response was lost.
            patience: how long to wait for the store, in seconds.

        Returns:
            Whether this is now the record.
        """

    async def release(self, key: str, token: str, *, patience: float = 5.0) -> None:
        """Forget a claim whose request started nothing.

        If there were earlier attempts, the state becomes `unknown` again, as before this one.

        Args:
            key: the key.
            token: the token of the claim.
            patience: how long to wait for the store, in seconds.
        """

    async def resolve(self, token: str, execution_id: int, *, patience: float = 5.0) -> bool:
        """Record the id of the run that a request started, given only its callback's token.

        Args:
            token: the token in the callback's URL.
            execution_id: the id in the callback.
            patience: how long to wait for the store, in seconds.

        Returns:
            Whether the record now has this id. False if the store has no record with this token, or
            if another attempt got another id.
        """


def check_key(key: Any) -> str:
    """Return a key, which must be 1 to 500 characters that any database can store."""
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
    """Return a request in a form to store and compare.

    It contains the names of inputs and metadata, with a digest of each value, salted with the key.
    Equal requests with the same key have equal fingerprints.

    Args:
        key: the request's key.
        workflow: the name or id of the workflow, as the caller passed it.
        inputs: the inputs in their JSON form.
        label: the label of the version to run.
        version: the number of the version to run.
        metadata: the strings to store with the run.
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
    """Return the workflow in a fingerprint."""
    workflow: str | int = json.loads(request)["workflow"]
    return workflow


def differences(stored: str, given: str) -> list[str]:
    """Return the differences of two fingerprints, such as `["label", "inputs.topic"]`."""
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
