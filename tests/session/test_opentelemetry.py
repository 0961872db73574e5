"""Traces and metrics of real watches and starts, in the SDK's in-memory exporters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from promptlayer_exec import (
    CallEnded,
    CallStarted,
    ExecutionStarted,
    ExecutionTimeout,
    InvalidOutput,
    InvalidResponse,
    NotFound,
    Polled,
    PollPolicy,
    PromptLayerExecError,
    Session,
    SessionClosed,
    StartRequest,
    WatchEnded,
    WatchStarted,
    __version__,
)
from promptlayer_exec.opentelemetry import OpenTelemetryObserver
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

SCHEMA = "https://opentelemetry.io/schemas/1.41.0"
COUNTERS = ("polls", "retries", "throttles", "wake_ups")


class Collected:
    """The exported spans and metrics."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.tracers.get_tracer("test")
        self._reader = InMemoryMetricReader()
        self.meters = MeterProvider([self._reader], shutdown_on_exit=False)

    def observer(self, **settings: Any) -> OpenTelemetryObserver:
        """Return an observer that exports to this collection."""
        return OpenTelemetryObserver(
            tracer_provider=self.tracers, meter_provider=self.meters, **settings
        )

    def spans(self, operation: str) -> list[ReadableSpan]:
        """Return the spans of watches or of starts, in the order in which they ended."""
        return [
            span
            for span in self._exporter.get_finished_spans()
            if (span.attributes or {}).get("promptlayer_exec.operation") == operation
        ]

    def metrics(self) -> dict[str, Any]:
        """Return all metrics by name."""
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        (scope,) = data.resource_metrics[0].scope_metrics
        assert (scope.scope.name, scope.scope.version) == ("promptlayer_exec", __version__)
        assert scope.schema_url == SCHEMA
        return {metric.name: metric for metric in scope.metrics}

    def totals(self) -> dict[str, float]:
        """Return each metric's value, or the count of its recordings, over all attributes."""
        return {
            name: sum(
                point.count if hasattr(point, "count") else point.value
                for point in metric.data.data_points
            )
            for name, metric in self.metrics().items()
        }


def span_events(span: ReadableSpan) -> list[tuple[str, dict[str, Any]]]:
    """Return the name and the attributes of each event of a span."""
    return [(event.name, dict(event.attributes or {})) for event in span.events]


@pytest.fixture
def collected() -> Collected:
    """Return the collection of the spans and metrics of `observed`."""
    return Collected()


@pytest.fixture
async def observed(
    collected: Collected, recorder: Any, open_session: Callable[..., Session]
) -> AsyncIterator[Session]:
    """Return an observed session; at its end, check that no watch is active."""
    async with open_session(observers=[collected.observer(), recorder]) as session:
        yield session
    assert collected.totals().get("promptlayer_exec.active_watches", 0) == 0


INVOKES = {"gen_ai.operation.name": "invoke_agent"}  # of the one span of a run


def common(sim: Simulator, operation: str, workflow: str | None = None) -> dict[str, Any]:
    """Return the attributes that every span has."""
    agent = {} if workflow is None else {"gen_ai.agent.name": workflow}
    return {
        "gen_ai.provider.name": "promptlayer",
        "promptlayer_exec.operation": operation,
        "server.address": "127.0.0.1",
        "server.port": int(sim.base_url.rpartition(":")[2]),
        **agent,
    }


async def test_a_watch_is_one_span_whose_events_are_the_changes(
    collected: Collected, observed: Session, recorder: Any, sim: Simulator, held: int
) -> None:
    """The numbers of polls and of followers make no difference."""
    execution = observed.execution(held)
    with collected.tracer.start_as_current_span("request") as parent:
        waits = [asyncio.create_task(execution.wait()) for _ in range(3)]
        await asyncio.sleep(0)
    await sim.wait_for_requests(8)
    sim.finish(held, "Answer")
    await asyncio.gather(*waits)
    (span,) = collected.spans("watch")
    assert span.parent is not None
    assert span.parent.span_id == parent.get_span_context().span_id
    assert span.instrumentation_scope is not None
    assert (span.instrumentation_scope.name, span.instrumentation_scope.version) == (
        "promptlayer_exec",
        __version__,
    )
    assert span.instrumentation_scope.schema_url == SCHEMA
    assert (span.name, span.kind, span.links) == ("watch", SpanKind.INTERNAL, ())
    polls = len(recorder.of(Polled))
    assert dict(span.attributes or {}) == {
        **common(sim, "watch"),
        "promptlayer_exec.execution.id": held,
        "promptlayer_exec.polls": polls,
        "promptlayer_exec.complete": True,
        "promptlayer_exec.succeeded": True,
    }
    assert span_events(span) == [
        (
            "promptlayer_exec.poll",
            {
                "promptlayer_exec.poll": 1,
                "promptlayer_exec.progress": 0.5,
                "promptlayer_exec.changes": ("Plan: SUCCESS", "Answer: RUNNING"),
            },
        ),
        (
            "promptlayer_exec.poll",
            {
                "promptlayer_exec.poll": polls,
                "promptlayer_exec.progress": 1.0,
                "promptlayer_exec.changes": ("Answer: SUCCESS",),
            },
        ),
    ]
    assert span.status.status_code is StatusCode.UNSET
    assert span.end_time is not None
    assert span.start_time is not None
    (ended,) = collected.metrics()["promptlayer_exec.watch.duration"].data.data_points
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(ended.sum, abs=0.5)


async def test_a_failed_execution_is_an_error(
    collected: Collected, observed: Session, sim: Simulator
) -> None:
    """The span has the names of the failed nodes, and the metric the type of the error."""
    nodes = [
        SimNode("Plan", status="FAILED", error_message="secret"),
        SimNode("Out", status="SKIPPED"),
    ]
    sim.add_workflow("report", Scenario(nodes))
    await (await observed.start("report")).wait()
    (span,) = collected.spans("watch")
    assert span.attributes is not None
    assert span.attributes["promptlayer_exec.succeeded"] is False
    assert span.attributes["error.type"] == "promptlayer_exec.ExecutionFailed"
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "the execution failed: Plan"
    assert "secret" not in span.to_json()
    (point,) = collected.metrics()["promptlayer_exec.watch.duration"].data.data_points
    assert dict(point.attributes) == {
        "error.type": "promptlayer_exec.ExecutionFailed",
        "gen_ai.agent.name": "report",
    }


async def test_an_error_is_recorded_and_sets_the_status(
    collected: Collected, observed: Session
) -> None:
    """The span and the metric have the name under which a user imports the error."""
    with pytest.raises(NotFound):
        await observed.execution(7).wait()
    (span,) = collected.spans("watch")
    assert span.status.status_code is StatusCode.ERROR
    assert (span.status.description or "").startswith(
        "NotFound: execution 7: the server returned 404"
    )
    assert span.attributes is not None
    assert span.attributes["error.type"] == "promptlayer_exec.NotFound"
    assert span.attributes["promptlayer_exec.complete"] is False
    ((name, attributes),) = span_events(span)
    assert name == "exception"
    assert attributes["exception.type"] == "promptlayer_exec.NotFound"
    assert attributes["exception.message"] == span.status.description
    assert "_poll_once" in attributes["exception.stacktrace"]
    (point,) = collected.metrics()["promptlayer_exec.watch.duration"].data.data_points
    assert dict(point.attributes) == {"error.type": "promptlayer_exec.NotFound"}


async def test_a_watch_is_linked_to_the_start_of_its_run(
    collected: Collected, observed: Session, sim: Simulator
) -> None:
    """Both have the workflow's name, whichever handle follows the run."""
    sim.add_workflow("write/report", Scenario([SimNode("Out")]))
    execution = await observed.start("write/report", version=3)
    await observed.execution(execution.id).wait()
    (start,), (watch,) = collected.spans("start"), collected.spans("watch")
    assert (start.name, start.kind) == ("invoke_agent write/report", SpanKind.CLIENT)
    assert (watch.name, watch.kind) == ("watch write/report", SpanKind.INTERNAL)
    assert INVOKES.items() <= dict(start.attributes or {}).items()
    assert "gen_ai.operation.name" not in dict(watch.attributes or {})
    assert [link.context for link in watch.links] == [start.context]
    assert common(sim, "watch", "write/report").items() <= dict(watch.attributes or {}).items()
    assert (start.attributes or {})["gen_ai.agent.version"] == "3"
    keys = {*(start.attributes or {}), *(watch.attributes or {})}
    assert not {key for key in keys if key.startswith(("gen_ai.request", "gen_ai.usage"))}


async def test_each_run_is_one_trace_with_the_error_of_its_caller(
    collected: Collected, observed: Session, sim: Simulator
) -> None:
    """Five runs, two of them late and one with a wrong output: the alert finds three errors."""
    sim.add_workflow("late", Scenario([SimNode("Out", 1, None, is_output_node=True)]))
    sim.add_workflow("good", Scenario([SimNode("Out", 1, is_output_node=True)]))
    sim.add_workflow("wrong", Scenario([SimNode("Out", "x", is_output_node=True)]))

    requests = [StartRequest(name, key=f"{name} item") for name in ("good", "late", "wrong")]
    outcomes = await observed.collect(requests, timeout=0.3, into=int)
    assert [type(outcome.error) for outcome in outcomes] == [
        type(None),
        ExecutionTimeout,
        InvalidOutput,
    ]
    assert await observed.run("good", into=int) == 1
    with pytest.raises(ExecutionTimeout):
        await observed.run("late", timeout=0.3)
    await observed.aclose()  # the last watches end

    traces: dict[int, dict[str, ReadableSpan]] = {}
    for operation in ("run", "start", "watch"):
        for span in collected.spans(operation):
            assert span.context is not None
            assert operation not in traces.setdefault(span.context.trace_id, {})
            traces[span.context.trace_id][operation] = span
    assert len(traces) == 5
    for spans in traces.values():
        run = spans["run"]
        assert (run.parent, run.kind) == (None, SpanKind.CLIENT)
        assert run.name.removeprefix("invoke_agent ") in ("good", "late", "wrong")
        for operation in ("start", "watch"):
            child = spans[operation]
            assert child.parent is not None
            assert run.context is not None
            assert child.parent.span_id == run.context.span_id
            assert child.kind is SpanKind.INTERNAL
            assert child.name == run.name.replace("invoke_agent", operation)
            assert "gen_ai.operation.name" not in (child.attributes or {})

    points = collected.metrics()["promptlayer_exec.run.duration"].data.data_points
    errors = [str((point.attributes or {}).get("error.type")) for point in points]
    counted = {
        kind: sum(p.count for p, e in zip(points, errors, strict=True) if e == kind)
        for kind in errors
    }
    assert counted == {
        "None": 2,
        "promptlayer_exec.ExecutionTimeout": 2,
        "promptlayer_exec.InvalidOutput": 1,
    }


async def test_the_span_of_a_run_has_its_key_and_its_error(
    collected: Collected, observed: Session, sim: Simulator
) -> None:
    """A key that is no text is left out, since it may be any value of the program."""
    sim.add_workflow("wrong", Scenario([SimNode("Out", "secret", is_output_node=True)]))
    requests = [StartRequest("wrong", key=key) for key in ("row 1", object(), None)]
    await observed.collect(requests, into=int, max_in_flight=1)
    first, second, third = collected.spans("run")
    assert dict(first.attributes or {}) == {
        **INVOKES,
        **common(sim, "run", "wrong"),
        "promptlayer_exec.key": "row 1",
        "promptlayer_exec.execution.id": sim.runs[0].execution_id,
        "error.type": "promptlayer_exec.InvalidOutput",
    }
    assert "promptlayer_exec.key" not in {*(second.attributes or {}), *(third.attributes or {})}
    ((name, attributes),) = span_events(first)
    assert name == "exception"
    assert "secret" not in str(attributes)


async def test_the_current_span_of_a_caller_is_its_own_again_after_a_run(
    collected: Collected, observed: Session, sim: Simulator
) -> None:
    """The span of the run is current only during the call, also if it fails."""
    sim.add_workflow("good", Scenario([SimNode("Out", 1, is_output_node=True)]))
    with collected.tracer.start_as_current_span("request") as parent:
        await observed.run("good")
        with pytest.raises(TypeError):
            await observed.run("good", {"x": object()})
        assert trace.get_current_span() is parent
    runs = collected.spans("run")
    assert [run.parent == parent.get_span_context() for run in runs] == [True, True]
    (started,) = [
        span for span in collected.spans("start") if "error.type" not in (span.attributes or {})
    ]
    assert started.parent == runs[0].context
    assert [run.status.status_code for run in runs] == [StatusCode.UNSET, StatusCode.ERROR]


async def test_a_run_links_to_the_watch_that_it_shares_with_another_trace(
    collected: Collected,
) -> None:
    """A run in the trace of the watch needs no link, nor does one of another execution."""
    observer, url = collected.observer(), "http://127.0.0.1:9"

    def call(execution_id: int) -> None:
        observer(CallStarted(None, "report", base_url=url))
        observer(CallEnded(execution_id, "report", None, elapsed=0.1))

    with collected.tracer.start_as_current_span("first"):
        observer(WatchStarted(7, base_url=url))
        call(7)
    with collected.tracer.start_as_current_span("second"):
        call(7)
        call(8)
    observer(WatchEnded(7, polls=0, elapsed=0.1, error=None))

    (watch,) = collected.spans("watch")
    links = [[link.context for link in span.links] for span in collected.spans("run")]
    assert links == [[], [watch.context], []]


async def test_a_call_that_is_cancelled_ends_its_span(
    collected: Collected, observed: Session, recorder: Any, sim: Simulator
) -> None:
    """The event and the span have the cancellation as error, and the id of the run."""
    sim.add_workflow("late", Scenario([SimNode("Out", 1, None, is_output_node=True)]))
    running = asyncio.create_task(observed.run("late"))
    await recorder.next(Polled)
    running.cancel()
    await asyncio.wait([running])
    (ended,) = recorder.of(CallEnded)
    assert (ended.execution_id, ended.workflow) == (sim.runs[0].execution_id, "late")
    assert isinstance(ended.error, asyncio.CancelledError)
    (span,) = collected.spans("run")
    assert (span.attributes or {})["error.type"] == "asyncio.exceptions.CancelledError"


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, "promptlayer_exec.BadRequest"), (503, "promptlayer_exec.StartUnknown")],
)
async def test_a_failed_start_is_an_error(
    collected: Collected, observed: Session, sim: Simulator, status: int, error: str
) -> None:
    """Its span has no execution id, and its duration is counted by the type of the error."""
    sim.inject(Fault.status(status))
    with (
        collected.tracer.start_as_current_span("request") as parent,
        pytest.raises(PromptLayerExecError),
    ):
        await observed.start(42)
    (span,) = collected.spans("start")
    assert (span.name, span.kind) == ("invoke_agent 42", SpanKind.CLIENT)
    assert span.parent is not None
    assert span.parent.span_id == parent.get_span_context().span_id
    assert dict(span.attributes or {}) == {
        **INVOKES,
        **common(sim, "start", "42"),
        "gen_ai.agent.id": "42",
        "error.type": error,
    }
    assert span.status.status_code is StatusCode.ERROR
    assert "workflow 42" in (span.status.description or "")
    assert [name for name, _ in span_events(span)] == ["exception"]
    (point,) = collected.metrics()["promptlayer_exec.start.duration"].data.data_points
    assert dict(point.attributes) == {"error.type": error, "gen_ai.agent.name": "42"}


async def test_a_start_that_cannot_be_prepared_is_an_error_that_quotes_nothing(
    collected: Collected, observed: Session
) -> None:
    """It has no server, and its text could quote an input."""
    with pytest.raises(TypeError):
        await observed.start("report", {"secret-key": object()})
    (span,) = collected.spans("start")
    assert (span.attributes or {})["error.type"] == "TypeError"
    assert "server.address" not in (span.attributes or {})
    assert span.status.description == "TypeError"
    assert "secret-key" not in str(span_events(span))


async def test_the_latest_ten_thousand_starts_can_be_linked(collected: Collected) -> None:
    """The memory of an observer is bounded."""
    observer = collected.observer()
    for execution_id in range(1, 10_003):
        observer(ExecutionStarted(execution_id, StartRequest("w"), False, 0.1))
    for execution_id in (2, 3):
        observer(WatchStarted(execution_id))
        observer(WatchEnded(execution_id, polls=0, elapsed=0.0, error=None))
    assert [len(span.links) for span in collected.spans("watch")] == [0, 1]


@pytest.mark.parametrize(
    ("base_url", "address", "port"),
    [
        ("https://api.promptlayer.com", "api.promptlayer.com", 443),
        ("http://localhost/prefix", "localhost", 80),
        ("http://[::1]:8000", "::1", 8000),
    ],
)
def test_the_server_is_on_the_span(
    collected: Collected, base_url: str, address: str, port: int
) -> None:
    """A port that the URL does not name is that of its scheme."""
    observer = collected.observer()
    observer(ExecutionStarted(787, StartRequest("w"), False, 0.1, base_url=base_url))
    (span,) = collected.spans("start")
    attributes = span.attributes or {}
    assert (attributes["server.address"], attributes["server.port"]) == (address, port)


async def test_an_outage_is_one_event_however_many_attempts_fail(
    collected: Collected, observed: Session, sim: Simulator, held: int
) -> None:
    """The next event is the poll that ends the outage, even if no status changed."""
    waiting = asyncio.create_task(observed.execution(held).wait())
    await sim.wait_for_requests(1)
    sim.inject(Fault.status(503, times=3))
    seen = sim.request_count
    await sim.wait_for_requests(seen + 6)
    sim.finish(held, "Answer")
    await waiting
    (span,) = collected.spans("watch")
    events = span_events(span)
    assert [name for name, _ in events] == [
        "promptlayer_exec.poll",
        "promptlayer_exec.outage",
        "promptlayer_exec.poll",
        "promptlayer_exec.poll",
    ]
    assert events[1][1] == {"error.type": "promptlayer_exec.ServerError"}
    assert events[2][1]["promptlayer_exec.changes"] == ()
    assert collected.totals()["promptlayer_exec.retries"] == 3


async def test_retries_outside_of_a_watch_are_on_no_span(
    collected: Collected,
    open_session: Callable[..., Session],
    recorder: Any,
    sim: Simulator,
    held: int,
) -> None:
    """The metric counts those of a single request for an execution that is being watched."""
    observers = [collected.observer(), recorder]
    session = open_session(observers=observers, poll=PollPolicy.fixed(3600))
    waiting = asyncio.create_task(session.execution(held).wait())
    await recorder.next(Polled)
    sim.inject(Fault.status(503, times=2))
    await session.execution(held).snapshot()
    assert collected.totals()["promptlayer_exec.retries"] == 2
    waiting.cancel()
    await recorder.next(WatchEnded)
    (span,) = collected.spans("watch")
    assert [name for name, _ in span_events(span)] == ["promptlayer_exec.poll"]


async def test_closing_the_session_ends_the_spans(
    collected: Collected, observed: Session, recorder: Any, sim: Simulator
) -> None:
    """Their status is an error, except for a watch whose last follower cancelled."""
    ids = [sim.add_execution(Scenario([SimNode("Out", duration=None)])) for _ in range(3)]
    waits = [asyncio.create_task(observed.execution(id_).wait()) for id_ in ids]
    await sim.wait_for_requests(3)
    assert collected.totals()["promptlayer_exec.active_watches"] == 3
    waits[0].cancel()
    await asyncio.wait(waits[:1])
    await observed.aclose()
    outcomes = await asyncio.gather(*waits, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes[1:]] == [SessionClosed, SessionClosed]
    spans = collected.spans("watch")
    assert {
        (span.attributes or {})["promptlayer_exec.execution.id"]: span.status.status_code
        for span in spans
    } == {ids[0]: StatusCode.UNSET, ids[1]: StatusCode.ERROR, ids[2]: StatusCode.ERROR}


async def test_what_woke_a_watch_is_on_its_span(
    collected: Collected, observed: Session, sim: Simulator, held: int
) -> None:
    """The event comes before the poll that it led to; the metric counts by source."""
    observed.wake(held)
    sim.finish(held, "Answer")
    await observed.execution(held).wait()
    (span,) = collected.spans("watch")
    wake_up, poll = span_events(span)
    assert wake_up == ("promptlayer_exec.wake_up", {"promptlayer_exec.source": "caller"})
    assert poll[0] == "promptlayer_exec.poll"
    (point,) = collected.metrics()["promptlayer_exec.wake_ups"].data.data_points
    assert (point.value, point.attributes) == (1, {"promptlayer_exec.source": "caller"})


async def test_a_start_is_a_child_of_its_caller_s_span(
    collected: Collected, observed: Session, recorder: Any, sim: Simulator
) -> None:
    """It lasts from the call to the response; an attribute marks an abandoned start."""
    sim.add_workflow("write/report", Scenario([SimNode("Out")]))
    sim.inject(Fault.delay(0.05, times=2))
    with collected.tracer.start_as_current_span("request") as parent:
        execution = await observed.start("write/report", {"topic": "otters"})
        orphan = asyncio.create_task(observed.start("write/report"))
        await sim.wait_for_requests(2)
    orphan.cancel()
    abandoned = await recorder.next(ExecutionStarted)
    spans = collected.spans("start")
    assert [dict(span.attributes or {}) for span in spans] == [
        {
            **INVOKES,
            **common(sim, "start", "write/report"),
            "promptlayer_exec.execution.id": id_,
            "promptlayer_exec.abandoned": is_abandoned,
            "promptlayer_exec.recovered": False,
        }
        for id_, is_abandoned in ((execution.id, False), (abandoned.execution_id, True))
    ]
    for span in spans:
        assert span.kind is SpanKind.CLIENT
        assert span.parent is not None
        assert span.parent.span_id == parent.get_span_context().span_id
        assert span.start_time is not None
        assert span.end_time is not None
        assert 0.05 <= (span.end_time - span.start_time) / 1e9 < 5
    assert collected.totals()["promptlayer_exec.start.duration"] == 2


async def test_a_recovered_start_has_a_span_but_no_response_time(collected: Collected) -> None:
    """It ends with the callback, long after any response could have come."""
    observer = collected.observer()
    observer(ExecutionStarted(787, StartRequest("report"), False, 600.0, recovered=True))
    (span,) = collected.spans("start")
    assert (span.attributes or {})["promptlayer_exec.recovered"] is True
    assert "promptlayer_exec.start.duration" not in collected.totals()


async def test_values_are_recorded_only_on_request(
    collected: Collected, open_session: Callable[..., Session], sim: Simulator
) -> None:
    """Values are inputs, outputs, and the body of a response of invalid shape."""
    sim.add_workflow("w", Scenario([SimNode("Out", {"x": "secret-output"}, is_output_node=True)]))
    for record_values in (False, True):
        collected = Collected()
        session = open_session(observers=[collected.observer(record_values=record_values)])
        execution = await session.start("w", {"topic": "secret-input"})
        await execution.wait()
        sim.inject(Fault.malformed(body=b'{"Out": "secret-body"}'))
        with pytest.raises(InvalidResponse):
            await session.execution(execution.id).wait()  # the first handle knows how it ended
        (start,) = collected.spans("start")
        watch, broken = collected.spans("watch")
        recorded = [
            "secret-input" in start.to_json(),
            "secret-output" in watch.to_json(),
            "secret-body" in broken.to_json(),
        ]
        assert recorded == [record_values] * 3
        assert "unexpected shape" in (broken.status.description or "")
        assert sim.api_key not in start.to_json() + watch.to_json() + broken.to_json()
    assert json.loads(str((start.attributes or {})["promptlayer_exec.inputs"])) == {
        "topic": "secret-input"
    }
    assert json.loads(str((watch.attributes or {})["promptlayer_exec.outputs"])) == {
        "Out": {"x": "secret-output"}
    }


async def test_metrics_follow_the_conventions_and_have_no_execution_id(
    collected: Collected, observed: Session, recorder: Any, sim: Simulator
) -> None:
    """Each has a unit; they have the error's type, the workflow and what woke a watch."""
    sim.add_workflow("w", Scenario([SimNode("Out")]))
    sim.inject(Fault.status(429, times=1, retry_after=0.01))
    execution = await observed.start("w")
    observed.wake(execution.id)
    await execution.wait()
    metrics = collected.metrics()
    assert {
        name: (metric.unit, type(metric.data).__name__) for name, metric in metrics.items()
    } == {
        "promptlayer_exec.active_watches": ("{watch}", "Sum"),
        "promptlayer_exec.polls": ("{poll}", "Sum"),
        "promptlayer_exec.retries": ("{retry}", "Sum"),
        "promptlayer_exec.throttles": ("{throttle}", "Sum"),
        "promptlayer_exec.wake_ups": ("{wake_up}", "Sum"),
        "promptlayer_exec.poll.duration": ("s", "Histogram"),
        "promptlayer_exec.poll.lateness": ("s", "Histogram"),
        "promptlayer_exec.watch.duration": ("s", "Histogram"),
        "promptlayer_exec.start.duration": ("s", "Histogram"),
    }
    monotonic = {name for name, it in metrics.items() if getattr(it.data, "is_monotonic", False)}
    assert monotonic == {f"promptlayer_exec.{name}" for name in COUNTERS}
    points = [point for metric in metrics.values() for point in metric.data.data_points]
    assert {key for point in points for key in point.attributes} == {
        "error.type",
        "gen_ai.agent.name",
        "promptlayer_exec.source",
    }
    polls = len(recorder.of(Polled))
    assert collected.totals() == {
        "promptlayer_exec.active_watches": 0,
        "promptlayer_exec.polls": polls,
        "promptlayer_exec.retries": 1,
        "promptlayer_exec.throttles": 1,
        "promptlayer_exec.wake_ups": 1,
        "promptlayer_exec.poll.duration": polls,
        "promptlayer_exec.poll.lateness": polls,
        "promptlayer_exec.watch.duration": 1,
        "promptlayer_exec.start.duration": 1,
    }
    (lateness,) = metrics["promptlayer_exec.poll.lateness"].data.data_points
    assert lateness.sum == pytest.approx(sum(event.lateness for event in recorder.of(Polled)))
    assert lateness.explicit_bounds[0] < 0.01  # seconds, not milliseconds
