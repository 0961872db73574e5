"""Webhooks and callbacks: what PromptLayer posts to your server when an execution is complete.

https://docs.promptlayer.com/features/prompt-registry/webhooks
https://docs.promptlayer.com/reference/run-workflow
"""

from __future__ import annotations

import base64
import hmac
import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NoReturn, TypeGuard

import attrs
from yarl import URL

from promptlayer_exec._api.json import loads
from promptlayer_exec._api.redaction import CREDENTIALS
from promptlayer_exec._values.arguments import MAX_ID
from promptlayer_exec._values.errors import ConfigurationError, InvalidSignature
from promptlayer_exec._values.text import json_kind

__all__ = ["Callback", "Callbacks", "InvalidSignature", "Webhook", "read_callback", "read_webhook"]

MAX_WEBHOOK_BYTES = 1024 * 1024
_NONCE_BYTES = 16
_PURPOSE = b"promptlayer_exec callback "


@attrs.frozen
class Webhook:
    """A genuine webhook of PromptLayer.

    PromptLayer may send it several times, and anyone who has seen it can replay it: the signature
    never expires. Treat it as a hint to look at the execution.

    Attributes:
        event_type: what happened, such as `agent_run_finished`.
        execution_id: the id of the execution for `agent_run_finished`, None for other events.
        workflow: the name of its workflow, if the webhook has it.
        workflow_id: the id of its workflow, if the webhook has it.
        timestamp: when it happened (UTC), or None if the webhook has no readable time.
        payload: the decoded body, with all fields.
    """

    event_type: str
    execution_id: int | None
    workflow: str | None
    workflow_id: int | None
    timestamp: datetime | None
    payload: Mapping[str, Any] = attrs.field(repr=False)


def read_webhook(body: bytes, signature: str | None, secret: str) -> Webhook:
    """Return the webhook in a request's body, if PromptLayer signed it.

    Args:
        body: the raw body of the request, at most 1 MiB.
        signature: the request's header `X-PromptLayer-Signature`, or None if there is none.
        secret: the webhook's secret, from PromptLayer's settings.

    Raises:
        InvalidSignature: PromptLayer did not sign this body, or used another secret.
        ValueError: it is not a documented webhook, or larger than 1 MiB.
        ConfigurationError: the secret is empty.
        TypeError: `body` is not bytes, or `secret` not a str.
    """
    _check_bytes(body)
    if len(body) > MAX_WEBHOOK_BYTES:
        raise ValueError(f"webhook is larger than {MAX_WEBHOOK_BYTES} bytes: {len(body)} bytes")
    payload = _verified(body, signature, check_secret(secret))

    if not isinstance(payload, dict):
        _malformed("webhook", "$", f"expected an object, got {json_kind(payload)}")
    event_type = payload.get("event_type")
    if not isinstance(event_type, str):
        _malformed("webhook", "$.event_type", f"expected a string, got {json_kind(event_type)}")
    timestamp = _time(payload.get("timestamp"))
    if event_type != "agent_run_finished":
        return Webhook(event_type, None, None, None, timestamp, payload)

    details = payload.get("details")
    if not isinstance(details, dict):
        _malformed("webhook", "$.details", f"expected an object, got {json_kind(details)}")
    execution_id = details.get("agent_execution_id")
    if not _is_id(execution_id):
        path = "$.details.agent_execution_id"
        _malformed("webhook", path, f"expected an id, got {execution_id!r:.100}")

    workflow, workflow_id = details.get("agent_name"), details.get("agent_id")
    if not isinstance(workflow, str):
        workflow = None
    if not _is_id(workflow_id):
        workflow_id = None
    return Webhook(event_type, execution_id, workflow, workflow_id, timestamp, payload)


def _verified(body: bytes, signature: str | None, secret: str) -> Any:
    """Return the decoded body, if the signature is that of its canonical form."""
    if not signature:
        raise InvalidSignature("the webhook has no signature")

    try:
        # As the sender does it, with Python's own JSON: other decoders treat numbers differently.
        payload = json.loads(body)
        canonical = json.dumps(payload, sort_keys=True)
    except (ValueError, RecursionError):
        # Without a cause: its text and its attributes quote the body.
        raise InvalidSignature(
            "cannot check the signature, because the webhook is not JSON"
        ) from None

    expected = hmac.digest(secret.encode(), canonical.encode(), "sha256").hex()
    if not hmac.compare_digest(expected.encode(), signature.encode(errors="replace")):
        raise InvalidSignature("the webhook's signature does not match")
    return payload


@attrs.frozen
class Callback:
    """What PromptLayer posted to a run's `callback_url` when the execution was complete.

    The output is the callback's `final_output`, None if it has none. For runs that this package
    started, it contains all nodes. For others, it may be the main output alone.

    Attributes:
        execution_id: the id of the execution.
        output: the output, as above.
    """

    execution_id: int
    output: Any = attrs.field(repr=False)


def read_callback(body: bytes) -> Callback:
    """Return what PromptLayer posted to a run's `callback_url`.

    PromptLayer does not sign the body. Treat it as a hint to look at the execution, unless its URL
    is a secret between you and PromptLayer.

    Raises:
        ValueError: it is not a JSON object with the id of an execution.
        TypeError: `body` is not bytes.
    """
    _check_bytes(body)
    try:
        callback = loads(bytes(body))
    except (ValueError, RecursionError):
        raise ValueError("the callback is not JSON") from None

    if not isinstance(callback, dict):
        _malformed("callback", "$", f"expected an object, got {json_kind(callback)}")
    execution_id = callback.get("workflow_version_execution_id")
    if not _is_id(execution_id):
        path = "$.workflow_version_execution_id"
        _malformed("callback", path, f"expected an id, got {execution_id!r:.100}")
    return Callback(execution_id, callback.get("final_output"))


@attrs.frozen
class Callbacks:
    """Gives each run of a `Session(callbacks=...)` its own callback URL.

    Pass it to the session, and to the route that receives the callbacks::

        callbacks = Callbacks("https://app.example.com/callbacks", secret=os.environ["APP_SECRET"])
        session = Session(callbacks=callbacks)
        app.include_router(create_callback_router(session, callbacks=callbacks))

    PromptLayer posts to that URL when the run is complete. If the response to the start request was
    lost, the callback proves that the run started, and contains its id.

    Args:
        url: your server's URL for callbacks, as PromptLayer reaches it, for example
            `https://app.example.com/callbacks`. The session appends `/` and a token that nobody can
            guess.
        secret: signs the tokens, so that every process with the same secret recognizes them. Keep
            it from everyone else.

    Raises:
        ConfigurationError: `url` is not an http or https URL, or the secret is empty.
        TypeError: `secret` is not a str.
    """

    url: str = attrs.field(repr=lambda url: repr(CREDENTIALS.sub("", url)))
    # Type checkers that do not know attrs learn the name of the argument from `alias`.
    _secret: str = attrs.field(alias="secret", kw_only=True, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "url", _callbacks_url(self.url))
        check_secret(self._secret)

    def new_token(self) -> str:
        """Return the token of a new run."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _text(nonce + self._sign(nonce))

    def url_for(self, token: str) -> str:
        """Return the callback URL for a token."""
        return f"{self.url}/{token}"

    def is_genuine(self, token: str) -> bool:
        """Return True if a token was made with this secret."""
        try:
            raw = base64.urlsafe_b64decode(f"{token}=".encode("ascii"))
        except ValueError:
            return False
        # Several texts decode to the same bytes, but only one of them is the token.
        if _text(raw) != token:
            return False
        nonce, signature = raw[:_NONCE_BYTES], raw[_NONCE_BYTES:]
        return hmac.compare_digest(self._sign(nonce), signature)

    def _sign(self, nonce: bytes) -> bytes:
        return hmac.digest(self._secret.encode(), _PURPOSE + nonce, "sha256")[:_NONCE_BYTES]


def check_secret(secret: Any) -> str:
    """Return a secret, or raise an error if it is unusable."""
    if not isinstance(secret, str):
        raise TypeError(f"secret must be a str, not {json_kind(secret)}")
    if not secret:
        rule = "secret must not be empty: anyone could sign with it"
        raise ConfigurationError(rule, setting="secret")
    return secret


def _callbacks_url(text: Any) -> str:
    try:
        url = URL(text)
        is_usable = url.scheme in ("http", "https") and bool(url.host) and url.port is not None
    except (TypeError, ValueError):
        is_usable = False
    if not is_usable:
        raise ConfigurationError(
            "the callbacks' url must be an http:// or https:// URL with a host, such as"
            " 'https://app.example.com/callbacks'",
            setting="url",
            got=f"{CREDENTIALS.sub('', repr(text)):.100}",
        )
    if url.raw_query_string or url.raw_fragment:
        rule = "the callbacks' url must not have a query or fragment"
        raise ConfigurationError(rule, setting="url")
    return str(url).rstrip("/")


def _check_bytes(body: Any) -> None:
    if not isinstance(body, bytes | bytearray):
        raise TypeError(f"body must be the received bytes, not {json_kind(body)}")


def _is_id(value: Any) -> TypeGuard[int]:
    return type(value) is int and 1 <= value <= MAX_ID


def _time(text: Any) -> datetime | None:
    with suppress(TypeError, ValueError, OverflowError):
        time = datetime.fromisoformat(text)
        if time.tzinfo is None:
            return time.replace(tzinfo=UTC)
        return time.astimezone(UTC)
    return None


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode("ascii").rstrip("=")


def _malformed(what: str, path: str, reason: str) -> NoReturn:
    raise ValueError(f"the {what} is malformed at {path}: {reason}")
