"""What people and agents can do about each error: by its class and data, never from its text."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import attrs
import pytest

import promptlayer_exec
from promptlayer_exec import (
    ConfigurationError,
    ConnectionFailed,
    KeyConflict,
    NotFound,
    PromptLayerExecError,
    StartUnknown,
    Unauthorized,
)
from promptlayer_exec import _advice as advice
from promptlayer_exec._ways_out import (
    WayOut,
    out_of_item,
    out_of_items,
    out_of_key,
    out_of_mistaken_run,
    unknown_keys,
)
from promptlayer_exec.cli import app
from promptlayer_exec.dbos._records import stored_error
from promptlayer_exec.dbos._reports import ItemState
from promptlayer_exec.fastapi._responses import describe
from promptlayer_exec.mcp._tool_errors import error_text
from tests.api.test_errors import build, each_error

PACKAGE = Path(promptlayer_exec.__file__).parent
EXPLAINERS = {"terminal": advice.explain, "page": advice.explain_briefly, "agent": error_text}


@each_error
@pytest.mark.parametrize("explain", EXPLAINERS.values(), ids=EXPLAINERS)
def test_nobody_else_gets_the_advice_for_programs(cls: Any, explain: Any) -> None:
    """It names arguments and methods of Python. A text for people has what happened, and theirs."""
    error = build(cls, "it went wrong")
    error._advice = "Pass secret_argument=True."
    text = explain(error)
    assert "it went wrong" in text.lower()
    assert "secret_argument" not in text
    assert not re.search(r"\w=(?!\S*\.sqlite)|error\.\w|session\.\w|\bawait\b", text), text
    assert text.endswith(".")


@each_error
def test_a_stored_error_is_explained_as_it_was_when_it_was_raised(cls: Any) -> None:
    """What a batch stores is enough: the name of the class, the problem and the data."""
    error = build(cls)
    if not hasattr(promptlayer_exec, cls.__name__):
        pytest.skip("a batch stores no error of webhooks")
    assert advice.explain_stored(*attrs.astuple(stored_error(error))) == advice.explain(error)


def test_a_stored_error_of_another_library_keeps_its_text() -> None:
    """Such as an output with too many levels, which nobody can store."""
    stored = stored_error(RecursionError("too deep"))
    assert advice.explain_stored(*attrs.astuple(stored)) == "too deep"


STATUS = {"status": 404, "server_message": "-"}


@pytest.mark.parametrize(
    ("error", "terminal", "agent"),
    [
        (NotFound("-", **STATUS, execution_id=7), "Check the id,", "Do not guess ids."),
        (NotFound("-", **STATUS), "`promptlayer-exec workflows`", "list_workflows"),
        (Unauthorized("-", **STATUS), "PROMPTLAYER_API_KEY", "Tell the user"),
        (KeyConflict("-", key="k"), "another --key", "idempotency_key"),
        (KeyConflict("-", key="k", batch="b"), "another --name", "idempotency_key"),
        (ConfigurationError("-", setting="rate"), "--rate", "Tell the user"),
        (ConfigurationError("-", setting="same_server"), "--same-server", "Tell the user"),
        (ConnectionFailed("-", tls="expired"), "clock", "in a minute"),
        (ConnectionFailed("-"), "--base-url", "in a minute"),
        (StartUnknown("-", workflow="w", reason="-"), "pay twice", "ask them"),
    ],
)
def test_advice_follows_from_class_and_data(
    error: PromptLayerExecError, terminal: str, agent: str
) -> None:
    """The same class can need different advice; its attributes decide."""
    assert terminal in advice.explain(error)
    assert agent in error_text(error)


def test_a_key_whose_run_is_unknown_has_a_way_out() -> None:
    """If a store keeps the key, the next call with it starts nothing."""
    error = StartUnknown("-", workflow="w", reason="-", key="k")
    error.is_key_stored = True
    assert "`promptlayer-exec starts adopt k ID` records its id" in str(error)
    assert "`promptlayer-exec starts forget k` or await store.forget(key)" in str(error)
    assert "`promptlayer-exec starts adopt k ID`" in advice.explain(error)
    assert "`promptlayer-exec starts forget k`" in advice.explain(error)
    assert "with this idempotency_key starts nothing" in error_text(error)


def test_advice_names_options_and_commands_that_exist() -> None:
    """Each option of the table is one of some command, and each command exists."""
    known, commands = set[str](), set[str]()
    for name, command in _commands():
        commands.add(name)
        known |= {option for parameter in command.params for option in parameter.opts}
    texts = [*map(str, advice._SETTINGS.values()), *advice.TLS_ADVICE.values()]
    texts.append(Path(advice.__file__).read_text())
    for text in texts:
        assert set(re.findall(r"--[a-z][a-z-]+", text)) <= known
        assert set(re.findall(r"`promptlayer-exec ([a-z]+)", text)) <= commands


_BATCH = " --name night --base-url http://127.0.0.1:1"
_STATES = (*get_args(ItemState), "undecided")


@pytest.mark.parametrize(
    "way",
    [
        *(way for state in _STATES for way in out_of_item(state, "k", _BATCH, "")),
        *(way for state in _STATES for way in out_of_items(state, _BATCH)),
        *(way for state in ("sending", "unknown") for way in out_of_key(state, "k")),
        *out_of_key("started", "k", execution_id=7, server="http://127.0.0.1:1"),
        WayOut("list them with", unknown_keys()),
        out_of_mistaken_run(_BATCH),
    ],
    ids=lambda way: way.command,
)
def test_each_way_out_is_a_command_with_these_options(way: WayOut) -> None:
    """The command line accepts it once somebody has put an id in the place of ID."""
    import typer.main

    program, *words = shlex.split(way.command.replace(" ID", " 7"))
    assert program == "promptlayer-exec"
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    with command.make_context(command.name, words) as context:
        assert context.params


def _commands() -> Iterator[tuple[str, Any]]:
    import typer.main

    groups = [typer.main.get_command(app)]
    for group in groups:
        for name, command in getattr(group, "commands", {}).items():
            groups.append(command)
            yield name, command


@each_error
def test_every_error_has_its_own_status(cls: Any) -> None:
    """No error of ours is the router's Internal Server Error."""
    if cls.__name__ in {"PromptLayerExecError", "RequestError"}:
        pytest.skip("only their subclasses are raised")
    assert describe(build(cls))[1] != "InternalServerError"


# Methods that take a text apart, or put another in its place.
_CUTTING = {"partition", "rpartition", "split", "removeprefix", "removesuffix", "replace", "sub"}
_CUTTING |= {"search", "match", "fullmatch", "findall", "startswith", "endswith"}
_READERS = ["_advice.py", "_doctor", "cli", "dbos", "fastapi", "mcp", "redis.py", "viewer"]


def _takes_error_apart(source: str) -> list[str]:
    """Return the calls that take the text of an error apart."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        if call.func.attr in _CUTTING:
            texts = [call.func.value, *call.args]
            if any(_is_text_of_error(part) for text in texts for part in ast.walk(text)):
                found.append(ast.unparse(call))
    return found


def _is_text_of_error(node: ast.AST) -> bool:
    """Return True for `str(error)`, `error.args`, `error.problem` and the like."""
    text = ast.unparse(node)
    return bool(
        re.fullmatch(r"str\((\w*error|failure|exception|exc)\)", text)
        or re.fullmatch(r"(\w*error|failure)\.(args\[0\]|problem|advice|strerror)", text)
        or re.fullmatch(r"(explain\w*|problem_of|what_happened|describe)\(.*\)", text)
    )


@pytest.mark.parametrize("reader", _READERS)
def test_no_text_is_made_by_taking_apart_the_text_of_an_error(reader: str) -> None:
    """What somebody needs of an error is an attribute."""
    path = PACKAGE / reader
    for file in [path] if path.is_file() else sorted(path.glob("*.py")):
        assert _takes_error_apart(file.read_text()) == [], file.name


@pytest.mark.parametrize(
    "code",
    [
        "str(error).replace('a', 'b')",
        "re.sub('a', '', str(error))",
        "str(error.args[0]).removeprefix('failed: ')",
        "explain(error).partition('. ')",
        "error.problem.split('. ')[0]",
    ],
)
def test_taking_apart_is_noticed(code: str) -> None:
    """Where a parser can see it."""
    assert _takes_error_apart(code)
