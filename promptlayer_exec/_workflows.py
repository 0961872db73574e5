"""Workflows as the server describes them, as frozen values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

import attrs

from promptlayer_exec import _structuring
from promptlayer_exec._display import workflow_html
from promptlayer_exec._errors import InvalidInputs
from promptlayer_exec._models import FrozenMap, frozen_map
from promptlayer_exec._text import printable

_MOST_NAMED = 20  # unknown inputs in an error
_MOST_COMPARED = 200  # names; a definition may have any number, of any length
_LONGEST_COMPARED = 50  # characters


@attrs.frozen
class WorkflowNode:
    """One node of a workflow.

    Its type is an open string, such as `PROMPT_TEMPLATE`; it is empty if the server does not say.
    The dependencies are names of other nodes, by the node's definition or by an edge.
    """

    name: str
    node_type: str = ""
    is_output_node: bool = False
    dependencies: tuple[str, ...] = ()


@attrs.frozen
class WorkflowEdge:
    """A connection between two nodes, by their names; a conditional one may not be followed."""

    source: str
    target: str
    conditional: bool = False


@attrs.frozen
class WorkflowSummary:
    """One workflow in the list of workflows, with the release labels of its versions.

    https://docs.promptlayer.com/reference/list-workflows
    """

    id: int
    name: str
    labels: tuple[str, ...] = ()
    latest_version: int | None = None
    is_deleted: bool = False


@attrs.frozen(repr=False)
class Workflow:
    """One version of a workflow: the inputs that it requires, its nodes and their connections.

    https://docs.promptlayer.com/reference/get-workflow

    Attributes:
        id: the workflow's id.
        name: the workflow's name.
        version: the number of this version; None if the server does not say.
        labels: the release labels of this version.
        required_inputs: the type of each required input variable by its name, such as
            `{"topic": "string"}`; None if the server does not say. Types are open strings.
        nodes: the nodes by name, in the server's order; read-only. Empty if the server sent none.
        edges: the connections, as the server sent them.
        raw: the decoded body, with all other fields. It is shared: do not change it.
    """

    id: int
    name: str
    version: int | None = None
    labels: tuple[str, ...] = ()
    required_inputs: Mapping[str, str] | None = attrs.field(
        default=None, converter=attrs.converters.optional(frozen_map)
    )
    nodes: Mapping[str, WorkflowNode] = attrs.field(factory=FrozenMap, converter=frozen_map)
    edges: tuple[WorkflowEdge, ...] = ()
    raw: Any = None

    def layers(self) -> tuple[tuple[str, ...], ...]:
        """Return the names of the nodes in layers: each node comes after all that it depends on.

        Within a layer, they are in the server's order. Nodes that depend on each other in a cycle,
        and those after them, are one last layer.
        """
        from graphlib import CycleError, TopologicalSorter  # noqa: PLC0415 - rarely needed

        position = {name: index for index, name in enumerate(self.nodes)}
        graph = {
            name: [it for it in node.dependencies if it in position]
            for name, node in self.nodes.items()
        }
        for edge in self.edges:
            if edge.source in position and edge.target in position:
                graph[edge.target].append(edge.source)
        sorter = TopologicalSorter(graph)
        with suppress(CycleError):  # it can be used up to the cycle all the same
            sorter.prepare()
        layers = []
        while ready := sorter.get_ready():
            layers.append(tuple(sorted(ready, key=position.__getitem__)))
            sorter.done(*ready)
        sorted_names = {name for layer in layers for name in layer}
        rest = tuple(name for name in self.nodes if name not in sorted_names)
        return (*layers, rest) if rest else tuple(layers)

    def check_inputs(self, inputs: Any) -> None:
        """Check that all required inputs are there; others are allowed, and types are not checked.

        Args:
            inputs: as for `Session.start`.

        Raises:
            InvalidInputs: some are missing. The message names all of them, and suggests those that
                may be misspelt: `it does not require topik (did you mean 'topic'?)`.
            TypeError: `inputs` is of another type.
        """
        if not self.required_inputs:
            return
        given = _names({} if inputs is None else inputs)
        missing = {name: kind for name, kind in self.required_inputs.items() if name not in given}
        if missing:
            named = ", ".join(f"{name!r} ({kind})" for name, kind in missing.items())
            s, are = ("s", "are") if len(missing) > 1 else ("", "is")
            what = f"workflow {self.name!r:.100} needs the input{s} {named}, which {are} missing"
            if unknown := sorted(given - self.required_inputs.keys()):
                more = f" and {len(unknown) - _MOST_NAMED} more" * (len(unknown) > _MOST_NAMED)
                guesses = ", ".join(_guesses(unknown[:_MOST_NAMED], missing))
                what += f"; it does not require {guesses}{more}"
            raise InvalidInputs(printable(what), missing=tuple(missing))

    def _repr_html_(self) -> str:
        """Return the required inputs and the graph, for notebooks."""
        return workflow_html(self)

    def __repr__(self) -> str:
        version = "" if self.version is None else f" version {self.version}"
        return f"<Workflow {self.id} {self.name!r:.100}{version}, {len(self.nodes)} nodes>"


def _names(inputs: Any) -> set[str]:
    if isinstance(inputs, Mapping):
        return {name for name in inputs if isinstance(name, str)}
    return set(_structuring.encode_inputs(inputs))


def _guesses(given: Iterable[str], missing: Iterable[str]) -> list[str]:
    """Return each given name, and the missing one that it resembles, if any."""
    found = [(name, near(name, missing, 1)) for name in given]
    found.sort(key=lambda it: not it[1])  # those that were probably meant come first
    return [
        f"{name:.100} (did you mean {likely[0]!r:.100}?)" if likely else f"{name:.100}"
        for name, likely in found
    ]


def near(name: str, known: Iterable[str], most: int) -> list[str]:
    """Return the names that this one resembles in their beginnings, of the first 200."""
    from difflib import get_close_matches  # noqa: PLC0415 - rarely needed

    folded = {it[:_LONGEST_COMPARED].casefold(): it for it in islice(known, _MOST_COMPARED)}
    close = get_close_matches(name[:_LONGEST_COMPARED].casefold(), folded, n=most)
    return [folded[it] for it in close]
