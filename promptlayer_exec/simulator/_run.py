"""An execution in progress: its nodes' states as a function of time, with no task or timer."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import attrs

from promptlayer_exec.simulator._scenario import Scenario, SimNode
from promptlayer_exec.simulator._wire import encode

SUCCESS = "SUCCESS"
SKIPPED = "SKIPPED"
FAILED = frozenset({"FAILED", "FAILURE"})
FINAL = FAILED | {SUCCESS, SKIPPED}


@attrs.frozen
class NodeState:
    """A node's status since the time `at`, and its value.

    A running node that finishes by itself does so at the time `ends`.
    """

    node: SimNode
    status: str
    at: float
    value: Any = None
    value_json: str = "null"
    ends: float | None = None

    @property
    def final(self) -> bool:
        return self.status in FINAL


@attrs.frozen
class Results:
    """The states of an execution's nodes at the time `at`, in the scenario's order.

    `no_output_status` is that of the scenario.
    """

    states: Mapping[str, NodeState]
    at: float
    no_output_status: int | None = None

    @property
    def complete(self) -> bool:
        return all(state.final for state in self.states.values())

    @property
    def seconds_to_change(self) -> float | None:
        """Seconds until the next node finishes by itself, or None if none does."""
        ends = [state.ends - self.at for state in self.states.values() if state.ends is not None]
        return min(ends, default=None)

    def response(self, *, all_outputs: bool) -> tuple[int, str]:
        """Return the status and the body of the results operation."""
        if not self.complete:
            return 202, self.node_map()

        status = self.no_output_status
        if status in (400, 500) and not self._marked():
            message = encode("No output node found for this workflow")
            nodes = self.node_map()
            return status, f'{{"success":false,"message":{message},"output":{nodes}}}'
        return 200, self.json(all_outputs=all_outputs)

    def json(self, *, all_outputs: bool) -> str:
        """Return what the messages about a complete run contain."""
        if self.complete and not all_outputs:
            main = self.main_output()
            if main is not None:
                return main
        return self.node_map()

    def node_map(self) -> str:
        nodes = []
        for name, state in self.states.items():
            node = state.node
            message = raw_message = None
            if state.status in FAILED:
                message, raw_message = node.error_message, node.raw_error_message

            # By hand, because the value is already encoded.
            nodes.append(
                f'{encode(name)}:{{"status":{encode(state.status)}'
                f',"value":{state.value_json}'
                f',"error_message":{encode(message)}'
                f',"raw_error_message":{encode(raw_message)}'
                f',"is_output_node":{encode(node.is_output_node)}}}'
            )

        return "{" + ",".join(nodes) + "}"

    def main_output(self) -> str | None:
        """Return the main output as JSON text, or None if there is none.

        It is the value of the output node that succeeded first. If no node is marked as output, it
        is the value of the node that succeeded last, unless the scenario has a `no_output_status`.
        """
        marked = self._marked()
        if not marked and self.no_output_status is not None:
            return None
        candidates = [state for state in marked or self.states.values() if state.status == SUCCESS]
        if not candidates:
            return None

        time = attrgetter("at")
        if marked:
            return min(candidates, key=time).value_json
        return max(reversed(candidates), key=time).value_json

    def _marked(self) -> list[NodeState]:
        return [state for state in self.states.values() if state.node.is_output_node]


@attrs.define
class SimulatedRun:
    """One execution of a scenario, started at the time `started`. All times are of one clock."""

    scenario: Scenario
    started: float
    _final: dict[str, NodeState] = attrs.field(factory=dict, init=False)
    _finished: dict[str, tuple[float, SimNode]] = attrs.field(factory=dict, init=False)
    _not_skipped: set[str] = attrs.field(factory=set, init=False)

    def results(self, now: float) -> Results:
        """Return the states at `now`, which must not run backwards: final states are kept."""
        states = dict(self._final)
        for node in self.scenario.order:
            if node.name not in states:
                state = self._state(node, states, now)
                if state.final:
                    self._final[node.name] = state
                states[node.name] = state

        ordered = {node.name: states[node.name] for node in self.scenario.nodes}
        return Results(ordered, now, self.scenario.no_output_status)

    def finish(self, name: str, now: float, **ending: Any) -> None:
        """Finish a held node at `now` or when it starts. `ending` replaces fields of its node."""
        node = next((node for node in self.scenario.nodes if node.name == name), None)
        if node is None:
            names = ", ".join(repr(node.name) for node in self.scenario.nodes)
            raise LookupError(f"the execution has no node {name!r}. Its nodes are: {names}")
        if node.duration is not None:
            raise ValueError(
                f"node {name!r} finishes by itself: you can finish only one with duration=None"
            )

        state = self.results(now).states[name]
        if state.final:
            raise ValueError(f"node {name!r} is already final: {state.status}")
        self._finished[name] = (now, attrs.evolve(node, **ending))

    def _state(self, node: SimNode, states: Mapping[str, NodeState], now: float) -> NodeState:
        dependencies = [states[name] for name in node.after]
        if not all(dependency.final for dependency in dependencies):
            return NodeState(node, "QUEUED", self.started)

        ready = max((dependency.at for dependency in dependencies), default=self.started)
        if self._is_skipped(node, dependencies):
            return NodeState(node, SKIPPED, ready)

        if node.duration is not None:
            end, ended = ready + node.duration, node
        elif node.name in self._finished:
            finished_at, ended = self._finished[node.name]
            end = max(ready, finished_at)
        else:
            return NodeState(node, "RUNNING", ready)

        if now < end:
            return NodeState(node, "RUNNING", ready, ends=end)
        return self._ended(ended, end)

    def _is_skipped(self, node: SimNode, dependencies: list[NodeState]) -> bool:
        statuses = {dependency.status for dependency in dependencies}
        if statuses & FAILED or statuses == {SKIPPED}:
            return True
        if node.when is None or node.name in self._not_skipped:
            return False
        if not node.when(self._values(node)):
            return True
        self._not_skipped.add(node.name)
        return False

    def _ended(self, node: SimNode, end: float) -> NodeState:
        if node.status != SUCCESS:
            return NodeState(node, node.status, end)

        value = node.value
        if callable(value):
            value = value(self._values(node))
        return NodeState(node, SUCCESS, end, value, node.value_json or encode(value))

    def _values(self, node: SimNode) -> dict[str, Any]:
        return {name: self._final[name].value for name in self.scenario.upstream[node.name]}
