"""The errors of refused requests: their class, and the message of the server in a body."""

import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from promptlayer_exec._api.messages import Response
from promptlayer_exec._api.status import status_error, status_name
from promptlayer_exec._values import errors
from promptlayer_exec._values.errors import FieldError, StatusError

STATUSES = {
    400: errors.BadRequest,
    401: errors.Unauthorized,
    402: StatusError,
    403: errors.Forbidden,
    404: errors.NotFound,
    422: errors.UnprocessableEntity,
    429: errors.RateLimited,
    500: errors.ServerError,
    503: errors.ServerError,
    520: errors.ServerError,
    599: errors.ServerError,
}


def refused(status, body=b"", **fields):
    """Return the error for a response."""
    return status_error(Response(status, body, **fields))


@pytest.mark.parametrize(("status", "cls"), STATUSES.items())
def test_status_error(status, cls):
    """Each status has its class, with the status, the server's message and Retry-After."""
    body = {"success": False, "message": "no such thing", "extra": [1]}
    error = refused(status, json.dumps(body).encode(), retry_after=2.5)
    assert type(error) is cls
    assert error.status == status
    assert error.message == "no such thing"
    assert error.body == body
    assert error.retry_after == 2.5
    assert error.reason.startswith(str(status))
    assert str(status) in str(error)
    assert "no such thing" in str(error)


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308, 399])
def test_redirect(status):
    """A redirect is a StatusError that names the target and says that it is not followed."""
    error = refused(status, b"<html>moved</html>", location="https://elsewhere.test/x")
    assert type(error) is StatusError
    assert error.status == status
    assert "https://elsewhere.test/x" in str(error)
    assert "not followed" in str(error)


def test_redirect_without_a_target():
    """A redirect may have no target, as a 304 has none, or one too long to show."""
    assert str(refused(304)).startswith("the server returned 304 Not Modified. ")
    assert len(str(refused(302, location="https://x.test/" + "y" * 10_000))) < 500


BODIES = {
    "message": (b'{"success": false, "message": "said"}', "said"),
    "error": (b'{"success": false, "error": "said"}', "said"),
    "message-before-error": (b'{"error": "other", "message": "said"}', "said"),
    "empty-message": (b'{"message": "", "error": "said"}', "said"),
    "null-message": (b'{"message": null, "error": "said"}', "said"),
    "object-message": (b'{"message": {"a": 1}, "error": "said"}', "said"),
    "detail": (b'{"detail": "said"}', "said"),
    "plain-text": (b"said\n", "said"),
    "json-text": (b'"said"', "said"),
    "with-bom": (b'\xef\xbb\xbf{"message": "said"}', "said"),
    "html": (b"<html>nothing</html>", None),
    "html-later": (b"\n  <!DOCTYPE html>", None),
    "empty": (b"", None),
    "blank": (b" \n", None),
    "blank-message": (b'{"message": " \\n"}', None),
    "array": (b"[1]", None),
    "null": (b"null", None),
    "false": (b"false", None),
    "number": (b"17", None),
    "no-words": (b'{"success": false}', None),
    "only-objects": (b'{"error": {"code": 1}}', None),
    "empty-object": (b"{}", None),
    "deep": (b"[" * 100_000, "[" * 200),
    "digits": (b"9" * 5000, "9" * 200),
}


@pytest.mark.parametrize(("body", "said"), BODIES.values(), ids=BODIES)
def test_server_message(body, said):
    """The message is found in every known shape of body; without one, the status is the message."""
    error = refused(404, body)
    assert error.message == (said or "404 Not Found")
    assert not re.search(r"[:.,;]\s*[.,;]", str(error))


@pytest.mark.parametrize(
    ("body", "decoded"),
    [
        *[(b'{"a": 1}', {"a": 1}), (b"null", None), (b"[]", [])],
        *[(b"<html>", "<html>"), (b"", ""), (b"\xff", "\ufffd"), (b"{", "{")],
    ],
)
def test_error_body(body, decoded):
    """The body of an error is the decoded JSON, or the text of a body that is not JSON."""
    assert refused(500, body).body == decoded


def test_a_long_message_is_shortened():
    """The text of the error stays short; `body` has the whole message."""
    for body in (b"x" * 60_000, json.dumps({"message": "x" * 60_000}).encode()):
        error = refused(500, body)
        assert len(str(error)) < 2000
        assert len(error.body if isinstance(error.body, str) else error.body["message"]) == 60_000


@pytest.mark.parametrize("status", [520, 499, 999])
def test_status_without_a_name(status):
    """A status without a standard name is shown as its number."""
    error = refused(status)
    assert status_name(status) == str(status)
    assert error.message == error.reason == str(status)
    assert f"returned {status}. " in f"{error} "


FASTAPI = {
    "detail": [
        {
            "loc": ["query", "workflow_version_execution_id"],
            "msg": "Input should be a valid integer",
            "type": "int_parsing",
            "input": "x",
        },
        {"loc": ["body", "rows", 0, "a"], "msg": "Field required", "type": "missing"},
    ]
}


def test_unprocessable_with_details():
    """Each invalid parameter in FastAPI's list becomes a FieldError, and is shown in the text."""
    error = refused(422, json.dumps(FASTAPI).encode())
    assert error.details == (
        FieldError(
            ("query", "workflow_version_execution_id"),
            "Input should be a valid integer",
            "int_parsing",
        ),
        FieldError(("body", "rows", 0, "a"), "Field required", "missing"),
    )
    assert error.message == (
        "query.workflow_version_execution_id: Input should be a valid integer; "
        "body.rows.0.a: Field required"
    )
    assert error.message in str(error)
    assert error.body == FASTAPI


@pytest.mark.parametrize(
    ("detail", "details"),
    [
        ("text", ()),
        (None, ()),
        ({"loc": ["a"], "msg": "b", "type": "c"}, ()),
        ([], ()),
        (["text", 1, None, []], ()),
        ([{}], ()),
        ([{"loc": "query"}], ()),
        ([{"loc": None, "msg": "b"}], ()),
        ([{"loc": ["a"]}], (FieldError(("a",), "", ""),)),
        ([{"loc": ["a"], "msg": None, "type": None}], (FieldError(("a",), "", ""),)),
        ([{"loc": [], "msg": "b", "type": "c"}], (FieldError((), "b", "c"),)),
        ([{"loc": ["a"], "msg": 1, "type": ["c"]}], (FieldError(("a",), "1", "['c']"),)),
        (
            [{"loc": [True, None, 1.5, 2, {}], "msg": "b", "type": "c"}],
            (FieldError(("True", "None", "1.5", 2, "{}"), "b", "c"),),
        ),
        (["text", {"loc": ["a"], "msg": "b", "type": "c"}], (FieldError(("a",), "b", "c"),)),
    ],
    ids=lambda value: None if isinstance(value, tuple) else repr(value),
)
def test_details_of_another_shape(detail, details):
    """Items of another shape than FastAPI's are left out of `details`; `body` has them."""
    body = {"detail": detail}
    error = refused(422, json.dumps(body).encode())
    assert error.details == details
    assert error.body == body
    assert isinstance(str(error), str)


def test_only_422_has_details():
    """For another status, FastAPI's list gives the message alone."""
    error = refused(400, json.dumps(FASTAPI).encode())
    assert type(error) is errors.BadRequest
    assert "Field required" in error.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["detail", "loc", "message"]) | st.text(max_size=3), inner, max_size=3
        )
    ),
    max_leaves=5,
)


@given(st.binary(max_size=30) | JSON.map(lambda value: json.dumps(value).encode()))
@example(b'{"detail": [{"loc": ["\\ud800"]}]}')
def test_any_body(body):
    """Every body gives an error with a message."""
    assert refused(422, body).message
