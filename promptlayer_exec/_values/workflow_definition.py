"""Workflows as the server describes them, as frozen values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import attrs

from promptlayer_exec import _structuring
from promptlayer_exec._values.display import workflow_html
from promptlayer_exec._values.errors import InvalidInputs
from promptlayer_exec._values.models import FrozenMap, Snapshot, frozen_map
from promptlayer_exec._values.text import printable


@attrs.frozen
class WorkflowNode:
    """One node of a workflow.

    Attributes:
        name: the node's name.
        node_type: an open string, such as `PROMPT_TEMPLATE`, or empty if the server sent none.
        is_output_node: whether the workflow marks this node as an output.
        dependencies: the names of the nodes that it depends on, from its definition and from edges.
    """

    name: str
    node_type: str = ""
    is_output_node: bool = False
    dependencies: tuple[str, ...] = ()


@attrs.frozen
class WorkflowEdge:
    """A connection between two nodes of a workflow.

    Attributes:
        source: the name of the node that comes first.
        target: the name of the node that depends on it.
        conditional: whether runs may skip the connection.
    """

    source: str
    target: str
    conditional: bool = False


@attrs.frozen
class WorkflowSummary:
    """One entry in the list of workflows.

    https://docs.promptlayer.com/reference/list-workflows

    Attributes:
        id: the workflow's id.
        name: the workflow's name.
        labels: the release labels of its versions.
        latest_version: the number of its latest version, or None if the server sent none.
        is_deleted: whether somebody has deleted the workflow.
    """

    id: int
    name: str
    labels: tuple[str, ...] = ()
    latest_version: int | None = None
    is_deleted: bool = False


@attrs.frozen(repr=False)
class WorkflowDefinition:
    """One version of a workflow: its required inputs, nodes and edges.

    https://docs.promptlayer.com/reference/get-workflow

    Attributes:
        id: the workflow's id.
        name: the workflow's name.
        version: the number of this version, or None if the server sent none.
        labels: the release labels of this version.
        required_inputs: the type of each required input variable by its name, for example
            `{"topic": "string"}`. None if the server sent none. Types are open strings.
        nodes: the nodes by name, in the server's order. Read-only. Empty if the server sent none.
        edges: the connections, as the server sent them.
        raw: the decoded body, including all other fields. Do not change it.
        run: the state of a run, which a notebook draws into the graph. See `with_run`.
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
    run: Snapshot | None = None

    def with_run(self, snapshot: Snapshot) -> WorkflowDefinition:
        """Return the workflow with the state of a run, which a notebook draws into the graph.

        For example::

            workflow = await session.definition("research-report")
            workflow.with_run(await execution.snapshot())

        Args:
            snapshot: the state of a run of this workflow. A node that the run does not have gets no
                status.
        """
        return attrs.evolve(self, run=snapshot)

    def layers(self) -> tuple[tuple[str, ...], ...]:
        """Return the names of the nodes in layers: each node comes after its dependencies.

        Within a layer, they are in the server's order. A cycle, and every node after it, forms the
        last layer.
        """
        from graphlib import CycleError, TopologicalSorter  # noqa: PLC0415 - rarely needed

        position = {name: index for index, name in enumerate(self.nodes)}
        graph = {
            name: [source for source in node.dependencies if source in position]
            for name, node in self.nodes.items()
        }
        for edge in self.edges:
            if edge.source in position and edge.target in position:
                graph[edge.target].append(edge.source)

        sorter = TopologicalSorter(graph)
        with suppress(CycleError):  # the sorter still yields the nodes before the cycle
            sorter.prepare()

        layers = []
        while ready := sorter.get_ready():
            layers.append(tuple(sorted(ready, key=position.__getitem__)))
            sorter.done(*ready)

        sorted_names = {name for layer in layers for name in layer}
        rest = tuple(name for name in self.nodes if name not in sorted_names)
        if rest:
            layers.append(rest)
        return tuple(layers)

    def check_inputs(self, inputs: Any) -> None:
        """Check that all required inputs are there. It allows others, and does not check types.

        Args:
            inputs: as for `Session.start`.

        Raises:
            InvalidInputs: some are missing. The message names all of them, and points out likely
                misspellings: `It has no required input 'topik' (did you mean 'topic'?)`.
            TypeError: `inputs` is of another type.
        """
        if not self.required_inputs:
            return
        given = _names({} if inputs is None else inputs)
        missing = {name: kind for name, kind in self.required_inputs.items() if name not in given}
        if not missing:
            return

        named = ", ".join(f"{name!r} ({kind})" for name, kind in missing.items())
        plural = "s" if len(missing) > 1 else ""
        what = f"missing input{plural} for workflow {self.name!r:.100}: {named}"

        if unknown := sorted(given - self.required_inputs.keys()):
            # A row of a table may have many more columns than the workflow has inputs.
            most = 20
            plural = "s" if len(unknown) > 1 else ""
            listed = ", ".join(_guesses(unknown[:most], missing))
            what += f". It has no required input{plural} {listed}"
            if len(unknown) > most:
                what += f" and {len(unknown) - most} more"
        raise InvalidInputs(printable(what), missing=tuple(missing))

    def _repr_html_(self) -> str:
        """Return the required inputs and the graph, for notebooks."""
        return workflow_html(self)

    def __repr__(self) -> str:
        version = ""
        if self.version is not None:
            version = f" version {self.version}"
        nodes = f"{len(self.nodes)} nodes"
        return f"<WorkflowDefinition {self.id} {self.name!r:.100}{version}, {nodes}>"


def _names(inputs: Any) -> set[str]:
    if isinstance(inputs, Mapping):
        return {name for name in inputs if isinstance(name, str)}
    return set(_structuring.encode_inputs(inputs))


def _guesses(given: Iterable[str], missing: Iterable[str]) -> list[str]:
    """Return each given name with the missing one that it resembles. Matches come first."""
    misspelt, others = [], []
    for name in given:
        if likely := near(name, missing, 1):
            misspelt.append(f"{name!r:.100} (did you mean {likely[0]!r:.100}?)")
        else:
            others.append(f"{name!r:.100}")
    return misspelt + others


def near(name: str, known: Iterable[str], most: int) -> list[str]:
    """Return up to `most` of the known names that resemble a name, ignoring case."""
    from difflib import get_close_matches  # noqa: PLC0415 - rarely needed

    folded = {candidate.casefold(): candidate for candidate in known}
    close = get_close_matches(name.casefold(), folded, n=most)
    return [folded[match] for match in close]
