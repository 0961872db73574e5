"""An execution under way: the state of its nodes as a function of time, without a task or timer."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from attrs import define, evolve, field, frozen

from ._scenario import Scenario, SimNode, encode

SUCCESS = "SUCCESS"
SKIPPED = "SKIPPED"
FAILED = frozenset({"FAILED", "FAILURE"})
FINAL = FAILED | {SUCCESS, SKIPPED}

_BOOLEAN = {True: "true", False: "false", None: "null"}
_encode_word = lru_cache(maxsize=4096)(encode)


@frozen
class NodeState:
    """A node's status since the moment `at`, and what goes with it; `ends` is when it will end."""

    status: str
    at: float
    value: Any = None
    value_json: str = "null"
    error_message: str | None = None
    raw_error_message: Any = None
    ends: float | None = None

    @property
    def final(self) -> bool:
        return self.status in FINAL


@define
class Execution:
    """One execution of a scenario, begun at `started`; every time is a reading of one clock."""

    scenario: Scenario
    started: float
    _final: dict[str, NodeState] = field(factory=dict, init=False)
    _told: dict[str, tuple[float, SimNode]] = field(factory=dict, init=False)
    _admitted: frozenset[str] = field(default=frozenset(), init=False)

    def states(self, now: float) -> dict[str, NodeState]:
        """Return the state of every node at `now`, in the scenario's order.

        What is final is remembered, so `now` must not run backwards.
        """
        states = dict(self._final)
        for node in self.scenario.order:
            if node.name not in states:
                state = self._state(node, states, now)
                if state.final:
                    self._final[node.name] = state
                states[node.name] = state
        return {node.name: states[node.name] for node in self.scenario.nodes}

    def finish(
        self,
        name: str,
        now: float,
        *,
        value: Any,
        status: str,
        error_message: str | None,
        raw_error_message: Any,
    ) -> None:
        """End a held node at `now`, or as soon as it starts; see `Simulator.finish`."""
        node = next((node for node in self.scenario.nodes if node.name == name), None)
        if node is None:
            raise LookupError(f"the execution has no node {name!r}")
        if node.duration is not None:
            raise ValueError(f"node {name!r} ends by itself: only duration=None is held")
        state = self.states(now)[name]
        if state.final:
            raise ValueError(f"node {name!r} is final already: {state.status}")
        told = evolve(
            node,
            value=node.value if value is ... else value,
            status=status,
            error_message=node.error_message if error_message is None else error_message,
            raw_error_message=(
                node.raw_error_message if raw_error_message is None else raw_error_message
            ),
        )
        self._told[name] = (now, told)

    def _state(self, node: SimNode, states: Mapping[str, NodeState], now: float) -> NodeState:
        dependencies = [states[name] for name in node.after]
        if not all(dependency.final for dependency in dependencies):
            return NodeState("QUEUED", self.started)
        ready = max((dependency.at for dependency in dependencies), default=self.started)
        if self._skipped(node, dependencies):
            return NodeState(SKIPPED, ready)
        if node.duration is not None:
            end, ended = ready + node.duration, node
        elif node.name in self._told:
            told_at, ended = self._told[node.name]
            end = max(ready, told_at)
        else:
            return NodeState("RUNNING", ready)
        if now < end:
            return NodeState("RUNNING", ready, ends=end)
        return self._ended(ended, end)

    def _skipped(self, node: SimNode, dependencies: list[NodeState]) -> bool:
        if any(dependency.status in FAILED for dependency in dependencies):
            return True
        if dependencies and all(dependency.status == SKIPPED for dependency in dependencies):
            return True
        if node.when is None or node.name in self._admitted:
            return False
        if not node.when(self._values(node)):
            return True
        self._admitted |= {node.name}
        return False

    def _ended(self, node: SimNode, end: float) -> NodeState:
        if node.status == SUCCESS:
            if node.value_json is not None:
                return NodeState(SUCCESS, end, node.value, node.value_json)
            value = node.value(self._values(node))
            return NodeState(SUCCESS, end, value, encode(value))
        if node.status in FAILED:
            return NodeState(
                node.status,
                end,
                error_message=node.error_message,
                raw_error_message=node.raw_error_message,
            )
        return NodeState(node.status, end)

    def _values(self, node: SimNode) -> dict[str, Any]:
        return {name: self._final[name].value for name in self.scenario.upstream[node.name]}


def is_complete(states: Mapping[str, NodeState]) -> bool:
    """Tell whether every node is final."""
    return all(state.final for state in states.values())


def node_map(scenario: Scenario, states: Mapping[str, NodeState]) -> str:
    """Write the node map as JSON text."""
    return "{" + ",".join(_node_json(node, states[node.name]) for node in scenario.nodes) + "}"


def main_output(scenario: Scenario, states: Mapping[str, NodeState]) -> str | None:
    """Write the main output as JSON text: None if there is none.

    It is the value of the output node that succeeded first. With no node marked as output, it is
    the value of the node that succeeded last.
    """
    succeeded = [node for node in scenario.nodes if states[node.name].status == SUCCESS]
    outputs = [node for node in succeeded if node.is_output_node]
    if outputs:
        first = min(outputs, key=lambda node: states[node.name].at)
        return states[first.name].value_json
    if succeeded and not any(node.is_output_node for node in scenario.nodes):
        last = max(reversed(succeeded), key=lambda node: states[node.name].at)
        return states[last.name].value_json
    return None


def _node_json(node: SimNode, state: NodeState) -> str:
    return (
        f'{_encode_word(node.name)}:{{"status":{_encode_word(state.status)}'
        f',"value":{state.value_json}'
        f',"error_message":{encode(state.error_message)}'
        f',"raw_error_message":{encode(state.raw_error_message)}'
        f',"is_output_node":{_BOOLEAN[node.is_output_node]}}}'
    )
