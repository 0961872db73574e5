"""OpenTelemetry traces and metrics of a session (extra `opentelemetry`)."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from typing import Any
from weakref import WeakKeyDictionary

import attrs

from promptlayer_exec._integration import install_hint

try:
    from opentelemetry.metrics import MeterProvider, get_meter
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider, get_tracer
except ModuleNotFoundError as error:
    error.add_note(f"this needs an extra: {install_hint('opentelemetry')}")
    raise

from promptlayer_exec import (
    Event,
    ExecutionStarted,
    InvalidResponse,
    Polled,
    RequestRetried,
    Snapshot,
    Throttled,
    WatchEnded,
    WatchStarted,
    WatchWoken,
    __version__,
)

__all__ = ["OpenTelemetryObserver"]

_SCOPE = "promptlayer_exec"
# The buckets of the semantic conventions for HTTP, and more up to an hour for watches. The SDK's
# defaults are for milliseconds.
_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_WATCH_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600)
_HISTOGRAMS = {
    "poll.duration": ("From sending a poll to the last byte of its response.", _REQUEST_SECONDS),
    "poll.lateness": ("How late a poll was sent, compared with its schedule.", _REQUEST_SECONDS),
    "watch.duration": ("From the start of a watch to its end.", _WATCH_SECONDS),
    "start.duration": ("From the call of a start to its response.", _REQUEST_SECONDS),
}


@attrs.define
class _Watch:
    span: Span
    latest: Snapshot | None = None
    is_failing: bool = False


class OpenTelemetryObserver:
    """An observer that records a span for each watch and each start, and metrics.

    The parent of a span is the span that was current where the watch or the start began. A watch's
    span has an event for each poll that saw a status change, ended an outage or was the last, and
    one for the start of each outage. A start that failed has no span.

    By default, values, inputs and texts that may quote them are not recorded. Execution ids are on
    spans, never on metrics.

    https://opentelemetry.io/docs/specs/semconv/

    Args:
        tracer_provider: receives the spans; None: the global one, which may be set later.
        meter_provider: receives the metrics; None: the global one, which may be set later.
        record_values: whether to record inputs, outputs, and the body of a response of invalid
            shape on spans.
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
        # By task, as two sessions may watch the same execution, and a session may start a new watch
        # while the previous one is still ending.
        self._watches: WeakKeyDictionary[Any, _Watch] = WeakKeyDictionary()
        meter = get_meter(_SCOPE, __version__, meter_provider)
        self._active = meter.create_up_down_counter(
            "promptlayer_exec.active_watches", "{watch}", "Watches that are polling."
        )
        self._polls = meter.create_counter("promptlayer_exec.polls", "{poll}", "Successful polls.")
        self._retries = meter.create_counter(
            "promptlayer_exec.retries", "{retry}", "Failed attempts that are retried."
        )
        text = "Responses with status 429, which throttle a session."
        self._throttles = meter.create_counter("promptlayer_exec.throttles", "{throttle}", text)
        text = "Polls that came early, because something told of a change."
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
            case ExecutionStarted():
                self._execution_started(event)

    def _watch_started(self, event: WatchStarted) -> None:
        attributes = {"promptlayer_exec.execution.id": event.execution_id}
        span = self._tracer.start_span("watch execution", attributes=attributes)
        self._watches[asyncio.current_task()] = _Watch(span)
        self._active.add(1)

    def _watch_woken(self, event: WatchWoken) -> None:
        source = {"promptlayer_exec.source": event.source}
        self._wake_ups.add(1, source)
        self._watches[asyncio.current_task()].span.add_event("wake_up", source)

    def _polled(self, event: Polled) -> None:
        self._polls.add(1)
        self._seconds["poll.duration"].record(event.duration)
        self._seconds["poll.lateness"].record(event.lateness)
        watch = self._watches[asyncio.current_task()]
        old = watch.latest.nodes if watch.latest is not None else {}
        changed = [
            _text(f"{name}: {node.status}")
            for name, node in event.snapshot.nodes.items()
            if name not in old or old[name].status != node.status
        ]
        if changed or watch.is_failing or event.snapshot.complete:
            attributes: dict[str, Any] = {
                "promptlayer_exec.poll": event.snapshot.poll,
                "promptlayer_exec.progress": event.snapshot.progress,
                "promptlayer_exec.changes": changed,
            }
            watch.span.add_event("poll", attributes)
        watch.latest = event.snapshot
        watch.is_failing = False

    def _retried(self, event: RequestRetried) -> None:
        kind = {"error.type": _type(event.error)}
        self._retries.add(1, kind)
        # Starts and single requests are retried in tasks that have no watch.
        watch = self._watches.get(asyncio.current_task())
        if watch is not None and not watch.is_failing:
            watch.is_failing = True
            watch.span.add_event("outage", kind)

    def _watch_ended(self, event: WatchEnded) -> None:
        watch = self._watches.pop(asyncio.current_task())
        span, latest = watch.span, watch.latest
        span.set_attribute("promptlayer_exec.polls", event.polls)
        span.set_attribute("promptlayer_exec.complete", latest is not None and latest.complete)
        if latest is not None and latest.complete:
            span.set_attribute("promptlayer_exec.succeeded", latest.succeeded)
            if self._record_values:
                outputs = {node.name: node.value for node in latest.output_nodes}
                span.set_attribute("promptlayer_exec.outputs", _json(outputs))
        kind = {"error.type": _type(event.error)} if event.error is not None else {}
        if event.error is not None:
            span.set_attributes(kind)
            self._record_error(span, event.error)
        self._active.add(-1)
        self._seconds["watch.duration"].record(event.elapsed, kind)
        span.end()

    def _record_error(self, span: Span, error: Exception) -> None:
        text = str(error)
        shown: dict[str, str] = {"exception.type": _type(error)}
        if not self._record_values:
            if isinstance(error, InvalidResponse):
                text = _text(str(error.args[0]))  # its str() quotes the body
            # A full stack trace has the messages of the causes, too, which may quote values.
            shown["exception.message"] = text
            shown["exception.stacktrace"] = "".join(traceback.format_tb(error.__traceback__))
        span.record_exception(error, shown)
        span.set_status(Status(StatusCode.ERROR, text))

    def _execution_started(self, event: ExecutionStarted) -> None:
        if not event.recovered:  # what it took until the callback is no time of a response
            self._seconds["start.duration"].record(event.duration)
        ended = time.time_ns()
        span = self._tracer.start_span(
            "start execution",
            kind=SpanKind.CLIENT,
            start_time=ended - int(event.duration * 1e9),
            attributes={
                "promptlayer_exec.execution.id": event.execution_id,
                "promptlayer_exec.workflow": _text(str(event.request.workflow)),
                "promptlayer_exec.abandoned": event.abandoned,
                "promptlayer_exec.recovered": event.recovered,
            },
        )
        if self._record_values:
            span.set_attribute("promptlayer_exec.inputs", _json(event.request.inputs))
        span.end(ended)


def _type(error: Exception) -> str:
    cls = type(error)
    # Users import errors from the package, not from its private modules.
    is_ours = cls.__module__.startswith("promptlayer_exec.")
    module = "promptlayer_exec" if is_ours else cls.__module__
    return f"{module}.{cls.__qualname__}".removeprefix("builtins.")


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate cannot be exported


def _json(value: Any) -> str:
    try:
        return json.dumps(value, default=repr)
    except RecursionError:  # the span must still end
        return "(nested too deeply to be recorded)"
