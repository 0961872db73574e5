"""Building requests and reading responses: the rules of the protocol."""

import json
import logging
import time

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from promptlayer_exec._api.messages import Request, Response, read_retry_after
from promptlayer_exec._api.runs import (
    NewRun,
    NodeMapReader,
    read_main_output,
    read_new_run,
    results_request,
    run_request,
)
from promptlayer_exec._api.status import check_status
from promptlayer_exec._values.arguments import check_execution_id
from promptlayer_exec._values.errors import InvalidResponse, StatusError
from promptlayer_exec._values.models import FrozenMap, MainOutput, Node, StartRequest
from promptlayer_exec._values.text import message_text

RECORDED = (
    b'{"Node 1":{"status":"SUCCESS","value":"AAA","error_message":null,'
    b'"raw_error_message":null,"is_output_node":true}}\n'
)


def read(body, status=200):
    """Read a node map of execution 787 with a new reader."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return NodeMapReader().read(Response(status, data), 787)


def refusal(body, status=200, reader=read):
    """Return the InvalidResponse that reading a body raises."""
    with pytest.raises(InvalidResponse) as caught:
        reader(body, status)
    return caught.value


def main_output(body, status=200):
    """Read a main output of execution 787."""
    return read_main_output(Response(status, body), 787)


@pytest.mark.parametrize(("flag", "word"), [(True, "true"), (False, "false")])
def test_results_request(flag, word):
    """The results are one GET; booleans are sent as true and false."""
    assert results_request(787, return_all_outputs=flag) == Request(
        "GET",
        "/workflow-version-execution-results"
        f"?workflow_version_execution_id=787&return_all_outputs={word}",
        787,
    )


class Index:
    """An integer like those of numpy: not an int, but with `__index__`."""

    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return "Index()"

    def __index__(self):
        return self.value


class Id(int):
    """A subclass of int."""


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1), (787, 787), (2**63 - 1, 2**63 - 1), (Index(787), 787), (Id(787), 787), ("787", 787)],
    ids=repr,
)
def test_execution_id(value, number):
    """Any integer between 1 and 2**63-1 is an id, and a string of its digits, as in our JSON."""
    checked = check_execution_id(value)
    assert type(checked) is int
    assert checked == number


def test_recorded_node_map():
    """A recorded response is read as its node."""
    result = read(RECORDED)
    assert result.complete is True
    assert result.nodes == {"Node 1": Node("Node 1", "SUCCESS", "AAA", None, None, True)}
    assert result.raw == json.loads(RECORDED)
    assert type(result.nodes) is FrozenMap


@pytest.mark.parametrize("status", [200, 202])
@pytest.mark.parametrize("word", ["SUCCESS", "RUNNING"])
def test_completeness_is_the_status_code(status, word):
    """200 means complete and 202 incomplete, whatever the statuses of the nodes are."""
    assert read({"a": {"status": word}}, status).complete is (status == 200)


def test_missing_keys_are_null():
    """A node needs a status; every other key may be missing or null."""
    nulls = dict.fromkeys(["value", "error_message", "raw_error_message", "is_output_node"])
    for rest in ({}, nulls):
        assert read({"a": {"status": "QUEUED", **rest}}).nodes["a"] == Node("a", "QUEUED")


NAMES = ["", " ", "a.b", "a/b?c#d", "$", "é", "\ud800", "Node 1", "name", "status", "x" * 1000]


def test_names():
    """A node's name is any string; nodes keep the server's order."""
    result = read({name: {"status": "QUEUED"} for name in reversed(NAMES)})
    assert list(result.nodes) == [node.name for node in result.nodes.values()] == NAMES[::-1]


INVALID_NODES = [
    ({}, ".status", "is missing"),
    ({"status": None}, ".status", "is missing"),
    ({"status": 1}, ".status", "expected a string, got an integer"),
    ({"status": True}, ".status", "expected a string, got true"),
    ({"status": {}}, ".status", "expected a string, got an object"),
    ({"status": []}, ".status", "expected a string, got an array"),
    (None, "", "expected an object, got null"),
    ("SUCCESS", "", "expected an object, got a string"),
    ([], "", "expected an object, got an array"),
    (False, "", "expected an object, got false"),
    (7, "", "expected an object, got an integer"),
]


@pytest.mark.parametrize("status", [200, 202])
@pytest.mark.parametrize(("node", "field", "reason"), INVALID_NODES, ids=repr)
def test_invalid_node(node, field, reason, status):
    """The error has the path to an invalid node, the reason, and the start of the body."""
    if node and isinstance(node, dict):
        node = {"status": "QUEUED", **node}
    error = refusal({"Node 0": {"status": "SUCCESS"}, "Node 1": node}, status)
    assert error.path == f'$["Node 1"]{field}'
    assert error.reason == reason
    assert error.status == status
    assert error.excerpt.startswith('{"Node 0"')
    assert f"{error.path}: {reason}" in str(error)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        *[(b"null", "null"), (b"true", "true"), (b"0", "an integer"), (b"NaN", "a number")],
        *[(b'"AAA"\n', "a string"), (b"[]", "an array")],
    ],
)
def test_top_level_is_not_an_object(body, kind):
    """A body that is not an object is not a node map; the error has a path, so it is permanent."""
    error = refusal(body)
    assert (error.path, error.reason) == ("$", f"expected an object of nodes, got {kind}")


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        *[("no", "no"), ("", ""), ({"raw": "no"}, "no"), ({"raw": {"a": "é"}}, '{"a": "é"}')],
        *[({"code": 5}, '{"code": 5}'), (["a"], '["a"]'), (1.5, "1.5"), (True, "true")],
        *[({}, None), ([], None), (False, None), (0, None), ({"raw": None}, None)],
    ],
)
def test_a_message_of_any_kind_is_text(sent, text):
    """Only the status decides about a run: no message makes it unreadable."""
    result = read({"a": {"status": "FAILED", "error_message": sent}})
    assert result.nodes["a"].error_message == text
    assert result.raw["a"]["error_message"] == sent


def test_a_message_that_is_too_deep_for_json_is_still_text():
    """Its repr takes the place of its JSON."""
    value = "end"
    for _ in range(100_000):
        value = [value]
    assert message_text(value) == "[[[[...]]]]"


@pytest.mark.parametrize("mark", [0, 1, "false", "true", [], {}, 1.5])
def test_an_output_mark_of_another_kind_is_none_and_logged_once(mark, caplog):
    """Then the server decides about the main output, whatever the mark means."""
    nodes = {"a": {"status": "SUCCESS", "is_output_node": mark}, "b": {"status": "SUCCESS"}}
    assert read({**nodes, "c": nodes["a"]}).nodes["a"].is_output_node is None
    (record,) = caplog.records
    assert "'a' has the unknown is_output_node" in record.getMessage()


NODES = {"A": {"status": "SUCCESS", "value": "x" * 100_000}, "B": {"status": "FAILURE"}}
ENDED = {"success": False, "message": "No output node found for this workflow", "output": NODES}


@pytest.mark.parametrize("status", [400, 500])
def test_a_complete_run_behind_an_error_status(status):
    """With all nodes in its body, all of them final, a 400 or 500 is the documented 200."""
    result = read(ENDED, status)
    assert (result.complete, result.raw, result.source[0]) == (True, NODES, 200)
    assert main_output(json.dumps(ENDED).encode(), status) == MainOutput(787, True, NODES)


@pytest.mark.parametrize(
    ("status", "output"),
    [
        *[(code, NODES) for code in (401, 403, 404, 422, 429, 502, 503, 504)],
        *[(400, nodes) for nodes in ({}, [], None, "x", {"A": 1}, {"A": {}}, {"A": {"status": 1}})],
        *[(500, {**NODES, "C": {"status": word}}) for word in ("RUNNING", "QUEUED", "PAUSED")],
    ],
)
def test_any_other_error_status_is_an_error(status, output):
    """Another status, no nodes, or a node that is not final: the run may not be over."""
    with pytest.raises(StatusError) as caught:
        read({**ENDED, "output": output}, status)
    assert caught.value.status == status
    assert len(str(caught.value.body)) <= 64 * 1024


@pytest.mark.parametrize("depth", [1_010, 5_000, 100_000])
def test_a_body_that_is_too_deep_is_an_error(depth):
    """Python must be able to write its nodes as JSON again. Newer ones can write deeper values."""
    deep = b"[" * depth + b"]" * depth
    body = b'{"output": {"A": {"status": "SUCCESS", "value": %b}}}' % deep
    try:
        json.dumps(json.loads(body))
    except RecursionError:
        with pytest.raises(StatusError):
            read(body, 400)
    else:
        assert read(body, 400).complete


def test_unknown_status_is_logged_once_per_reader(caplog):
    """An unknown status is kept, and each reader logs it once."""
    response = Response(200, b'{"a": {"status": "PAUSED"}, "b": {"status": "PAUSED"}}')
    reader = NodeMapReader()
    with caplog.at_level(logging.INFO, "promptlayer_exec"):
        for _ in range(3):
            nodes = reader.read(response, 787).nodes
        assert [node.status for node in nodes.values()] == ["PAUSED", "PAUSED"]
        (record,) = caplog.records
        assert (record.name, record.levelname) == ("promptlayer_exec", "WARNING")
        for part in ("787", "'a'", "'PAUSED'"):
            assert part in record.getMessage()
        NodeMapReader().read(response, 788)
        assert len(caplog.records) == 2


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**63, 2**200)
    | st.floats()
    | st.text(st.characters(), max_size=4),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(JSON, st.booleans(), st.booleans())
def test_fidelity(value, escaped, marked):
    """For any JSON in a node, `raw` and `value` are exactly what `json.loads` returns."""
    node = {"status": "SUCCESS", "value": value, "extra": value}
    text = json.dumps({"a": node}, ensure_ascii=escaped)
    body = (b"\xef\xbb\xbf" if marked else b"") + text.encode("utf-8", "surrogatepass")
    result = read(body)
    assert repr(result.raw) == repr(json.loads(text))
    assert repr(result.nodes["a"].value) == repr(json.loads(text)["a"]["value"])
    assert repr(main_output(body).value) == repr(json.loads(text))


UNUSUAL = r"""-18446744073709551617 NaN -Infinity 1e999 "\ud800" "\ude00\ud83d" {"k":1,"k":2} 1.0
    1E2 0.1000000000000000055511151231257827"""


@pytest.mark.parametrize(
    "text", ["9" * 4300, '"\x7f\u2028"', *UNUSUAL.split()], ids=lambda it: ascii(it[:20])
)
def test_unusual_json(text):
    """Big integers, NaN, lone surrogates and duplicate keys are read like by `json.loads`."""
    body = f'{{"a": {{"status": "SUCCESS", "value": {text}}}}}'.encode()
    assert repr(read(body).nodes["a"].value) == repr(json.loads(text))


def test_duplicate_keys():
    """The last of several equal keys is used, for nodes and inside a node."""
    body = b'{"a": {"status": "QUEUED"}, "a": {"status": "RUNNING", "status": "SUCCESS"}}'
    assert read(body).nodes == {"a": Node("a", "SUCCESS")}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings(encoding):
    """A byte order mark, UTF-16 and UTF-32 are read like by `json.loads`."""
    assert read(RECORDED.decode().encode(encoding)).nodes["Node 1"].value == "AAA"


SOME_VALUE = b'{"a": {"status": "SUCCESS", "value": %b}}'
UNREADABLE = {
    "digits": SOME_VALUE % (b"9" * 4301),
    "deep-array": SOME_VALUE % (b"[" * 300_000 + b"]" * 300_000),
    "deep-object": b'{"a":' * 300_000 + b"1" + b"}" * 300_000,
}


@pytest.mark.parametrize("reader", [read, main_output])
@pytest.mark.parametrize("body", UNREADABLE.values(), ids=UNREADABLE)
def test_json_that_cannot_be_read(body, reader):
    """Too many digits, or too deep nesting, is an InvalidResponse with a path, so permanent."""
    error = refusal(body, reader=reader)
    assert error.path == "$"
    assert error.excerpt == body[:200].decode()
    assert isinstance(error.__cause__, ValueError | RecursionError)


NOT_JSON = {
    "empty": b"",
    "blank": b" \n",
    "html": b"<html><body>Bad gateway</body></html>",
    "truncated": RECORDED[:40],
    "trailing": b'{"a": {"status": "QUEUED"}} x',
    "two": RECORDED * 2,
    "single-quotes": b"{'a': {'status': 'QUEUED'}}",
    "control": b'{"a": {"status": "QUEUED", "value": "\x01"}}',
    "cut-utf-16": RECORDED.decode().encode("utf-16")[:41],
    "corrupt-utf-8": RECORDED.replace(b"AAA", b"\xff\xfe\x80"),
    "latin-1": RECORDED.replace(b"AAA", "é".encode("latin-1")),
    "binary": b"\x1f\x8b\x08\x00\x00",
}


@pytest.mark.parametrize("reader", [read, main_output])
@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_not_json(body, reader):
    """The error for a body that is not JSON, or cut short, has no path, so it is transient."""
    error = refusal(body, reader=reader)
    assert (error.path, error.status) == (None, 200)
    assert error.reason
    assert error.excerpt == body[:200].decode("utf-8", "replace")
    assert isinstance(error.__cause__, ValueError)


@pytest.mark.parametrize(
    ("body", "excerpt"), [(b"x" * 10_000, "x" * 200), ("é".encode() * 1000 + b"\xff", "é" * 100)]
)
def test_excerpt_is_short(body, excerpt):
    """The excerpt of a long body is its start, as text."""
    assert refusal(body).excerpt == excerpt


OUTPUTS = [
    *[b'"AAA"\n', b"false", b"true", b"null", b"0", b"{}", b"[]", b'""', b"1.0"],
    *[b'"{\\"a\\": 1}"', b'{"success": false, "message": "x"}', RECORDED],
]


@pytest.mark.parametrize("body", OUTPUTS)
def test_main_output(body):
    """The main output of a 200 is the decoded body, whatever its shape."""
    output = main_output(body)
    assert output == MainOutput(787, True, json.loads(body))
    assert type(output.value) is type(json.loads(body))


@pytest.mark.parametrize("body", [*OUTPUTS, *NOT_JSON.values(), *UNREADABLE.values()], ids=len)
def test_main_output_of_an_incomplete_execution(body):
    """A 202 with any body means that there is no output yet."""
    output = main_output(body, 202)
    assert output.complete is False
    assert output.execution_id == 787


@pytest.mark.parametrize("reader", [read, main_output])
@pytest.mark.parametrize("status", [302, 404, 422, 429, 503])
def test_both_readers_check_the_status(reader, status):
    """No reader takes the body of an error status for a result."""
    with pytest.raises(StatusError):
        reader(RECORDED, status)


@pytest.mark.parametrize("status", [201, 203, 204, 205, 206, 299])
def test_other_success(status):
    """Any other 2xx is an InvalidResponse with a path, so permanent."""
    with pytest.raises(InvalidResponse, match=f"returned {status}") as caught:
        check_status(Response(status, RECORDED))
    assert (caught.value.status, caught.value.path) == (status, "$")
    assert caught.value.excerpt.startswith('{"Node 1"')


NOW = 1445412480.0  # Wed, 21 Oct 2015 07:28:00 GMT


def retry_after(value, **others):
    """Read a Retry-After at NOW."""
    headers = CIMultiDict({} if value is None else {"retry-AFTER": value})
    headers.update({name.replace("_", "-"): text for name, text in others.items()})
    return read_retry_after(headers, now=NOW)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[("0", 0.0), ("120", 120.0), ("1.5", 1.5), (".5", 0.5), ("2.", 2.0), ("007", 7.0)],
        *[(" 7\t", 7.0), ("\x1c7\x1f", 7.0)],
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2015 07:28:30 -0000", 30.0),
        ("Wed, 21 Oct 2015 09:28:30 +0200", 30.0),
        ("Wednesday, 21-Oct-15 07:28:30 GMT", 30.0),
        ("Wed Oct 21 07:28:30 2015", 30.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after(value, expected):
    """Seconds, fractions and HTTP dates are read; a date in the past means 0."""
    assert retry_after(value) == expected


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="Windows has no tzset")
def test_a_retry_after_date_without_a_zone_is_utc(monkeypatch):
    """The zone of the machine does not matter."""
    monkeypatch.setenv("TZ", "EST5")
    time.tzset()
    try:
        assert retry_after("Wed Oct 21 07:28:30 2015") == 30.0
    finally:
        monkeypatch.undo()
        time.tzset()


NO_NUMBERS = "-1 +1 -0 nan inf Infinity 1e3 0x10 1_000 1,5 soon . \u0661\u0662 \uff11 \u00b2"
NO_DATES = [
    "Wed, 99 Oct 2015 07:28:30 GMT",
    "Wed, 21 Oct 2015 25:28:30 GMT",
    "Wed, 21 Oct 999999999999 07:28:30 GMT",
    "Wed, 21 Oct 2015 07:28:30 +9999999999",
    "Wed, 21 Oct",
    "GMT",
]


@pytest.mark.parametrize(
    "value", ["", " ", "1 2", "1 s", "1\n2", *NO_NUMBERS.split(), *NO_DATES], ids=ascii
)
def test_invalid_retry_after(value):
    """An invalid value is ignored, like a missing one."""
    assert retry_after(value) is retry_after(None) is None


@pytest.mark.parametrize(
    ("milliseconds", "value", "expected"),
    [
        *[("1500", None, 1.5), ("1500", "120", 1.5), ("0", "120", 0.0), ("0.5", None, 0.0005)],
        *[("", "120", 120.0), ("-5", "120", 120.0), ("nan", "120", 120.0), ("soon", None, None)],
        ("Wed, 21 Oct 2015 07:28:30 GMT", None, None),
    ],
)
def test_retry_after_ms(milliseconds, value, expected):
    """Milliseconds take precedence over Retry-After, unless they are invalid."""
    assert retry_after(value, Retry_After_MS=milliseconds) == expected


@pytest.mark.parametrize(
    ("workflow", "segment"),
    [
        *[("a/b?c#d é", "a%2Fb%3Fc%23d%20%C3%A9"), ("plain-name_1.2~x", "plain-name_1.2~x")],
        *[("100%", "100%25"), ("%2F", "%252F"), ("a+b&c=d;e", "a%2Bb%26c%3Dd%3Be")],
        *[("\r\nX-Evil: 1", "%0D%0AX-Evil%3A%201"), ("日本", "%E6%97%A5%E6%9C%AC")],
        *[("..", "%2E%2E"), (".", "%2E"), (" ", "%20")],
        *[("787", "787"), (3, "3"), (Index(3), "3"), (2**63 - 1, str(2**63 - 1))],
    ],
)
def test_run_request_encodes_the_workflow(workflow, segment):
    """Any name is one segment of the path."""
    request = run_request(StartRequest(workflow), {})
    assert request == Request("POST", f"/workflows/{segment}/run", None, b'{"input_variables": {}}')


@pytest.mark.parametrize(
    ("error", "workflow"),
    [
        *[(ValueError, workflow) for workflow in ("", 0, 2**63)],
        *[(TypeError, workflow) for workflow in (True, None, 1.0, b"name")],
    ],
    ids=repr,
)
def test_run_request_without_a_workflow(error, workflow):
    """A value that is neither a name nor an id is refused."""
    with pytest.raises(error, match="workflow"):
        run_request(StartRequest(workflow), {})


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({}, {}),
        ({"label": "prod"}, {"workflow_label_name": "prod"}),
        ({"version": 2}, {"workflow_version_number": 2}),
        ({"version": Index(2)}, {"workflow_version_number": 2}),
        ({"metadata": {}}, {"metadata": {}}),
        ({"metadata": {"a": "\ud800"}}, {"metadata": {"a": "\ud800"}}),
        (
            {"callback_url": "https://x.test"},
            {"callback_url": "https://x.test", "return_all_outputs": True},
        ),
        ({"key": "mine"}, {}),
    ],
)
def test_run_request_has_the_given_fields(given, sent):
    """It has no other fields; `key` is never sent."""
    request = run_request(StartRequest("w", **given), {"a": [1]})
    assert json.loads(request.body) == {"input_variables": {"a": [1]}, **sent}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"label": "a", "version": 1}, ValueError, "pass either label or version, not both"),
        ({"label": 1}, TypeError, "label must be a str or None, got 1"),
        ({"version": "1"}, TypeError, "version must be an int, got '1'"),
        ({"version": True}, TypeError, "version must be an int, got True"),
        ({"version": 0}, ValueError, r"version must be between 1 and 2\*\*63-1, got 0"),
        ({"callback_url": 1}, TypeError, "callback_url must be a str or None, got 1"),
        ({"metadata": ["a"]}, TypeError, r"metadata must map str to str, got \['a'\]"),
        ({"metadata": {1: "a"}}, TypeError, "metadata must map str to str, got the key 1"),
        ({"metadata": {"a": None}}, TypeError, r"metadata\['a'\] must be a str, got None"),
    ],
)
def test_run_request_checks_the_fields(given, error, message):
    """The error names the field and shows its value."""
    with pytest.raises(error, match=message):
        run_request(StartRequest("w", **given), {})


@pytest.mark.parametrize("status", [200, 201, 202])
@pytest.mark.parametrize(
    ("warning", "text"),
    [(None, None), ("", None), ("missing: a", "missing: a"), (["a", "b"], '["a", "b"]')],
)
def test_read_new_run(status, warning, text):
    """Any 2xx with a usable id is a started run; a warning that is no string is shown as JSON."""
    body = json.dumps({"workflow_version_execution_id": 787, "warning": warning}).encode()
    assert read_new_run(Response(status, body)) == NewRun(787, text)


@pytest.mark.parametrize("value", [None, 0, -1, 2**63, True, "787", 787.0, [787], {}], ids=repr)
def test_read_started_without_a_usable_id(value):
    """The error has the path to the id, and the start of the body."""
    body = json.dumps({"workflow_version_execution_id": value}).encode()
    with pytest.raises(InvalidResponse) as caught:
        read_new_run(Response(201, body))
    assert caught.value.path == "$.workflow_version_execution_id"
    assert caught.value.excerpt == body.decode()


@pytest.mark.parametrize(
    ("body", "path"), [(b"", None), (b"<html>", None), (b"\xff", None), (b"[]", "$"), (b"{}", "$")]
)
def test_read_started_of_another_shape(body, path):
    """The error for a body that is not JSON has no path."""
    with pytest.raises(InvalidResponse) as caught:
        read_new_run(Response(201, body))
    assert (caught.value.path is None) == (path is None)


def test_an_unchanged_body_gives_the_same_node_map():
    """It is the same object; another body, or another status, is read again."""
    reader = NodeMapReader()
    body = json.dumps({"a": {"status": "RUNNING"}}).encode()
    first = reader.read(Response(202, body), 787)
    assert reader.read(Response(202, bytes(bytearray(body))), 787, first) is first
    complete = reader.read(Response(200, body), 787, first)
    assert complete is not first
    assert complete.complete
    assert reader.read(Response(202, body + b" "), 787, first) is not first


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "status": JSON | st.sampled_from(["SUCCESS", "FAILURE", "NEW"]),
            "value": JSON,
            "error_message": JSON | st.text(),
            "raw_error_message": JSON,
            "is_output_node": JSON | st.booleans(),
            "name": JSON,
            "more": JSON,
        },
    )
    | JSON
)
def test_a_node_is_what_its_body_says(body):
    """It is the `Node` of its fields, or the response is invalid, whatever JSON there is."""
    try:
        node = read({"a": body}).nodes["a"]
    except InvalidResponse:
        return
    sent = {field.name: body.get(field.name) for field in attrs.fields(Node)[1:]}
    sent["error_message"] = message_text(sent["error_message"])
    if not isinstance(sent["is_output_node"], bool):
        sent["is_output_node"] = None
    expected = Node("a", **sent)
    # By their reprs, 1 differs from 1.0, and NaN does not differ from itself.
    assert type(node) is Node
    assert repr(attrs.astuple(node, recurse=False)) == repr(attrs.astuple(expected, recurse=False))
    assert isinstance(body["status"], str)
    assert isinstance(node.error_message, str | None)
    assert isinstance(node.is_output_node, bool | None)
