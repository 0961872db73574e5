"""The workflows and executions of a simulated PromptLayer, which is thread-safe."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import attrs

from promptlayer_exec.simulator._run import Results, SimulatedRun
from promptlayer_exec.simulator._scenario import Scenario
from promptlayer_exec.simulator._workflow_bodies import (
    SimulatedVersion,
    SimulatedWorkflow,
    list_workflows,
)


@attrs.frozen
class SimRun:
    """One execution that a `POST /workflows/{name}/run` started.

    Attributes:
        execution_id: the execution's id.
        workflow: the name of its workflow.
        inputs: its input variables.
        body: the whole request body: label or version, metadata, callback URL.
    """

    execution_id: int
    workflow: str
    inputs: Mapping[str, Any]
    body: Mapping[str, Any]


@attrs.frozen
class Backend:
    """Workflows by name and id, executions by id, and all runs."""

    _clock: Callable[[], float]
    _workflows: dict[str, SimulatedWorkflow] = attrs.field(factory=dict, init=False)
    executions: dict[int, SimulatedRun] = attrs.field(factory=dict, init=False)
    runs: list[SimRun] = attrs.field(factory=list, init=False)
    # Each is called, in any thread, when a node is finished or its execution is read complete.
    wakers: dict[int, Callable[[], object]] = attrs.field(factory=dict, init=False)
    # Reentrant, because a scenario's functions may call the simulator that calls them.
    _lock: threading.RLock = attrs.field(factory=threading.RLock, init=False)
    # Far from the workflow ids, so that confusing the two is a 404.
    _execution_ids: Iterator[int] = attrs.field(factory=lambda: itertools.count(1001), init=False)
    _version_ids: Iterator[int] = attrs.field(factory=lambda: itertools.count(501), init=False)

    def add_execution(self, scenario: Scenario, execution_id: int | None = None) -> int:
        with self._lock:
            if execution_id is None:
                execution_id = next(
                    number for number in self._execution_ids if number not in self.executions
                )
            elif not 0 < execution_id < 2**63:
                raise ValueError(f"execution id must be between 1 and 2**63-1, got {execution_id}")
            elif execution_id in self.executions:
                raise ValueError(f"execution {execution_id} already exists")

            self.executions[execution_id] = SimulatedRun(scenario, self._clock())
            return execution_id

    def add_workflow(
        self, name: str, labels: Iterable[str], external_ids: Mapping[str, str], **version: Any
    ) -> int:
        with self._lock:
            if name in self._workflows:
                raise ValueError(f"workflow {name!r} already exists")

            workflow = SimulatedWorkflow(
                id=len(self._workflows) + 1, name=name, external_ids=external_ids
            )
            workflow.add(labels, id=next(self._version_ids), **version)
            self._workflows[name] = workflow
            return workflow.id

    def add_version(self, name: str | int, labels: Iterable[str], **version: Any) -> int:
        with self._lock:
            workflow = self.find_workflow(str(name))
            if workflow is None:
                raise LookupError(f"there is no workflow {name!r}")
            return workflow.add(labels, id=next(self._version_ids), **version)

    def list_workflows(self, query: Mapping[str, str]) -> dict[str, Any]:
        with self._lock:
            return list_workflows(self._workflows.values(), query)

    def find_workflow(self, id_or_name: str) -> SimulatedWorkflow | None:
        with self._lock:
            if id_or_name in self._workflows:
                return self._workflows[id_or_name]
            for workflow in self._workflows.values():
                if str(workflow.id) == id_or_name:
                    return workflow
            return None

    def run(
        self, workflow: SimulatedWorkflow, version: SimulatedVersion, body: Mapping[str, Any]
    ) -> int:
        inputs = body.get("input_variables", {})
        scenario = version.source
        if not isinstance(scenario, Scenario):
            scenario = scenario(inputs)

        with self._lock:
            execution_id = self.add_execution(scenario)
            self.runs.append(SimRun(execution_id, workflow.name, inputs, body))
            return execution_id

    def results(self, execution_id: int) -> Results:
        """Return the current state of an execution, or raise `LookupError` if it does not exist."""
        with self._lock:
            results = self._find_execution(execution_id).results(self._clock())
            if results.complete:
                self._wake(execution_id)
            return results

    def finish(self, execution_id: int, node: str, **ending: Any) -> None:
        with self._lock:
            self._find_execution(execution_id).finish(node, self._clock(), **ending)
            self._wake(execution_id)

    def _wake(self, execution_id: int) -> None:
        if wake := self.wakers.get(execution_id):
            wake()

    def _find_execution(self, execution_id: int) -> SimulatedRun:
        if execution_id not in self.executions:
            raise LookupError(f"there is no execution {execution_id}")
        return self.executions[execution_id]
