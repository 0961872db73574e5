"""The check of a tool call's arguments, with errors that a model can act on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from jsonschema.exceptions import best_match  # type: ignore[import-untyped]

from promptlayer_exec import StartRequest, Workflow
from promptlayer_exec._integration import check_execution_id
from promptlayer_exec._integration import near as near_names
from promptlayer_exec.mcp._tool_values import clip


class CallFailed(Exception):
    """A call failed. The message is for the model, with the reason and what to do."""


def check(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are not null, if the schema of the tool allows them."""
    given = {name: _usual(name, value) for name, value in arguments.items() if value is not None}
    error = best_match(Draft202012Validator(schema).iter_errors(given))
    if error is None:
        return given

    where = "".join(f"{name}: " for name in error.path)
    what = error.message.replace(repr(error.instance), shown(error.instance), 1)
    known = ", ".join(schema["properties"])
    raise CallFailed(f"{where}{clip(what, 300)}. The arguments are {known}.")


def _usual(name: str, value: Any) -> Any:
    """Return a value in its usual form: some models write 787 for an id, or 1.0 for 1."""
    if name in ("execution_id", "workflow") and type(value) is int:
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def start_request(
    workflows: Mapping[str, Workflow[Any, Any]],
    workflow: str,
    *,
    idempotency_key: str | None = None,
    **options: Any,
) -> StartRequest:
    """Return the request for a workflow, which is one of `workflows` if the server has any."""
    if "label" in options and "version" in options:
        raise CallFailed("give either label or version, not both")

    known = workflows.get(workflow, Workflow(workflow))
    for option, own in (("label", known.label), ("version", known.version)):
        others = {"label", "version"} & options.keys()
        if own is not None and others and options.get(option) != own:
            raise CallFailed(
                f"this server uses workflow {shown(workflow)} with the {option} {shown(own)} alone:"
                " leave out label and version"
            )
    return StartRequest(known, key=idempotency_key, **options)


def execution_id(arguments: Mapping[str, Any]) -> int:
    value = arguments["execution_id"]
    parsed = parse_id(value)
    if parsed is None:
        raise CallFailed(
            "execution_id must be the id that start_workflow returned, such as '787', got "
            f"{shown(value)}. Do not guess ids."
        )
    return parsed


def parse_id(value: str) -> int | None:
    """Return the id in a string, or None if there is none."""
    try:
        return check_execution_id(value)
    except (TypeError, ValueError):
        return None


def shown(value: Any) -> str:
    return clip(repr(value), 80)


def near(name: str, known: Iterable[str]) -> str:
    """Return the rest of a sentence, with similar names."""
    likely = near_names(name, known, 3)
    if not likely:
        return "."
    return f". Did you mean {' or '.join(map(shown, likely))}?"
