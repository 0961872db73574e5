"""The error tree: classes, messages, copies and pickles."""

import copy
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
    "ConfigurationError": {},
    "SessionClosed": {},
    "RequestError": REQUEST,
    "ConnectionFailed": REQUEST,
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
    "KeyConflict": {"key": "order-42"},
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
    fields = dict(vars(error))
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
    error.add_note("seen on a Tuesday")
    error.my_own = "extra"
    other = make(error)
    assert other is not error
    assert type(other) is cls
    assert other.args == error.args
    assert str(other) == str(error)
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


# Callers add to their texts.
_OPEN_ENDED = {errors.InvalidInputs, errors.KeyConflict}


@each_error
def test_text(cls):
    """The text says which execution, what happened and what to do, without an errno."""
    error = build(cls)
    error.last_snapshot = None
    text = str(error)
    assert text.replace(":", "", 1).startswith("execution 787 it went wrong")
    assert text.endswith(cls.advice.format(id=787) or ("wrong" if cls in _OPEN_ENDED else "."))
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


# Their messages say what to do, or those of their subclasses.
_WITHOUT_ADVICE = {
    *("PromptLayerExecError", "ConfigurationError", "RequestError", "InvalidInputs", "KeyConflict")
}


@each_error
def test_advice(cls):
    """Each class says what to do if the user can do something."""
    advice = vars(cls).get("advice", "")
    assert bool(advice) is (cls.__name__ not in _WITHOUT_ADVICE)
    assert not advice or advice.endswith(".")


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


@each_error
@pytest.mark.parametrize("execution_id", [787, None])
def test_the_advice_can_be_split_off(cls, execution_id):
    """A stored text is divided into the problem and the advice, by the name of its class."""
    error = cls("it", **FIELDS[cls.__name__], execution_id=execution_id)
    problem, advice = errors.split_advice(cls.__name__, str(error))
    assert f"{problem} {advice}".rstrip() == str(error)
    assert bool(advice) == bool(error._next_step())
    assert errors.split_advice("KeyError", "it. Try again.") == ("it. Try again.", "")


def test_a_start_that_can_be_recovered_says_so_without_its_token():
    """The token is only in the attribute: whoever has it can forge the start's callback."""
    error = build(errors.StartUnknown)
    assert "it went wrong. Session.recover(error) waits for its callback. Look" in str(error)
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
