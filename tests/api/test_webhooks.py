"""Reading webhooks and callbacks, and the callback URLs of starts."""

from __future__ import annotations

import base64
import copy
import hashlib
import hmac
import json
import pickle
import string
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptlayer_exec import ConfigurationError, PromptLayerExecError
from promptlayer_exec.webhooks import (
    Callback,
    Callbacks,
    InvalidSignature,
    read_callback,
    read_webhook,
)

SECRET = "whsec_é"
URL = "https://app.example.com/callbacks"
FINISHED: dict[str, Any] = {
    "event_type": "agent_run_finished",
    "details": {"agent_name": "write-report", "agent_id": 3, "agent_execution_id": 787},
    "user_id": 5,
    "workspace_id": 1,
    "timestamp": "2026-08-21T10:00:00.5+02:00",
}
NODE = {"status": "SUCCESS", "value": "AAA", "error_message": None, "is_output_node": True}


def sign(payload: Any, secret: str = SECRET) -> str:
    """Sign a payload as the vendor's documentation says."""
    text = json.dumps(payload, sort_keys=True)
    return hmac.new(secret.encode(), text.encode("utf-8"), hashlib.sha256).hexdigest()


def body(payload: Any, **options: Any) -> bytes:
    """Return a payload as the body of a request."""
    return json.dumps(payload, **options).encode("utf-8", "surrogatepass")


def test_a_signed_webhook_says_which_execution_is_complete() -> None:
    """Its fields are read, its time is in UTC, and the payload is there as a whole."""
    webhook = read_webhook(body(FINISHED), sign(FINISHED), SECRET)
    assert (webhook.event_type, webhook.execution_id) == ("agent_run_finished", 787)
    assert (webhook.workflow, webhook.workflow_id) == ("write-report", 3)
    assert webhook.timestamp == datetime(2026, 8, 21, 8, 0, 0, 500_000, UTC)
    assert webhook.timestamp.tzinfo is UTC
    assert webhook.payload == FINISHED
    assert pickle.loads(pickle.dumps(webhook)) == copy.deepcopy(webhook) == webhook


def test_the_signature_is_the_one_that_the_vendor_computes() -> None:
    """A signature that was computed once, so that the tests' own way to sign is checked, too."""
    text = b'{"timestamp": null, "event_type": "x", "details": {"b": 1.0, "a": "\xc3\xa9"}}'
    signature = "17e86f30f2c9158d57403e328a7d9896b266f7e44bd068f425d1227708bd84d7"
    assert read_webhook(text, signature, "secret").payload["details"] == {"b": 1.0, "a": "é"}


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("2026-08-21T08:00:00Z", datetime(2026, 8, 21, 8, tzinfo=UTC)),
        ("2026-08-21 08:00:00", datetime(2026, 8, 21, 8, tzinfo=UTC)),
        ("0001-01-01T00:00:00+10:00", None),
        ("yesterday", None),
        (1787299200, None),
        (None, None),
    ],
)
def test_a_time_that_cannot_be_read_is_none(said: Any, read: datetime | None) -> None:
    """A time without an offset is UTC; for the sake of the time alone, no webhook is refused."""
    payload = {**FINISHED, "timestamp": said}
    assert read_webhook(body(payload), sign(payload), SECRET).timestamp == read


def test_another_type_of_event_has_no_execution() -> None:
    """Its details are in the payload."""
    payload = {**FINISHED, "event_type": "report_finished"}
    webhook = read_webhook(body(payload), sign(payload), SECRET)
    assert (webhook.event_type, webhook.execution_id) == ("report_finished", None)
    assert (webhook.workflow, webhook.workflow_id) == (None, None)
    assert webhook.payload["details"]["agent_execution_id"] == 787


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=5),  # with lone surrogates
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


@given(JSON, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_a_payload_is_verified_however_it_is_spelled(
    extra: Any, is_ascii: bool, indent: int | str | None
) -> None:
    """The signature is over the decoded payload: escapes, spaces and the order do not matter."""
    payload = {**FINISHED, "extra": extra}
    spelled = body(payload, ensure_ascii=is_ascii, indent=indent)
    webhook = read_webhook(spelled, sign(payload), SECRET)
    assert body(webhook.payload) == body(json.loads(spelled))


@given(JSON, JSON)
def test_a_changed_payload_is_refused(one: Any, other: Any) -> None:
    """Any change of the decoded payload is noticed."""
    genuine, forged = {**FINISHED, "extra": one}, {**FINISHED, "extra": other}
    if json.dumps(genuine, sort_keys=True) == json.dumps(forged, sort_keys=True):
        assert read_webhook(body(forged), sign(genuine), SECRET)
        return
    with pytest.raises(InvalidSignature):
        read_webhook(body(forged), sign(genuine), SECRET)


@pytest.mark.parametrize(
    "signature",
    [None, "", "0" * 64, sign(FINISHED, "other"), sign(FINISHED).upper(), "é\ud800", " "],
    ids=["none", "empty", "zeros", "another secret", "upper case", "not ASCII", "blank"],
)
def test_a_wrong_signature_is_refused(signature: str | None) -> None:
    """The error is one of the package and a ValueError, and shows neither secret nor body."""
    with pytest.raises(InvalidSignature, match="signature") as caught:
        read_webhook(body(FINISHED), signature, SECRET)
    assert isinstance(caught.value, PromptLayerExecError)
    assert isinstance(caught.value, ValueError)
    text = str(caught.value) + repr(caught.value)
    assert SECRET not in text
    assert "787" not in text


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"no JSON", b"\xff\xfe\xff", b"[" * 100_000, b"1" * 5000],
    ids=["empty", "cut", "text", "not UTF-8", "deep", "long number"],
)
def test_a_body_that_is_no_json_was_not_signed_by_anyone(text: bytes) -> None:
    """It says so; JSON's own error, which has the whole body, is not even its context."""
    with pytest.raises(InvalidSignature, match="not JSON") as caught:
        read_webhook(text, "0" * 64, SECRET)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ is True


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        ([], r"\$: expected an object, got an array"),
        ("text", r"\$: expected an object, got a string"),
        ({}, r"\$\.event_type: expected a string, got null"),
        ({**FINISHED, "event_type": 7}, r"\$\.event_type: expected a string, got an integer"),
        ({**FINISHED, "details": None}, r"\$\.details: expected an object, got null"),
        ({**FINISHED, "details": {}}, r"\$\.details\.agent_execution_id: expected an id, got None"),
        *(
            ({**FINISHED, "details": {"agent_execution_id": wrong}}, "expected an id, got")
            for wrong in (0, -1, 2**63, 1.0, "787", True)
        ),
    ],
)
def test_a_genuine_webhook_of_the_wrong_shape_says_where(payload: Any, said: str) -> None:
    """It is a ValueError, but not an InvalidSignature: PromptLayer did send it."""
    with pytest.raises(ValueError, match=said) as caught:
        read_webhook(body(payload), sign(payload), SECRET)
    assert not isinstance(caught.value, InvalidSignature)


def test_names_of_the_wrong_type_are_none() -> None:
    """An execution can be woken without them."""
    details = {"agent_execution_id": 787, "agent_name": 5, "agent_id": "3"}
    payload = {**FINISHED, "details": details}
    webhook = read_webhook(body(payload), sign(payload), SECRET)
    assert (webhook.execution_id, webhook.workflow, webhook.workflow_id) == (787, None, None)


def test_a_webhook_of_more_than_a_mebibyte_is_not_read() -> None:
    """At that size it is still read; one byte more is refused before it is decoded."""
    payload = {**FINISHED, "extra": ""}
    payload["extra"] = "x" * (2**20 - len(body(payload)))
    assert read_webhook(body(payload), sign(payload), SECRET).execution_id == 787
    with pytest.raises(ValueError, match="larger than 1048576 bytes"):
        read_webhook(body(payload) + b" ", sign(payload), SECRET)


def test_mistakes_in_the_program_are_named() -> None:
    """A decoded body, and a secret that is missing or empty, are no fault of the sender."""
    with pytest.raises(TypeError, match="body must be the received bytes, not an object"):
        read_webhook(FINISHED, sign(FINISHED), SECRET)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="secret must be a str, not null"):
        read_webhook(body(FINISHED), sign(FINISHED), None)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="secret must not be empty"):
        read_webhook(body(FINISHED), sign(FINISHED, ""), "")
    with pytest.raises(TypeError, match="body must be the received bytes"):
        read_callback("{}")  # type: ignore[arg-type]


def callback(output: Any = None, execution_id: Any = 787) -> bytes:
    """Return the body of a callback."""
    return body({"workflow_version_execution_id": execution_id, "final_output": output})


@pytest.mark.parametrize(
    "output",
    [{"Node 1": NODE}, {"a": {"status": 1}}, {}, [], "AAA", "", 1.5, 0, False, None],
    ids=repr,
)
def test_a_callback_has_the_id_and_the_output_as_posted(output: Any) -> None:
    """A node map, and a main output of any JSON type; its repr does not show it."""
    read = read_callback(callback(output))
    assert (read.execution_id, read.output, type(read.output)) == (787, output, type(output))
    assert repr(read) == "Callback(execution_id=787)"
    assert pickle.loads(pickle.dumps(read)) == copy.deepcopy(read) == read
    assert read_callback(bytearray(callback(output))) == read


def test_a_callback_without_an_output_is_one() -> None:
    """Its id is all that it must have."""
    assert read_callback(b'{"workflow_version_execution_id": 787, "x": 1}') == Callback(787, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "not JSON"),
        (b"<html>", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", r"\$: expected an object, got an array"),
        (b"{}", r"\$.workflow_version_execution_id: expected an id, got None"),
        (callback(execution_id=0), "expected an id, got 0"),
        (callback(execution_id=True), "expected an id, got True"),
        (callback(execution_id="787"), "expected an id, got '787'"),
    ],
)
def test_a_callback_without_an_id_says_what_is_wrong(text: bytes, said: str) -> None:
    """It is a ValueError."""
    with pytest.raises(ValueError, match=said):
        read_callback(text)


def test_each_token_is_new_and_recognized_by_the_secret_alone() -> None:
    """Any process with the secret recognizes it, whatever its URL; no other secret does.

    It is 128 random bits and as many of a signature.
    """
    callbacks = Callbacks(URL, secret=SECRET)
    tokens = {callbacks.new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert {len(base64.urlsafe_b64decode(f"{token}=")) for token in tokens} == {32}
    assert all(map(callbacks.is_genuine, tokens))
    assert all(set(token) <= set(string.ascii_letters + string.digits + "-_") for token in tokens)
    assert all(map(Callbacks("http://localhost:8000", secret=SECRET).is_genuine, tokens))
    assert not any(map(Callbacks(URL, secret="other").is_genuine, tokens))


def test_a_token_that_was_changed_in_any_place_is_not_genuine() -> None:
    """Not even where the change decodes to the same bytes."""
    callbacks = Callbacks(URL, secret=SECRET)
    token = callbacks.new_token()
    alphabet = string.ascii_letters + string.digits + "-_"
    for place, char in enumerate(token):
        for other in alphabet.replace(char, ""):
            assert not callbacks.is_genuine(token[:place] + other + token[place + 1 :])
    for forged in ("", "x", token[:-1], token + "A", token + "=", f"{token}\n", "é" * 43, "\ud800"):
        assert not callbacks.is_genuine(forged)


@pytest.mark.parametrize(
    ("url", "first"),
    [
        (URL, f"{URL}/t"),
        (f"{URL}/", f"{URL}/t"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/t"),
    ],
)
def test_the_url_of_a_start_is_below_that_of_the_callbacks(url: str, first: str) -> None:
    """A slash at the end makes no difference."""
    assert Callbacks(url, secret=SECRET).url_for("t") == first


@pytest.mark.parametrize(
    "url", ["", "app.example.com/x", "ftp://a/b", "http://", "http://a:99999", None, 5, "http://["]
)
def test_a_url_that_nothing_can_be_posted_to_is_refused(url: Any) -> None:
    """It says what a usable one looks like."""
    with pytest.raises(ConfigurationError, match=r"https://app\.example\.com/callbacks"):
        Callbacks(url, secret=SECRET)


@pytest.mark.parametrize("end", ["?a=1", "#top"])
def test_a_url_with_a_query_is_refused(end: str) -> None:
    """The token would become part of it."""
    with pytest.raises(ConfigurationError, match="query or fragment"):
        Callbacks(URL + end, secret=SECRET)


def test_the_secret_of_callbacks_is_checked_and_not_shown() -> None:
    """It must not be empty; a repr has the URL alone."""
    with pytest.raises(ConfigurationError, match="must not be empty"):
        Callbacks(URL, secret="")
    with pytest.raises(TypeError, match="secret must be a str, not null"):
        Callbacks(URL, secret=None)  # type: ignore[arg-type]
    assert repr(Callbacks(URL, secret=SECRET)) == f"Callbacks(url='{URL}')"


def test_the_password_in_the_url_of_callbacks_is_not_shown() -> None:
    """PromptLayer gets it with each start."""
    callbacks = Callbacks("https://jane:hunter2@app.example/callbacks", secret=SECRET)
    assert repr(callbacks) == "Callbacks(url='https://app.example/callbacks')"
    assert callbacks.url_for("t") == "https://jane:hunter2@app.example/callbacks/t"
    with pytest.raises(ConfigurationError, match=r"got 'ftp://app\.example'"):
        Callbacks("ftp://jane:hunter2@app.example", secret=SECRET)
