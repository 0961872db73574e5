"""The check of inputs before anything is started, or added to a batch."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Mapping
from typing import TypeAlias

from promptlayer_exec import NotFound, RequestError, Session, StartRequest
from promptlayer_exec._integration import DEFINITION_TIMEOUT, check_inputs, encode_inputs
from promptlayer_exec.cli._exit import PROGRAM, Misuse
from promptlayer_exec.cli._stdio import err
from promptlayer_exec.cli._text import in_options, printable, shorten

# A workflow with its label and version; the names of the inputs that the lines of a file give it.
Target: TypeAlias = tuple[str | int, str | None, int | None]
Given: TypeAlias = Mapping[tuple[str, ...], list[int]]


async def check_start(session: Session, request: StartRequest) -> None:
    """Check the inputs, as far as the server says in a few seconds what they must be."""
    try:
        encode_inputs(session, request)
    except (TypeError, ValueError) as error:
        raise Misuse(str(error)) from error
    try:
        await check_inputs(session, request)
    except ValueError as error:
        raise Misuse(_needs(error, request.workflow)) from error


async def find_problems(session: Session, starts: Mapping[Target, Given]) -> dict[int, str]:
    """Return what is wrong with the workflow or the inputs of lines, by their numbers.

    The definition of each workflow is read once. After one that cannot be read, which is reported,
    no other is asked for, and the rest is unchecked: a server that is down would cost a few seconds
    for each.
    """
    problems: dict[int, str] = {}
    for (workflow, label, version), given in starts.items():
        try:
            async with asyncio.timeout(DEFINITION_TIMEOUT):
                found = await session.workflow(workflow, label=label, version=version)
        except NotFound:
            what = _no_workflow(workflow, label, version)
            problems |= {number: what for numbers in given.values() for number in numbers}
            continue
        except (RequestError, TimeoutError) as error:
            late = f"{_named(workflow)}: no answer within {DEFINITION_TIMEOUT:g} s"
            err(f"inputs are not checked: {in_options(str(error)) or late}")
            break
        for names, numbers in given.items():
            try:
                found.check_inputs(dict.fromkeys(names))
            except ValueError as error:
                problems |= dict.fromkeys(numbers, _needs(error, workflow))
    return problems


def _needs(error: ValueError, workflow: str | int) -> str:
    return f"{error}; `{PROGRAM} workflow {shlex.quote(str(workflow))}` shows what it needs"


def _no_workflow(workflow: str | int, label: str | None, version: int | None) -> str:
    which = "" if label is None else f" with the label '{shorten(printable(label), 40)}'"
    which += "" if version is None else f" with a version {version}"
    return f"there is no {_named(workflow)}{which}; `{PROGRAM} workflows` lists names and labels"


def _named(workflow: str | int) -> str:
    return f"workflow '{shorten(printable(str(workflow)), 100)}'"
