"""OpenTelemetry traces and metrics for a session (extra `opentelemetry`)."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import attrs

from promptlayer_exec._integration import ExpiringDict, install_hint, log_text

try:
    from opentelemetry import context, metrics, trace
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider
except ModuleNotFoundError as error:
    error.add_note(f"this needs {install_hint('opentelemetry')}")
    raise

from promptlayer_exec import (
    CallEnded,
    CallStarted,
    Event,
    ExecutionStarted,
    Polled,
    RequestRetried,
    Snapshot,
    StartFailed,
    Throttled,
    WatchEnded,
    WatchStarted,
    WatchWoken,
    __version__,
)

__all__ = ["OpenTelemetryObserver"]

# The last version with the conventions for GenAI, before they got a repository of their own.
_SCHEMA = "https://opentelemetry.io/schemas/1.41.0"
# The buckets of the semantic conventions for HTTP, and more up to an hour for watches. The SDK's
# defaults are for milliseconds.
_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_WATCH_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600)
_HISTOGRAMS = {
    "poll.duration": ("From sending a poll to the last byte of its response.", _REQUEST_SECONDS),
    "poll.lateness": ("How late a poll was sent, compared with its schedule.", _REQUEST_SECONDS),
    "run.duration": ("From the call of run to its output or error.", _WATCH_SECONDS),
    "watch.duration": ("How long a watch took.", _WATCH_SECONDS),
    "start.duration": ("From calling start to its response or error.", _REQUEST_SECONDS),
}


@attrs.define
class _WatchSpan:
    span: trace.Span
    latest: Snapshot | None = None
    is_failing: bool = False


@attrs.define
class _CallSpan:
    span: trace.Span
    base_url: str
    attached: Any  # the token with which to detach its context


class OpenTelemetryObserver:
    """Records metrics, and a span for each run, with its start request and its watch.

    Pass it to a session::

        session = Session(observers=[OpenTelemetryObserver()])

    The span of a run, from `Session.run` or a fan-out, follows the semantic conventions for GenAI
    agents. It is named `invoke_agent` plus the workflow, its parent is the current span at the
    call, and it has the error that the caller gets. Its start request and its watch are its
    children. If you call `start` yourself, the span of the start request is that of the run.

    The span of a watch links to the one of its start request. If several callers share a watch, it
    is in the trace of the first one, and the spans of the other runs link to it. It has an event
    for each poll with a status change, for the last poll, for each wake-up, and for the first
    failure and the recovery of each outage. The span of something that failed has an `exception`
    event.

    By default it records no values, no inputs, and no texts that may quote them. Spans have
    execution ids, but metrics never do.

    https://github.com/open-telemetry/semantic-conventions-genai

    Args:
        tracer_provider: receives the spans. None means the global one, which you may set later.
        meter_provider: receives the metrics. None means the global one, which you may set later.
        record_values: whether to record inputs, outputs, and the whole text of errors, which may
            quote them or the body of a malformed response.
    """

    def __init__(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        record_values: bool = False,
    ) -> None:
        self._tracer = trace.get_tracer("promptlayer_exec", __version__, tracer_provider, _SCHEMA)
        # By server and execution id, so that a watch can link to its start.
        self._starts: ExpiringDict[tuple[str, int | None], trace.SpanContext] = ExpiringDict()
        # As well, so that a run can link to the watch that it shares with another caller.
        self._latest_watches: ExpiringDict[tuple[str, int | None], trace.SpanContext] = (
            ExpiringDict()
        )
        self._record_values = record_values
        # By task, as two sessions may watch the same execution, and a session may start a new watch
        # while the previous one is still ending.
        self._watches: WeakKeyDictionary[Any, _WatchSpan] = WeakKeyDictionary()
        # By task as well: each call has one task, and a task has one call at a time.
        self._calls: WeakKeyDictionary[Any, _CallSpan] = WeakKeyDictionary()
        # Set in the context of a call, which the tasks of its start request and watch inherit.
        self._is_called = context.create_key("call of promptlayer_exec")

        meter = metrics.get_meter("promptlayer_exec", __version__, meter_provider, _SCHEMA)
        self._active = meter.create_up_down_counter(
            "promptlayer_exec.active_watches", "{watch}", "Watches that are polling."
        )
        self._polls = meter.create_counter("promptlayer_exec.polls", "{poll}", "Successful polls.")
        text = "Failed attempts that the session retries."
        self._retries = meter.create_counter("promptlayer_exec.retries", "{retry}", text)
        text = "Responses with status 429, which throttle a session."
        self._throttles = meter.create_counter("promptlayer_exec.throttles", "{throttle}", text)
        text = "Polls that came early, because something announced a change."
        self._wake_ups = meter.create_counter("promptlayer_exec.wake_ups", "{wake_up}", text)
        self._seconds = {
            name: meter.create_histogram(
                f"promptlayer_exec.{name}", "s", text, explicit_bucket_boundaries_advisory=buckets
            )
            for name, (text, buckets) in _HISTOGRAMS.items()
        }

    def __call__(self, event: Event, /) -> None:
        """Record an event."""
        match event:
            case Polled():
                self._polled(event)
            case RequestRetried():
                self._retried(event)
            case Throttled():
                self._throttles.add(1)
            case WatchStarted():
                self._watch_started(event)
            case WatchWoken():
                self._watch_woken(event)
            case WatchEnded():
                self._watch_ended(event)
            case ExecutionStarted() | StartFailed():
                self._start_ended(event)
            case CallStarted():
                self._call_started(event)
            case CallEnded():
                self._call_ended(event)

    def _call_started(self, event: CallStarted) -> None:
        attributes = _run_attributes("run", event.workflow, event.base_url)
        if isinstance(event.key, str):
            attributes["promptlayer_exec.key"] = _text(event.key)
        span = self._tracer.start_span(
            _name("invoke_agent", event.workflow),
            kind=trace.SpanKind.CLIENT,
            attributes=attributes,
        )

        within = context.set_value(self._is_called, True, trace.set_span_in_context(span))
        self._calls[asyncio.current_task()] = _CallSpan(
            span, event.base_url, context.attach(within)
        )

    def _call_ended(self, event: CallEnded) -> None:
        call = self._calls.pop(asyncio.current_task())
        context.detach(call.attached)
        if event.execution_id is not None:
            call.span.set_attribute("promptlayer_exec.execution.id", event.execution_id)

        watch = self._latest_watches.get((call.base_url, event.execution_id))
        if watch is not None and watch.trace_id != call.span.get_span_context().trace_id:
            call.span.add_link(watch)

        metric = _agent(event.workflow)
        if event.error is not None:
            metric["error.type"] = self._record_error(call.span, event.error)
        self._seconds["run.duration"].record(event.elapsed, metric)
        call.span.end()

    def _watch_started(self, event: WatchStarted) -> None:
        start = self._starts.get((event.base_url, event.execution_id))
        span = self._tracer.start_span(
            _name("watch", event.workflow),
            attributes={
                **_attributes("watch", event.workflow, event.base_url),
                "promptlayer_exec.execution.id": event.execution_id or 0,
            },
            links=[] if start is None else [trace.Link(start)],
        )
        self._latest_watches.add((event.base_url, event.execution_id), span.get_span_context())
        self._watches[asyncio.current_task()] = _WatchSpan(span)
        self._active.add(1)

    def _watch_woken(self, event: WatchWoken) -> None:
        source = {"promptlayer_exec.source": event.source}
        self._wake_ups.add(1, source)
        self._watches[asyncio.current_task()].span.add_event("promptlayer_exec.wake_up", source)

    def _polled(self, event: Polled) -> None:
        self._polls.add(1)
        if not event.shared:
            self._seconds["poll.duration"].record(event.duration)
            self._seconds["poll.lateness"].record(event.lateness)

        watch = self._watches[asyncio.current_task()]
        changed = [
            _text(f"{change.node.name}: {change.node.status}")
            for change in event.snapshot.diff(watch.latest)
            if change.node.status != change.before
        ]
        if changed or watch.is_failing or event.snapshot.complete:
            attributes: dict[str, Any] = {
                "promptlayer_exec.poll": event.snapshot.poll,
                "promptlayer_exec.progress": event.snapshot.progress,
                "promptlayer_exec.changes": changed,
            }
            watch.span.add_event("promptlayer_exec.poll", attributes)

        watch.latest = event.snapshot
        watch.is_failing = False

    def _retried(self, event: RequestRetried) -> None:
        kind = {"error.type": _type(event.error)}
        self._retries.add(1, kind)
        # Starts and single requests are retried in tasks that have no watch.
        watch = self._watches.get(asyncio.current_task())
        if watch is not None and not watch.is_failing:
            watch.is_failing = True
            watch.span.add_event("promptlayer_exec.outage", kind)

    def _watch_ended(self, event: WatchEnded) -> None:
        watch = self._watches.pop(asyncio.current_task())
        span, latest = watch.span, watch.latest
        span.set_attribute("promptlayer_exec.polls", event.polls)
        span.set_attribute("promptlayer_exec.complete", event.succeeded is not None)
        if event.succeeded is not None:
            span.set_attribute("promptlayer_exec.succeeded", event.succeeded)
        if latest is not None and latest.complete and self._record_values:
            outputs = {node.name: node.value for node in latest.output_nodes}
            span.set_attribute("promptlayer_exec.outputs", _json(outputs))

        metric = _agent(event.workflow)
        if event.error is not None:
            metric["error.type"] = self._record_error(span, event.error)
        elif latest is not None and event.succeeded is False:
            names = ", ".join(node.name for node in latest.failed_nodes[:5])
            text = _text(f"the execution failed: {names or 'no output node succeeded'}")
            metric["error.type"] = "promptlayer_exec.ExecutionFailed"
            _set_error(span, metric["error.type"], text)

        self._active.add(-1)
        self._seconds["watch.duration"].record(event.elapsed, metric)
        span.end()

    def _start_ended(self, event: ExecutionStarted | StartFailed) -> None:
        """Record a span from the call of `Session.start` until now."""
        request, ended = event.request, time.time_ns()
        if context.get_value(self._is_called):
            name, kind = "start", trace.SpanKind.INTERNAL
            attributes = _attributes("start", request.workflow, event.base_url)
        else:  # then it is the span of the run
            name, kind = "invoke_agent", trace.SpanKind.CLIENT
            attributes = _run_attributes("start", request.workflow, event.base_url)
        if request.version is not None:
            attributes["gen_ai.agent.version"] = str(request.version)

        span = self._tracer.start_span(
            _name(name, request.workflow),
            kind=kind,
            start_time=ended - int(event.duration * 1e9),
            attributes=attributes,
        )
        if self._record_values:
            span.set_attribute("promptlayer_exec.inputs", _json(request.inputs))

        metric = _agent(request.workflow)
        if isinstance(event, StartFailed):
            metric["error.type"] = self._record_error(span, event.error)
        else:
            span.set_attribute("promptlayer_exec.execution.id", event.execution_id or 0)
            span.set_attribute("promptlayer_exec.abandoned", event.abandoned)
            span.set_attribute("promptlayer_exec.recovered", event.recovered)
            self._starts.add((event.base_url, event.execution_id), span.get_span_context())

        # The time until a callback is not a response time.
        if isinstance(event, StartFailed) or not event.recovered:
            self._seconds["start.duration"].record(event.duration, metric)
        span.end(ended)

    def _record_error(self, span: trace.Span, error: BaseException) -> str:
        """Record an error on a span, and return its type."""
        kind = _type(error)
        if self._record_values:
            text, stack = _text(str(error)), traceback.format_exception(error)
        else:
            text, stack = _text(log_text(error)), traceback.format_tb(error.__traceback__)

        _set_error(span, kind, text)
        # `record_exception` would add the messages of the causes, which may quote values.
        attributes = {
            "exception.type": kind,
            "exception.message": text,
            "exception.stacktrace": _text("".join(stack)),
        }
        span.add_event("exception", attributes)
        return kind


def _name(operation: str, workflow: str | int | None) -> str:
    if workflow is None:
        return operation
    return _text(f"{operation} {workflow}")


def _agent(workflow: str | int | None) -> dict[str, str]:
    if workflow is None:
        return {}
    return {"gen_ai.agent.name": _text(str(workflow))}


def _attributes(operation: str, workflow: str | int | None, base_url: str) -> dict[str, str | int]:
    """Return the attributes that a sampler may need when the span is created."""
    attributes: dict[str, str | int] = {
        "gen_ai.provider.name": "promptlayer",
        "promptlayer_exec.operation": operation,
        **_agent(workflow),
        **_server(base_url),
    }
    if isinstance(workflow, int):
        attributes["gen_ai.agent.id"] = str(workflow)
    return attributes


def _run_attributes(operation: str, workflow: str | int, base_url: str) -> dict[str, str | int]:
    """Return the attributes of the one span of a run, by which dashboards count runs."""
    operation_name = {"gen_ai.operation.name": "invoke_agent"}
    return {**operation_name, **_attributes(operation, workflow, base_url)}


def _server(base_url: str) -> dict[str, str | int]:
    if not base_url:  # it failed before there was a request
        return {}
    url = urlsplit(base_url)
    default = {"http": 80, "https": 443}[url.scheme]
    return {"server.address": url.hostname or "", "server.port": url.port or default}


def _set_error(span: trace.Span, kind: str, description: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(trace.Status(trace.StatusCode.ERROR, description))


def _type(error: BaseException) -> str:
    cls = type(error)
    # Users import errors from the package, not from its private modules.
    is_ours = cls.__module__.startswith("promptlayer_exec.")
    module = "promptlayer_exec" if is_ours else cls.__module__
    return f"{module}.{cls.__qualname__}".removeprefix("builtins.")


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate cannot be exported


def _json(value: Any) -> str:
    return json.dumps(value, default=repr)
