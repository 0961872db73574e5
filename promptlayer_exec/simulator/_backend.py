"""The workflows and executions that a simulated PromptLayer keeps; safe to use from any thread."""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from attrs import field, frozen

from ._execution import Execution, NodeState, is_complete, main_output, node_map
from ._scenario import Scenario

ScenarioSource: TypeAlias = Scenario | Callable[[Mapping[str, Any]], Scenario]


@frozen
class SimRun:
    """One execution that a `POST /workflows/{name}/run` started.

    Attributes:
        execution_id: The id it was given.
        workflow: The name of its workflow.
        inputs: Its input variables.
        body: The whole request body: label or version, metadata, callback URL.
    """

    execution_id: int
    workflow: str
    inputs: Mapping[str, Any]
    body: Mapping[str, Any]


@frozen
class Workflow:
    """A workflow that can be run."""

    id: int
    name: str
    source: ScenarioSource
    warning: str | None

    def scenario(self, inputs: Mapping[str, Any]) -> Scenario:
        return self.source if isinstance(self.source, Scenario) else self.source(inputs)


@frozen
class Results:
    """The state of an execution at one moment."""

    scenario: Scenario
    states: Mapping[str, NodeState]
    at: float

    @property
    def complete(self) -> bool:
        return is_complete(self.states)

    @property
    def seconds_to_change(self) -> float | None:
        """How soon the next node ends; None if none does by itself."""
        ends = [state.ends - self.at for state in self.states.values() if state.ends is not None]
        return min(ends, default=None)

    def json(self, *, all_outputs: bool) -> str:
        """Write the body of the results operation."""
        main = None
        if self.complete and not all_outputs:
            main = main_output(self.scenario, self.states)
        return node_map(self.scenario, self.states) if main is None else main


@frozen
class Backend:
    """Workflows by name and id, executions by id, and the runs that were started.

    Args:
        clock: Returns the time in seconds; it must not run backwards.
    """

    _clock: Callable[[], float]
    _workflows: dict[str, Workflow] = field(factory=dict, init=False)
    _executions: dict[int, Execution] = field(factory=dict, init=False)
    _runs: list[SimRun] = field(factory=list, init=False)
    _wakers: dict[int, Callable[[], object]] = field(factory=dict, init=False)
    # Reentrant, because a scenario's functions may look at the simulator that asks them.
    _lock: threading.RLock = field(factory=threading.RLock, init=False)
    _workflow_ids: Iterator[int] = field(factory=lambda: itertools.count(1), init=False)
    # Far from the workflow ids, so that a mix-up of the two is a 404.
    _execution_ids: Iterator[int] = field(factory=lambda: itertools.count(1001), init=False)

    @property
    def execution_ids(self) -> list[int]:
        with self._lock:
            return list(self._executions)

    @property
    def runs(self) -> list[SimRun]:
        with self._lock:
            return list(self._runs)

    def add_execution(self, scenario: Scenario, execution_id: int | None = None) -> int:
        with self._lock:
            if execution_id is None:
                execution_id = next(i for i in self._execution_ids if i not in self._executions)
            elif not 0 < execution_id < 2**63:
                raise ValueError(f"an execution id lies in 1 ... 2**63-1, not {execution_id}")
            elif execution_id in self._executions:
                raise ValueError(f"execution {execution_id} exists already")
            self._executions[execution_id] = Execution(scenario, self._clock())
            return execution_id

    def add_workflow(self, name: str, source: ScenarioSource, warning: str | None) -> int:
        with self._lock:
            if name in self._workflows:
                raise ValueError(f"workflow {name!r} exists already")
            workflow = Workflow(next(self._workflow_ids), name, source, warning)
            self._workflows[name] = workflow
            return workflow.id

    def find_workflow(self, id_or_name: str) -> Workflow | None:
        with self._lock:
            if id_or_name in self._workflows:
                return self._workflows[id_or_name]
            return next((w for w in self._workflows.values() if str(w.id) == id_or_name), None)

    def run(self, workflow: Workflow, body: Mapping[str, Any]) -> int:
        inputs = body.get("input_variables", {})
        scenario = workflow.scenario(inputs)
        with self._lock:
            execution_id = self.add_execution(scenario)
            self._runs.append(SimRun(execution_id, workflow.name, inputs, body))
            return execution_id

    def results(self, execution_id: int) -> Results:
        """Look at an execution; `LookupError` if there is none."""
        with self._lock:
            execution = self._execution(execution_id)
            now = self._clock()
            results = Results(execution.scenario, execution.states(now), now)
            if results.complete:
                self._wake(execution_id)
            return results

    def finish(self, execution_id: int, node: str, **ending: Any) -> None:
        with self._lock:
            self._execution(execution_id).finish(node, self._clock(), **ending)
            self._wake(execution_id)

    @contextmanager
    def waking(self, execution_id: int, wake: Callable[[], object]) -> Iterator[None]:
        """Call `wake`, in any thread, when a node is finished or the execution seen complete."""
        with self._lock:
            self._wakers[execution_id] = wake
        try:
            yield
        finally:
            with self._lock:
                del self._wakers[execution_id]

    def _wake(self, execution_id: int) -> None:
        if execution_id in self._wakers:
            self._wakers[execution_id]()

    def _execution(self, execution_id: int) -> Execution:
        try:
            return self._executions[execution_id]
        except KeyError:
            raise LookupError(f"there is no execution {execution_id}") from None
