"""One paid run, compared with what this package expects of it, response by response."""

from __future__ import annotations

import asyncio
import warnings
from collections import Counter
from typing import Any

import attrs

from promptlayer_exec._api.json import loads
from promptlayer_exec._api.status import status_name
from promptlayer_exec._doctor.examination import Examination
from promptlayer_exec._doctor.exchanges import Exchange
from promptlayer_exec._doctor.listener import Message
from promptlayer_exec._doctor.network_checks import brief
from promptlayer_exec._doctor.observed_run import (
    CallbackReceiver,
    ObservationPolicy,
    ObservedRun,
    contradicts_itself,
    is_completion,
    node_map,
    nodes_in,
)
from promptlayer_exec._doctor.push_checks import listen_to_updates
from promptlayer_exec._doctor.report import Finding, counted, differs, failed, ok, skipped
from promptlayer_exec._doctor.workflow_checks import REPORT_IT
from promptlayer_exec._integration import share_channel
from promptlayer_exec._session.session import Session
from promptlayer_exec._values.errors import (
    ConfigurationError,
    ConnectionFailed,
    InvalidInputs,
    PromptLayerExecError,
    StartUnknown,
    StatusError,
)
from promptlayer_exec._values.events import Event, ExecutionStarted
from promptlayer_exec._values.models import Node, same_json
from promptlayer_exec._values.policies import RetryPolicy
from promptlayer_exec._values.statuses import FINAL, STATUSES
from promptlayer_exec._values.text import JSON_KINDS

_POLICY = ObservationPolicy()
_ID_FIELD = "workflow_version_execution_id"
# `node_map` requires the status, and the name is the key.
_NODE_FIELDS = [field.name for field in attrs.fields(Node) if field.name not in ("name", "status")]


async def check_start(examination: Examination) -> Finding:
    """Start the run with a session, as users do, and judge the response."""
    scope = examination.scope
    if scope.callback_port is not None:
        receiver = examination.receiver = CallbackReceiver()
        examination.resources.push_async_callback(receiver.aclose)
        try:
            await receiver.listen(scope.callback_port)
        except OSError as error:
            return failed(
                f"cannot listen on port {scope.callback_port}: {error.strerror}, so no"
                " run was started",
                "Choose another --callback-port.",
            )

    try:
        execution_id = await _start(examination)
    except (PromptLayerExecError, TypeError, ValueError) as error:
        return _judge_failed_start(error, examination.wire.start)

    exchange = examination.wire.start
    assert exchange is not None  # noqa: S101 - the session has read its response
    examination.run = ObservedRun(execution_id, exchange, _POLICY, examination.listener)
    return _judge_start(exchange, has_callback=scope.callback_url is not None)


async def _start(examination: Examination) -> int:
    def observe(event: Event) -> None:
        # Also if the examination was cancelled meanwhile, and only the session reads the response.
        if isinstance(event, ExecutionStarted) and event.execution_id is not None:
            examination.on_started(event.execution_id)

    scope = examination.scope
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the base URL, which has been judged
        session = Session(
            examination.api_key,
            base_url=examination.base_url,
            http=examination.wire.http,
            retry=RetryPolicy(outage=10.0),
            observers=[observe],
        )
        share_channel(session, examination.suffix)
        async with session:
            execution = await session.start(
                scope.workflow or "", scope.inputs, callback_url=scope.callback_url
            )
    return execution.id


def _judge_failed_start(error: Exception, exchange: Exchange | None) -> Finding:
    """Describe why there is no run. The error's own text may name inputs or the workflow."""
    match error:
        case InvalidInputs():
            return failed(
                f"missing: {counted(len(error.missing), 'required input')}, so no run was started",
                "Give them with -i. `promptlayer-exec workflow` lists them.",
            )

        # The only case in which a run may exist, so trying again could cost twice.
        case StartUnknown():
            what = "the response was lost"
            if exchange is not None:
                what = f"{exchange.status_name} without a usable {_ID_FIELD}"
            return failed(
                f"{what}, but the run may have started",
                f"Check in PromptLayer whether it is running. {REPORT_IT}",
            )

        case StatusError():
            return failed(
                f"PromptLayer refused to start a run: {status_name(error.status)}",
                "Check --workflow, its inputs, and what the key may do.",
            )
        case ConnectionFailed():
            return failed("the server became unreachable, so no run was started", "Try again.")
        case ConfigurationError():
            return failed("a setting is malformed, so no run was started", "Check --callback-url.")

    return failed(
        f"{type(error).__name__}, so no run was started", "Check --workflow and the inputs."
    )


def _judge_start(exchange: Exchange, *, has_callback: bool) -> Finding:
    expected = 202 if has_callback else 201
    if exchange.status not in (201, expected):
        return differs(
            status_name(expected),
            exchange.status_name,
            f"This package still reads the id. {REPORT_IT}",
        )

    body: Any = loads(exchange.body)
    fields = {"success": bool, "message": str, _ID_FIELD: int}
    wrong = [name for name, kind in fields.items() if type(body.get(name)) is not kind]
    if "warning" not in body:
        wrong.append("warning")
    if wrong:
        return differs(
            f"{', '.join([*fields, 'warning'])}",
            f"none or another kind of {', '.join(wrong)}",
            f"This package still reads the id. {REPORT_IT}",
        )

    return ok(f"{exchange.status_name} with an id, after {brief(exchange.duration)}")


async def check_warning(examination: Examination) -> Finding:
    """Judge whether PromptLayer warns of inputs that the workflow does not use."""
    body: Any = loads(examination.run.start.body)
    required = examination.required_inputs
    if required is None:
        if body.get("warning"):
            return ok("a warning, which is not shown here")
        return skipped("no definition names the inputs, and there is no warning")

    unused = counted(len(set(examination.scope.inputs) - set(required)), "unused input")
    if body.get("warning"):
        return ok(f"a warning, which is not shown here, with {unused}")
    if set(examination.scope.inputs) <= set(required):
        return ok("none, and the workflow uses every input")
    return differs(
        f"a warning about {unused}", "none", "A misspelt optional input shows only in the output."
    )


async def check_completion(examination: Examination) -> Finding:
    """Poll the run until it is complete, and wait for PromptLayer's push and callback."""
    run = examination.run
    listening = asyncio.create_task(listen_to_updates(examination, run.execution_id))
    try:
        await run.poll_until_complete(examination.wire, examination.scope.timeout)
        if listening.done():
            run.other_listener = listening.result()
        if run.completed_at is not None:
            await run.wait_for_message()
            if examination.receiver is not None:
                run.posted = await examination.receiver.posted(run.policy.callback)
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    return _judge_completion(run, examination.scope.timeout)


def _judge_completion(run: ObservedRun, timeout: float) -> Finding:
    if run.completed_at is not None:
        last_poll = run.polls[-1]
        if last_poll.status != 200:
            return differs(
                "200 OK once the run is complete",
                f"{last_poll.status_name} with all nodes",
                f"Sessions read it as complete. {REPORT_IT}",
            )

        seconds = run.completed_at - run.started_at
        text = f"complete after {seconds:.1f} s ({counted(len(run.polls), 'poll')})"
        refused = Counter(it.status for it in run.polls if it.status not in (200, 202, 404))
        parts = [f"{count} got {status_name(status)}" for status, count in refused.items()]
        if run.failures:
            parts.append(f"{counted(len(run.failures), 'poll')} got no response")
        return ok("; ".join([text, *parts]))

    last = run.polls[-1].status if run.polls else 0
    if last == 202 or not (run.polls or run.failures):
        return failed(
            f"not complete within {timeout:g} s",
            "It keeps running on PromptLayer: give doctor a longer --timeout, or watch it by its"
            " id.",
        )
    if not last:
        return failed(f"no poll got a response: {run.failures[-1]}", "Check the network.")
    return failed(
        f"the last poll got {status_name(last)}",
        f"Watch the run by its id to see whether it can be read now. {REPORT_IT}",
    )


async def check_first_polls(examination: Examination) -> Finding:
    """Judge for how long the run was not found."""
    return judge_first_polls(examination.run)


def judge_first_polls(run: ObservedRun) -> Finding:
    """Judge for how long, and when, polls of a run got 404."""
    missing = [poll for poll in run.polls if poll.status == 404]
    if not run.polls:
        return skipped("no poll got a response")
    if not missing:
        return ok(f"no 404: the first poll got {run.polls[0].status_name}")

    if run.polls[: len(missing)] != missing:
        return differs(
            "404 only right after the run started",
            "404 after the run had been found",
            f"Sessions raise `NotFound` then. {REPORT_IT}",
        )
    seconds = missing[-1].sent_at - run.started_at
    found = f"404 for {seconds:.1f} s after the run started"
    if seconds >= run.policy.grace:
        return differs(
            f"404 for less than {run.policy.grace:g} s after the run started",
            found,
            f"Set RetryPolicy(not_found_grace=...) to more. {REPORT_IT}",
        )
    return ok(f"{found}, which sessions retry")


async def check_node_map(examination: Examination) -> Finding:
    """Judge the shape of each poll for all nodes, and that its status fits its nodes."""
    run = examination.run
    if not run.good_polls:
        return skipped("no poll had nodes")

    for poll in run.good_polls:
        nodes = nodes_in(poll)
        if nodes is None:
            return differs(
                "a map of nodes",
                f"{_kind(poll.body)} with {poll.status_name}",
                f"A session stops watching with `InvalidResponse`. {REPORT_IT}",
            )

        missing = sorted({it for it in _NODE_FIELDS for node in nodes.values() if it not in node})
        if missing:
            return differs(
                f"status, {', '.join(_NODE_FIELDS)} in each node",
                f"nodes without {', '.join(missing)}",
                f"A missing field reads as null. {REPORT_IT}",
            )

        known = [STATUSES.get(node["status"]) for node in nodes.values()]
        is_final = all(status in FINAL for status in known)
        if None not in known and nodes and is_final == (poll.status == 202):
            state = "while every node was final" if is_final else "while a node was not final"
            advice = "Sessions go by the status of the response."
            if contradicts_itself(poll):
                state += f", {counted(sum(map(contradicts_itself, run.polls)), 'time')}"
                advice = "Sessions poll twice more before they believe it."
            return differs(
                "200 once every node is final, and 202 until then",
                f"{poll.status_name} {state}",
                f"{advice} {REPORT_IT}",
            )

    polls = counted(len(run.good_polls), "poll")
    return ok(f"{counted(len(run.last_nodes()), 'node')} in the documented shape ({polls})")


async def check_statuses(examination: Examination) -> Finding:
    """Judge the statuses of all nodes in all polls."""
    run = examination.run
    maps = [nodes_in(poll) or {} for poll in run.good_polls]
    seen = {node["status"] for nodes in maps for node in nodes.values()}
    if not seen:
        return skipped("no poll had nodes")
    if unknown := sorted(seen - set(STATUSES)):
        names = ", ".join(repr(status[:40]) for status in unknown[:5])
        return differs(
            ", ".join(STATUSES),
            names,
            f"A node with an unknown status counts as not final. {REPORT_IT}",
        )

    last = Counter(node["status"] for node in run.last_nodes().values())
    return ok(
        ", ".join(f"{count} {status}" for status, count in last.items()) + " in the last poll"
    )


async def check_running_output(examination: Examination) -> Finding:
    """Judge what a poll for the main output alone gets while the run is not complete."""
    bare = examination.run.bare
    if not bare:
        return skipped("no poll saw the run running")
    for poll in bare:
        if node_map(poll.body) is None:
            return differs(
                "the node map with 202",
                f"{_kind(poll.body)} with 202",
                f"This package ignores that body. {REPORT_IT}",
            )
    return ok(f"the node map with 202 ({counted(len(bare), 'poll')})")


async def check_output(examination: Examination) -> Finding:
    """Judge the response to a poll for the main output alone once the run is complete."""
    run = examination.run
    if run.output is None:
        return skipped("no poll saw the run complete")
    if run.output.status != 200:
        found = run.output.status_name
        if is_completion(run.output):
            found += " with all nodes, so there is no main output"
        return differs("200 OK", found, REPORT_IT)
    try:
        body = loads(run.output.body)
    except (ValueError, RecursionError):
        return differs("JSON", "a body that is not JSON", REPORT_IT)
    return judge_output(body, run.last_nodes())


def judge_output(body: Any, nodes: dict[str, Any]) -> Finding:
    """Judge the main output of a complete run with these nodes."""
    marked = [node for node in nodes.values() if node.get("is_output_node")]
    values = [
        node.get("value")
        for node in marked or nodes.values()
        if STATUSES.get(node["status"]) == "SUCCESS"
    ]
    is_map = same_json(body, nodes)

    if is_map and not values:
        return ok("the node map, because no output node succeeded")
    if is_map and not marked:
        return ok("the node map, because no node is marked as output")
    if not values:
        return differs(
            "the node map, because no output node succeeded",
            _kind_of(body),
            f"Sessions go by the nodes. {REPORT_IT}",
        )
    if any(same_json(body, value) for value in values):
        which = "the output node" if len(marked) == 1 else "one of the output nodes"
        return ok(f"the value of {which if marked else 'a node, because none is marked as output'}")
    return differs(
        "the value of an output node that succeeded",
        "the node map in its place" if is_map else f"another value, {_kind_of(body)}",
        f"`output()` reads the node map. `get_results` returns this body as it is. {REPORT_IT}",
    )


async def check_message(examination: Examination) -> Finding:
    """Judge whether, when and to which channel PromptLayer pushed the completion."""
    run = examination.run
    if run.listener is None:
        return skipped("the check 'subscription' did not pass")
    own = run.listener.announcement(run.execution_id)
    other = run.other_listener and run.other_listener.announcement(run.execution_id)
    if own is not None:
        return _judge_message(run, own, is_on_both=other is not None)

    advice = f"Sessions give push up after three silent completions, and poll. {REPORT_IT}"
    if other is not None:
        return differs(
            "the completion on the run's own channel",
            "the completion on workflow_updates:{execution id}",
            advice,
        )
    if run.listener.lost:
        return failed(f"the subscription was lost: {run.listener.lost}", advice)
    if run.completed_at is None:
        return skipped("no poll saw the run complete")
    found = "no message"
    if run.listener.messages:
        found = f"{counted(len(run.listener.messages), 'message')} about anything else"
    return differs(f"a message within {run.policy.silence:g} s of the completion", found, advice)


def _judge_message(run: ObservedRun, message: Message, *, is_on_both: bool) -> Finding:
    where = "on the run's own channel"
    if is_on_both:
        where += " and on workflow_updates"
    if run.completed_at is None:
        return differs(
            f"a message {where} once the run is complete",
            "one before any poll saw it complete",
            f"Sessions poll again, and go by the poll. {REPORT_IT}",
        )

    if any(poll.status == 202 and poll.sent_at > message.at for poll in run.polls):
        return differs(
            "200 to each poll after the message",
            "202 after the message",
            f"Sessions then poll this run without push. {REPORT_IT}",
        )

    late = message.at - run.completed_at
    if late > run.policy.late:
        return differs(
            f"a message within {run.policy.late:g} s of the completion",
            f"one after {late:.1f} s",
            f"Sessions count it as missing, and poll. {REPORT_IT}",
        )
    when = f"{brief(abs(late))} {'after' if late > 0 else 'before'} a poll saw the completion"
    return ok(f"{where}, {when}")


async def check_callback(examination: Examination) -> Finding:  # noqa: PLR0911 - a table
    """Judge the callback, as far as this machine sees it."""
    run, scope = examination.run, examination.scope
    if scope.callback_url is None:
        return skipped("no --callback-url")
    if examination.receiver is None:
        return ok(
            f"PromptLayer accepted the URL ({run.start.status_name}). doctor cannot see whether the"
            " callback arrives: look at your server's log, or use --callback-port"
        )
    if run.completed_at is None:
        return skipped("no poll saw the run complete")

    advice = "Check that the URL leads to --callback-port on this machine."
    if run.posted is None:
        patience = f"{run.policy.callback:g} s"
        return differs(f"a POST within {patience} of the completion", "none", advice)
    try:
        body: Any = loads(run.posted.body)
        execution_id, output = body[_ID_FIELD], body["final_output"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return differs(f"JSON with {_ID_FIELD} and final_output", "another body", REPORT_IT)

    if execution_id != run.execution_id:
        return differs("the id of this run", "another id", REPORT_IT)
    if not same_json(output, run.last_nodes()):
        return differs(
            "the node map in final_output",
            f"{_kind_of(output)} there",
            f"The callback routes go by the id alone. {REPORT_IT}",
        )
    late = max(run.posted.at - run.completed_at, 0.0)
    return ok(f"arrived with the id and the node map,  {brief(late)} after the completion")


def _kind_of(value: Any) -> str:
    return JSON_KINDS[type(value)]  # for true and false alike: either may be an output


def _kind(body: bytes) -> str:
    """Return the kind of a body in words, without its content."""
    if not body.strip():
        return "an empty body"
    try:
        value = loads(body)
    except (ValueError, RecursionError):
        return "a body that is not JSON"
    if isinstance(value, dict):
        return "another object"
    return f"a bare value, {_kind_of(value)},"
