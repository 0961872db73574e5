"""What an execution will do: nodes, the order they depend on each other in, and how they end."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeAlias

from attrs import Attribute, Factory, field, frozen

Values: TypeAlias = Mapping[str, Any]

_ENCODER = json.JSONEncoder(separators=(",", ":"))


def encode(value: object) -> str:
    """Write a value as the server does: compact ASCII JSON, in which `NaN` may appear."""
    return _ENCODER.encode(value)


def _names(after: Iterable[str]) -> tuple[str, ...]:
    if isinstance(after, str):
        raise TypeError(f"after takes several names: write after=({after!r},)")
    return tuple(after)


def _check_duration(node: "SimNode", _: "Attribute[Any]", value: float | None) -> None:
    if value is not None and not (0 <= value < math.inf):
        raise ValueError(
            f"node {node.name!r}: duration must be finite and at least 0, not {value!r}"
        )


def _encode_value(node: "SimNode") -> str | None:
    if callable(node.value):
        return None
    try:
        return encode(node.value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"node {node.name!r}: its value is not JSON: {error}") from error


@frozen
class SimNode:
    """One node of a simulated execution.

    Args:
        name: Its name, unique within the scenario.
        value: Its output once it succeeded: anything JSON can carry, or a function of `Values`
            that returns such a thing.
        duration: Seconds from RUNNING to its end; None holds it RUNNING until
            `Simulator.finish`.
        after: Names of the nodes that must be final before it starts; it is QUEUED until then.
            It is SKIPPED if one of them failed or all of them were skipped.
        status: The status it ends with. One that is not `SUCCESS`, `FAILED`, `FAILURE` or
            `SKIPPED` leaves the execution, and every node that depends on this one, unfinished.
        error_message: Shown once it failed.
        raw_error_message: Shown once it failed; any JSON.
        is_output_node: Whether it is marked as an output node; None is sent as null.
        when: A predicate over `Values`, asked once when the node could start; a false answer
            skips it.

    `Values` maps the names of the nodes it depends on, directly or not, to their values; to None
    where they did not succeed.

    Raises:
        TypeError, ValueError: An argument has the wrong kind, or its value is not JSON.
    """

    name: str
    value: Any = None
    duration: float | None = field(default=0.0, validator=_check_duration)
    after: tuple[str, ...] = field(default=(), converter=_names)
    status: str = "SUCCESS"
    error_message: str | None = None
    raw_error_message: Any = None
    is_output_node: bool | None = False
    when: Callable[[Values], object] | None = None
    value_json: str | None = field(
        default=Factory(_encode_value, takes_self=True), init=False, repr=False, eq=False
    )


def _in_order(scenario: "Scenario") -> tuple[SimNode, ...]:
    by_name = {node.name: node for node in scenario.nodes}
    sorter = TopologicalSorter({node.name: node.after for node in scenario.nodes})
    try:
        return tuple(by_name[name] for name in sorter.static_order())
    except CycleError as error:
        circle = " -> ".join(map(repr, error.args[1]))
        raise ValueError(f"nodes wait for each other in a circle: {circle}") from None


def _upstream(scenario: "Scenario") -> dict[str, tuple[str, ...]]:
    """Name everything that a node with a function of `Values` depends on, directly or not."""
    after = {node.name: node.after for node in scenario.nodes}
    upstream = {}
    for node in scenario.nodes:
        if node.when is not None or callable(node.value):
            found: set[str] = set()
            waiting = list(node.after)
            while waiting:
                name = waiting.pop()
                if name not in found:
                    found.add(name)
                    waiting.extend(after[name])
            upstream[node.name] = tuple(name for name in after if name in found)
    return upstream


def _check_names(_: "Scenario", __: "Attribute[Any]", nodes: tuple[SimNode, ...]) -> None:
    names: set[str] = set()
    for node in nodes:
        if node.name in names:
            raise ValueError(f"two nodes are named {node.name!r}")
        names.add(node.name)
    for node in nodes:
        for name in node.after:
            if name not in names:
                raise ValueError(f"node {node.name!r} comes after {name!r}, which is no node")


@frozen
class Scenario:
    """The nodes of an execution, in the order in which the server lists them.

    Args:
        nodes: The nodes; there may be none.

    Raises:
        ValueError: Two nodes share a name, a node comes after an unknown one, or nodes wait for
            each other in a circle.
    """

    nodes: tuple[SimNode, ...] = field(converter=tuple[SimNode, ...], validator=_check_names)
    order: tuple[SimNode, ...] = field(init=False, repr=False, eq=False)
    upstream: dict[str, tuple[str, ...]] = field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "order", _in_order(self))
        object.__setattr__(self, "upstream", _upstream(self))
