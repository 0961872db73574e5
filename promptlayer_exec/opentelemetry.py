"""Traces and metrics of a session, by OpenTelemetry: the extra `opentelemetry`."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import attrs

try:
    from opentelemetry.metrics import MeterProvider, get_meter
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider, get_tracer
except ModuleNotFoundError as error:
    error.add_note("this needs an extra: pip install 'promptlayer-exec[opentelemetry]'")
    raise

from promptlayer_exec import (
    Event,
    ExecutionStarted,
    InvalidResponse,
    Node,
    Polled,
    RequestRetried,
    Snapshot,
    Throttled,
    WatchEnded,
    WatchStarted,
    __version__,
)

__all__ = ["OpenTelemetryObserver"]

_SCOPE = "promptlayer_exec"
# Those of the semantic conventions for HTTP, and on to an hour. The SDK's own are milliseconds.
_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_WATCH_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600)


@attrs.define
class _Watch:
    span: Span
    latest: Snapshot | None = None
    is_failing: bool = False


class OpenTelemetryObserver:
    """An observer that makes a span of every watch and every start, and counts the rest.

    A span is the child of the one that is current where the watch, or the start, was begun. Only
    polls that saw a node's status change are events of a watch's span. A start is told by its
    answer, so that one without an answer has no span; its error is its caller's.

    Values and inputs, and whatever text may quote them, are left out. Execution ids are on spans,
    never on metrics.

    https://opentelemetry.io/docs/specs/semconv/

    Args:
        tracer_provider: where spans go; None: the global one, which may be set later.
        meter_provider: likewise for metrics.
        record_values: whether inputs, outputs, and what a misshapen answer looked like are recorded
            on spans.
    """

    def __init__(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        record_values: bool = False,
    ) -> None:
        self._tracer = get_tracer(_SCOPE, __version__, tracer_provider)
        self._record_values = record_values
        # By task: two sessions may watch one execution, and one session a second time while the
        # first is still ending.
        self._watches: WeakKeyDictionary[Any, _Watch] = WeakKeyDictionary()
        meter = get_meter(_SCOPE, __version__, meter_provider)
        self._active = meter.create_up_down_counter(
            "promptlayer_exec.active_watches", "{watch}", "Watches that are polling."
        )
        self._polls = meter.create_counter(
            "promptlayer_exec.polls", "{poll}", "Good answers to polls."
        )
        self._retries = meter.create_counter(
            "promptlayer_exec.retries", "{retry}", "Attempts that failed and are repeated."
        )
        self._throttles = meter.create_counter(
            "promptlayer_exec.throttles", "{throttle}", "Answers 429, which slow a session down."
        )
        self._poll_duration = meter.create_histogram(
            "promptlayer_exec.poll.duration",
            "s",
            "From sending a poll to the last byte of its answer.",
            explicit_bucket_boundaries_advisory=_REQUEST_SECONDS,
        )
        self._lateness = meter.create_histogram(
            "promptlayer_exec.poll.lateness",
            "s",
            "How long after its time a poll was sent.",
            explicit_bucket_boundaries_advisory=_REQUEST_SECONDS,
        )
        self._watch_duration = meter.create_histogram(
            "promptlayer_exec.watch.duration",
            "s",
            "From the beginning of a watch to its end.",
            explicit_bucket_boundaries_advisory=_WATCH_SECONDS,
        )
        self._start_duration = meter.create_histogram(
            "promptlayer_exec.start.duration",
            "s",
            "From the call of a start to its answer.",
            explicit_bucket_boundaries_advisory=_REQUEST_SECONDS,
        )

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
            case WatchEnded():
                self._watch_ended(event)
            case ExecutionStarted():
                self._execution_started(event)

    def _watch_started(self, event: WatchStarted) -> None:
        span = self._tracer.start_span(
            "watch execution", attributes={"promptlayer_exec.execution.id": event.execution_id}
        )
        self._watches[asyncio.current_task()] = _Watch(span)
        self._active.add(1)

    def _polled(self, event: Polled) -> None:
        self._polls.add(1)
        self._poll_duration.record(event.duration)
        self._lateness.record(event.lateness)
        watch = self._watches[asyncio.current_task()]
        changed = _changed(watch.latest, event.snapshot)
        if changed or watch.is_failing or event.snapshot.complete:
            watch.span.add_event(
                "poll",
                {
                    "promptlayer_exec.poll": event.snapshot.poll,
                    "promptlayer_exec.progress": event.snapshot.progress,
                    "promptlayer_exec.changes": changed,
                },
            )
        watch.latest = event.snapshot
        watch.is_failing = False

    def _retried(self, event: RequestRetried) -> None:
        kind = {"error.type": _type(event.error)}
        self._retries.add(1, kind)
        # A start, and a single look, are retried in tasks that are no watch's.
        watch = self._watches.get(asyncio.current_task())
        if watch is not None and not watch.is_failing:
            watch.is_failing = True
            watch.span.add_event("outage", kind)

    def _watch_ended(self, event: WatchEnded) -> None:
        watch = self._watches.pop(asyncio.current_task())
        span, latest = watch.span, watch.latest
        kind: dict[str, str] = {}
        span.set_attribute("promptlayer_exec.polls", event.polls)
        span.set_attribute("promptlayer_exec.complete", latest is not None and latest.complete)
        if latest is not None and latest.complete:
            span.set_attribute("promptlayer_exec.succeeded", latest.succeeded)
            if self._record_values:
                outputs = {node.name: node.value for node in latest.output_nodes}
                span.set_attribute("promptlayer_exec.outputs", _json(outputs))
        if event.error is not None:
            kind = {"error.type": _type(event.error)}
            span.set_attributes(kind)
            self._record_error(span, event.error)
        self._active.add(-1)
        self._watch_duration.record(event.elapsed, kind)
        span.end()

    def _record_error(self, span: Span, error: Exception) -> None:
        text = str(error)
        shown: dict[str, str] = {"exception.type": _type(error)}
        if not self._record_values:
            if isinstance(error, InvalidResponse):
                text = _text(str(error.args[0]))  # its str shows how the body begins
            # With the messages, of the causes too, a stack trace would quote what they quote.
            shown["exception.message"] = text
            shown["exception.stacktrace"] = "".join(traceback.format_tb(error.__traceback__))
        span.record_exception(error, shown)
        span.set_status(Status(StatusCode.ERROR, text))

    def _execution_started(self, event: ExecutionStarted) -> None:
        self._start_duration.record(event.duration)
        ended = time.time_ns()
        span = self._tracer.start_span(
            "start execution",
            kind=SpanKind.CLIENT,
            start_time=ended - int(event.duration * 1e9),
            attributes={
                "promptlayer_exec.execution.id": event.execution_id,
                "promptlayer_exec.workflow": _text(str(event.request.workflow)),
                "promptlayer_exec.abandoned": event.abandoned,
            },
        )
        if self._record_values:
            span.set_attribute("promptlayer_exec.inputs", _json(event.request.inputs))
        span.end(ended)


def _type(error: Exception) -> str:
    cls = type(error)
    # The private modules are not where a user finds an error.
    module = (
        "promptlayer_exec" if cls.__module__.startswith("promptlayer_exec.") else cls.__module__
    )
    return f"{module}.{cls.__qualname__}".removeprefix("builtins.")


def _changed(before: Snapshot | None, after: Snapshot) -> list[str]:
    """Return the nodes whose status is another than before, each with its new one."""
    old: Mapping[str, Node] = {} if before is None else before.nodes
    if old is after.nodes:
        return []
    return [
        _text(f"{name}: {node.status}")
        for name, node in after.nodes.items()
        if name not in old or old[name].status != node.status
    ]


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate breaks an export


def _json(value: Any) -> str:
    try:
        return json.dumps(value, default=repr)
    except RecursionError:  # it must not keep a span from its end
        return "(nested too deeply to be recorded)"
