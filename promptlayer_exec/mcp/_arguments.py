"""The arguments of a tool call, checked, with errors that a model can act on."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from promptlayer_exec import StartRequest
from promptlayer_exec._integration import MAX_ID
from promptlayer_exec._integration import near as near_names
from promptlayer_exec.mcp._tools import WAIT
from promptlayer_exec.mcp._values import clip


class Refused(Exception):
    """A call cannot be carried out; the text says why and what to do."""


def check_names(arguments: Mapping[str, Any], *known: str) -> None:
    """Refuse arguments that a tool does not have."""
    for name in arguments:
        if name not in known:
            hint = " Input variables go into `inputs`." if "inputs" in known else ""
            raise Refused(
                f"unexpected argument {shown(name)}: the arguments are {', '.join(known)}.{hint}"
            )


def text(arguments: Mapping[str, Any], name: str) -> str | None:
    """Return an argument that is a text; None if it is absent or null."""
    value = arguments.get(name)
    if value is not None and not isinstance(value, str):
        raise Refused(f"{name} must be a string, got {shown(value)}")
    return value


def whole(arguments: Mapping[str, Any], name: str, least: int) -> int | None:
    """Return an argument that is a whole number; None if it is absent or null."""
    value = arguments.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():  # some models write 1.0
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_ID:
        raise Refused(f"{name} must be a whole number from {least}, got {shown(value)}")
    return value


def execution_id(arguments: Mapping[str, Any]) -> int:
    """Return the id of the execution that a call is about."""
    value = arguments.get("execution_id")
    parsed = parse_id(value)
    if parsed is None:
        got = "nothing" if value is None else shown(value)
        raise Refused(
            "execution_id must be the id that start_workflow returned, such as '787'; got "
            f"{got}. Do not guess ids."
        )
    return parsed


def parse_id(value: Any) -> int | None:
    """Return the id that a string or a number stands for; None if it stands for none."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_ID:
        return None
    return value


def timeout(arguments: Mapping[str, Any]) -> float:
    """Return how many seconds to wait."""
    value = arguments.get("timeout")
    if value is None:
        return WAIT
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= sys.float_info.max:
        raise Refused(f"timeout must be a number of seconds from 0, got {shown(value)}")
    return float(value)


def workflow(arguments: Mapping[str, Any], allowed: tuple[str, ...]) -> str:
    """Return the workflow that a call is about; refuse one that is not allowed."""
    value = arguments.get("workflow")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        got = "nothing" if value is None else shown(value)
        raise Refused(f"workflow must be the name or the id of a workflow, got {got}")
    if allowed and value not in allowed:
        raise Refused(
            f"workflow {shown(value)} is not one of those that this server was started with: "
            f"{', '.join(map(shown, allowed))}"
        )
    return value


def start_request(arguments: Mapping[str, Any], name: str) -> StartRequest:
    """Return the start that a call asks for."""
    inputs = arguments.get("inputs")
    if inputs is None:
        inputs = {}
    if not isinstance(inputs, dict):
        raise Refused(f"inputs must be an object with the inputs by name, got {shown(inputs)}")
    label, version = text(arguments, "label"), whole(arguments, "version", 1)
    if label is not None and version is not None:
        raise Refused("label and version exclude each other: give one of them, or neither")
    return StartRequest(name, inputs, label=label, version=version)


def shown(value: Any) -> str:
    """Return the repr of a value, shortened."""
    return clip(repr(value), 80)


def near(name: str, known: Iterable[str]) -> str:
    """Return a question that names those that were perhaps meant; empty if none is near."""
    likely = near_names(name, known, 3)
    return f" Did you mean {' or '.join(map(shown, likely))}?" if likely else ""
