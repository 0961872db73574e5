"""The error tree: classes, messages, copies and pickles."""

import copy
import json
import logging
import pickle
import re
import traceback

import pytest

from promptlayer_exec._values import errors
from promptlayer_exec._values.models import Node, Snapshot

NODE = Node("Node 1", "FAILED", error_message="boom")
SNAPSHOT = Snapshot(787, True, {"Node 1": NODE}, raw={"Node 1": {"status": "FAILED"}}, poll=3)
DETAILS = (errors.FieldError(("query", "n", 0), "too large", "int_parsing"),)

CONTEXT = {"execution_id": 787, "last_snapshot": SNAPSHOT}
REQUEST = {"attempts": 3, "reason": "what the cause said"}
STATUS = {
    **REQUEST,
    "server_message": "no such thing",
    "body": {"message": "no such thing"},
    "retry_after": 1.5,
}
# The arguments of each class besides the message and the context, which become its attributes.
FIELDS = {
    "PromptLayerExecError": {},
    "ConfigurationError": {"setting": "rate", "got": "-1"},
    "StoreUnavailable": {},
    "SessionClosed": {},
    "RequestError": REQUEST,
    "ConnectionFailed": {**REQUEST, "tls": "expired"},
    "RequestTimeout": REQUEST,
    "InvalidResponse": {**REQUEST, "status": 200, "excerpt": "[]", "path": "$.Node 1.status"},
    "ResponseTooLarge": {**REQUEST, "status": 200, "excerpt": "[[", "limit": 64},
    "StatusError": {**STATUS, "status": 418},
    "BadRequest": {**STATUS, "status": 400},
    "Unauthorized": {**STATUS, "status": 401},
    "Forbidden": {**STATUS, "status": 403},
    "NotFound": {**STATUS, "status": 404},
    "UnprocessableEntity": {**STATUS, "status": 422, "details": DETAILS},
    "RateLimited": {**STATUS, "status": 429},
    "ServerError": {**STATUS, "status": 503},
    "StartUnknown": {
        "workflow": "analyze",
        "reason": "the connection was lost",
        "callback_token": "t0p-s3cret",
        "key": "order-42",
    },
    "ExecutionTimeout": {"timeout": 2.5},
    "ExecutionFailed": {"failed": (NODE,)},
    "InvalidInputs": {"missing": ("topic",)},
    "KeyConflict": {"key": "order-42", "batch": "night"},
    "InvalidOutput": {"path": "$.items[3].price", "value": {"items": []}, "reason": "a number"},
    "InvalidSignature": {},
}


def every_error():
    """Return each error class of the package, including those of other modules."""
    found = []
    queue = [errors.PromptLayerExecError]
    while queue:
        cls = queue.pop(0)
        found.append(cls)
        queue += [
            sub for sub in cls.__subclasses__() if sub.__module__.startswith("promptlayer_exec")
        ]
    return found


def build(cls, message="it went wrong"):
    """Return an error of a class with all attributes set."""
    return cls(message, **FIELDS[cls.__name__], **CONTEXT)


def carried(error):
    """Return the attributes of an error by the names of the arguments."""
    fields = {name: value for name, value in vars(error).items() if name != "_advice"}
    if "message" in fields:
        fields["server_message"] = fields.pop("message")
    return fields


each_error = pytest.mark.parametrize("cls", every_error(), ids=lambda cls: cls.__name__)


@each_error
def test_every_error_is_tested(cls):
    """Each error class of the package is in the tables here."""
    assert cls.__name__ in FIELDS


@each_error
def test_fields(cls):
    """An error has the execution id, the last snapshot, and the attributes of its class."""
    error = build(cls)
    expected = {**CONTEXT, **FIELDS[cls.__name__]}
    if cls.__name__ == "ResponseTooLarge":
        expected["path"] = None
    assert carried(error) == expected
    assert error.args == ("it went wrong",)


MAKERS = {
    "pickle": lambda error: pickle.loads(pickle.dumps(error)),
    "own-copy": errors.copy_error,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@each_error
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_copies(cls, make):
    """A pickled or copied error has the same class, text, attributes and notes."""
    error = build(cls)
    error._advice = "Ask the author."
    error.add_note("seen on a Tuesday")
    error.my_own = "extra"
    other = make(error)
    assert other is not error
    assert type(other) is cls
    assert other.args == error.args
    assert str(other) == str(error) == f"{error.problem} Ask the author."
    assert (other.problem, other.advice) == (error.problem, "Ask the author.")
    assert repr(other) == repr(error)
    assert vars(other) == vars(error)
    assert other.__notes__ == ["seen on a Tuesday"]


def test_own_copy_has_its_own_traceback():
    """Raising a copy does not change the original's traceback; the copy has the cause."""
    cause = KeyError("root")
    error = build(errors.NotFound)
    error.__cause__ = cause
    duplicate = errors.copy_error(error)
    with pytest.raises(errors.NotFound) as caught:
        raise duplicate
    assert caught.value is duplicate
    assert duplicate.__cause__ is cause
    assert error.__traceback__ is None


def test_another_library_s_error_that_cannot_be_copied_is_returned_as_it_is():
    """Both if copying raises and if it gives another type."""

    class Refusing(Exception):
        def __reduce__(self):
            raise TypeError

    class Changing(Exception):
        def __reduce__(self):
            return str, ()

    for error in (Refusing(), Changing()):
        assert errors.copy_error(error) is error


@each_error
def test_text(cls):
    """The problem names the execution, and the text adds what to do, without an errno."""
    error = build(cls)
    error.last_snapshot = None
    text = str(error)
    assert error.problem.replace(":", "", 1).startswith("execution 787 it went wrong")
    assert error.problem.endswith(".")
    assert text == f"{error.problem} {error.advice or ''}".rstrip()
    assert "[Errno" not in text + repr(error)
    assert not re.search(r"[.;,:!?][.;,:]", text.replace("...", "")), text
    assert text == text.strip()
    assert "\n" not in text
    assert "execution" not in str(cls("it", **FIELDS[cls.__name__])).split("it")[0]


ENDINGS = {
    "full-stop": "the server said: no.",
    "exclamation": "the server said: no!",
    "question": "the server said: why?",
    "blank": "the server said: no. ",
    "newline": "the server said: no.\n",
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("attempts", [1, 3], ids=["once", "repeatedly"])
def test_punctuation(ending, attempts):
    """Punctuation is not doubled, however the message ends: it may be a sentence of the server."""
    for cls in every_error():
        error = build(cls, ENDINGS[ending])
        error.attempts = attempts
        assert not re.search(r"[.;,:!?]\s*[.;,:]", str(error)), str(error)


@pytest.mark.parametrize(("attempts", "shown"), [(1, False), (2, True)], ids=["once", "repeatedly"])
def test_attempts_are_shown(attempts, shown):
    """The number of attempts is shown if there was more than one."""
    text = str(errors.ConnectionFailed("no response", attempts=attempts))
    assert (f"({attempts} attempts)" in text) is shown


@pytest.mark.parametrize(
    ("excerpt", "shown"),
    [("<html>\n", r"The body starts with '<html>\n'"), ("", "The body is empty")],
    ids=["text", "empty"],
)
def test_excerpt_is_shown(excerpt, shown):
    """The start of an invalid body is shown on one line, or that the body is empty."""
    assert shown in str(errors.InvalidResponse("not JSON", status=200, excerpt=excerpt))


@pytest.mark.parametrize(
    "cls", [cls for cls in every_error() if issubclass(cls, OSError)], ids=lambda cls: cls.__name__
)
def test_oserrors_keep_one_argument(cls):
    """Errors that are also OSErrors have no errno, and a traceback shows them as str does."""
    error = build(cls)
    assert error.errno is None
    assert error.strerror is None
    assert traceback.format_exception_only(error) == [
        f"promptlayer_exec._values.errors.{cls.__name__}: {error}\n"
    ]


# Those who raise them pass the advice, because it depends on the setting. The others are bases.
_WITHOUT_ADVICE = {"PromptLayerExecError", "ConfigurationError", "RequestError"}


@each_error
@pytest.mark.parametrize("execution_id", [787, None])
def test_advice(cls, execution_id):
    """Each class has whole sentences on what to do, and what is raised may bring its own."""
    error = cls("it", **FIELDS[cls.__name__], execution_id=execution_id)
    assert (error.advice is None) is (cls.__name__ in _WITHOUT_ADVICE)
    assert error.advice is None or error.advice.endswith(".")
    own = cls("it", **FIELDS[cls.__name__], execution_id=execution_id, advice="Try the other one.")
    assert own.advice == "Try the other one."
    assert str(own) == f"{own.problem} Try the other one."


@each_error
def test_log_records_keep_problem_and_advice(cls):
    """A handler gets the error itself, also one that pickles records for another process."""
    error = build(cls)
    record = logging.LogRecord("-", logging.WARNING, "-", 1, "%s", (error,), None)
    record = pickle.loads(pickle.dumps(record))
    assert record.getMessage() == str(error)
    (logged,) = record.args
    assert (logged.problem, logged.advice) == (error.problem, error.advice)


@each_error
def test_what_is_stored(cls):
    """It is JSON of the class's attributes, without secrets, outputs and bodies."""
    error = build(cls)
    data = errors.stored_data(error)
    assert json.loads(json.dumps(data)) == data
    left_out = {"callback_token", "value", "body", "got"}
    renamed = {"message" if name == "server_message" else name for name in FIELDS[cls.__name__]}
    assert data.keys() == {"execution_id", "reason", *_ALSO_STORED.get(cls.__name__, ())} | (
        renamed - left_out
    )
    assert "t0p-s3cret" not in str(data)
    assert data["reason"] == FIELDS[cls.__name__].get("reason", "it went wrong").replace(
        "it went wrong", errors.what_happened(error)
    )


_ALSO_STORED = {"ResponseTooLarge": ["path"], "StartUnknown": ["is_key_stored"]}


def test_what_is_stored_is_shortened():
    """A batch stores thousands of errors, and a server may send anything."""
    nodes = tuple(Node(f"Node {n}", "FAILED", error_message="x" * 5000) for n in range(50))
    data = errors.stored_data(errors.ExecutionFailed("failed", failed=nodes, execution_id=787))
    assert len(data["failed"]) == 20
    assert data["failed"][0] == {"name": "Node 0", "status": "FAILED", "reason": "x" * 1000}
    error = errors.UnprocessableEntity("no", **{**STATUS, "status": 422}, details=DETAILS)
    assert errors.stored_data(error)["details"] == [
        {"loc": ["query", "n", 0], "msg": "too large", "type": "int_parsing"}
    ]
    assert errors.stored_data(KeyError("x")) == {"reason": "'x'"}


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("red \x1b[31m alert", "red \\x1b[31m alert"),
        ("two\nlines\tand a tab", "two\\nlines\\tand a tab"),
        ("\u202egnol eb", "\\u202egnol eb"),
        ("lone \ud800", "lone \\ud800"),
        ("as it is: äöü 日本 🦀", "as it is: äöü 日本 🦀"),
    ],
)
def test_what_does_not_print_is_escaped(said, shown):
    """A server's text cannot steer a terminal or forge a log line; the attributes keep it."""
    error = errors.BadRequest(f"the server said {said}", status=400, server_message=said, body=said)
    assert str(error).startswith(f"the server said {shown}.")
    assert (error.message, error.body) == (said, said)


def test_a_timeout_after_the_execution_completed_does_not_say_that_it_continues():
    """Only its output is late."""
    text = str(build(errors.ExecutionTimeout))
    assert text == "execution 787: it went wrong. session.execution(787) picks it up."


def test_a_start_that_can_be_recovered_says_so_without_its_token():
    """The token is only in the attribute: whoever has it can forge the start's callback."""
    error = build(errors.StartUnknown)
    assert error.advice.startswith("Session.recover(error) waits for its callback. Look")
    assert error.callback_token not in str(error) + repr(error)
    error.callback_token = None
    assert "recover" not in str(error)


def test_a_closed_session_names_an_execution_only_if_there_is_one():
    """A start that was refused started nothing."""
    assert str(errors.SessionClosed()) == (
        "the session is closed. Make the call while the session is open."
    )
    assert str(errors.SessionClosed(execution_id=787)) == (
        "execution 787: the session is closed. It continues on PromptLayer;"
        " session.execution(787) in an open session picks it up."
    )
