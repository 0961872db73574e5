"""What an execution does: its nodes, how they depend on each other, and how they finish."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any, TypeAlias

import attrs

from promptlayer_exec.simulator._wire import encode

Values: TypeAlias = Mapping[str, Any]


def _names(after: Iterable[str]) -> tuple[str, ...]:
    if isinstance(after, str):
        raise TypeError(f"after takes several names: write after=({after!r},)")
    return tuple(after)


def _check_duration(node: SimNode, _: attrs.Attribute[Any], value: float | None) -> None:
    if value is not None and not (0 <= value < math.inf):
        raise ValueError(
            f"node {node.name!r}: duration must be finite and at least 0, got {value!r}"
        )


@attrs.frozen
class SimNode:
    """One node of a simulated execution.

    Below, `Values` maps the names of all nodes that this one depends on, directly or indirectly, to
    their values. The value of a node that did not succeed is None.

    Args:
        name: its name, unique within the scenario.
        value: its output when it succeeds: any JSON value, or a function of `Values` that returns
            one.
        duration: how many seconds it is RUNNING. None keeps it so until `Simulator.finish`.
        after: names of the nodes that must be final before it starts. Until then it is QUEUED. It
            becomes SKIPPED if one of them failed or all of them are SKIPPED.
        status: its last status. Any other than `SUCCESS`, `FAILED`, `FAILURE` and `SKIPPED` is not
            final: the execution never finishes, nor does any node that depends on this one.
        error_message: its error message if it fails. PromptLayer documents a string, and may send
            any JSON value.
        raw_error_message: its raw error if it fails, any JSON value.
        is_output_node: whether it is an output node. None becomes null.
        when: a predicate over `Values`, called once when the node could start. If it returns false,
            the node becomes SKIPPED.
        node_type: its kind in the description of its workflow.

    Raises:
        TypeError: an argument has the wrong type, or the value is not JSON.
        ValueError: the duration is negative or not finite, or the value is not JSON.
    """

    name: str
    value: Any = None
    duration: float | None = attrs.field(default=0.0, validator=_check_duration)
    after: tuple[str, ...] = attrs.field(default=(), converter=_names)
    status: str = "SUCCESS"
    error_message: Any = None
    raw_error_message: Any = None
    is_output_node: bool | None = False
    when: Callable[[Values], object] | None = None
    node_type: str = attrs.field(default="PROMPT_TEMPLATE", kw_only=True)
    value_json: str | None = attrs.field(init=False, repr=False, eq=False)

    @value_json.default
    def _encode_value(self) -> str | None:
        if callable(self.value):
            return None
        try:
            return encode(self.value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"node {self.name!r}: its value is not JSON: {error}") from error


@attrs.frozen
class Scenario:
    """The nodes of an execution, in the order in which the server lists them.

    Args:
        nodes: the nodes. There may be none.
        no_output_status: how the server reports a complete execution if no node is marked as
            output. 200: the main output is the map of all nodes, as PromptLayer documents. 400 or
            500: every request for results gets an error with all nodes in its body, which
            PromptLayer has described as well. None: the node that succeeded last provides the main
            output.

    Raises:
        ValueError: two nodes share a name, a node comes after an unknown one, nodes depend on each
            other in a cycle, or `no_output_status` is another number.
    """

    nodes: tuple[SimNode, ...] = attrs.field(converter=tuple[SimNode, ...])
    no_output_status: int | None = attrs.field(
        default=None, validator=attrs.validators.in_((None, 200, 400, 500)), kw_only=True
    )
    order: tuple[SimNode, ...] = attrs.field(init=False, repr=False, eq=False)
    upstream: dict[str, tuple[str, ...]] = attrs.field(init=False, repr=False, eq=False)

    @order.default
    def _sort(self) -> tuple[SimNode, ...]:
        by_name: dict[str, SimNode] = {}
        for node in self.nodes:
            if node.name in by_name:
                raise ValueError(f"two nodes are named {node.name!r}")
            by_name[node.name] = node

        for node in self.nodes:
            for name in node.after:
                if name not in by_name:
                    raise ValueError(
                        f"node {node.name!r} comes after {name!r}, which is not a node"
                    )

        sorter = TopologicalSorter({node.name: node.after for node in self.nodes})
        try:
            return tuple(by_name[name] for name in sorter.static_order())
        except CycleError as error:
            cycle = " -> ".join(map(repr, error.args[1]))
            raise ValueError(f"nodes depend on each other in a cycle: {cycle}") from None

    @upstream.default
    def _find_upstream(self) -> dict[str, tuple[str, ...]]:
        """Map each node with a function of `Values` to the names of all nodes it depends on."""
        upstream = {}
        for node in self.nodes:
            if node.when is None and not callable(node.value):
                continue

            found = set(node.after)
            for earlier in reversed(self.order):  # each before those that it comes after
                if earlier.name in found:
                    found.update(earlier.after)
            names = (candidate.name for candidate in self.nodes)
            upstream[node.name] = tuple(name for name in names if name in found)

        return upstream
