"""The state of an execution as the server reports it, as frozen values."""

from __future__ import annotations

from collections import Counter
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import TYPE_CHECKING, Any, Generic, Never, TypeVar, overload

import attrs

from promptlayer_exec import _structuring
from promptlayer_exec._values.arguments import hiding_unknown, unexpected_argument
from promptlayer_exec._values.display import error_text, snapshot_html
from promptlayer_exec._values.errors import ExecutionFailed
from promptlayer_exec._values.statuses import FINAL as FINAL  # noqa: PLC0414 - re-exported
from promptlayer_exec._values.statuses import STATUSES
from promptlayer_exec._values.statuses import NodeStatus as NodeStatus  # noqa: PLC0414 - re-exported
from promptlayer_exec._values.text import counts_repr, short_repr
from promptlayer_exec._values.workflow import (
    InputsT,
    OutputT,
    Workflow,
    check_class_of_inputs,
    name_of,
)

if TYPE_CHECKING:
    from cattrs import Converter
    from typing_extensions import TypeForm

T = TypeVar("T")
V = TypeVar("V")


@attrs.frozen(eq=False, repr=False)
class FrozenMap(Mapping[str, V]):
    """A read-only view of a dict that, unlike `types.MappingProxyType`, pickles and deep-copies."""

    _items: dict[str, V] = attrs.field(factory=dict)

    def __getitem__(self, key: str) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    # The views of `Mapping` make a Python call for each item, and those of dict do not.
    def keys(self) -> KeysView[str]:
        return self._items.keys()

    def values(self) -> ValuesView[V]:
        return self._items.values()

    def items(self) -> ItemsView[str, V]:
        return self._items.items()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._items!r})"


def _read_status(status: str) -> NodeStatus | str:
    return STATUSES.get(status, status)


@attrs.frozen
class Node:
    """One node of an execution, at the time of one poll.

    Attributes:
        name: the node's name in the workflow.
        status: a `NodeStatus`. An unknown status stays a plain string and counts as not final.
        value: the node's output, any JSON value, or None until there is one.
        error_message: why the node failed, as text. PromptLayer may send other JSON: see `raw`.
        raw_error_message: the error with details: a string, or an object such as `{"raw": "..."}`.
        is_output_node: whether the workflow marks this node as an output.
    """

    name: str = attrs.field(repr=short_repr)
    status: NodeStatus | str = attrs.field(converter=_read_status, repr=short_repr)
    value: Any = attrs.field(default=None, repr=short_repr)
    error_message: str | None = attrs.field(default=None, repr=short_repr)
    raw_error_message: Any = attrs.field(default=None, repr=short_repr)
    is_output_node: bool | None = None

    @property
    def final(self) -> bool:
        """Whether the status is final, which means that it will not change."""
        return self.status in FINAL

    @property
    def succeeded(self) -> bool:
        """Whether the status is `SUCCESS`."""
        return self.status == NodeStatus.SUCCESS


_NODE_FIELDS = tuple(field.name for field in attrs.fields(Node))


@attrs.frozen
class NodeTimes:
    """When a watch first saw a node running, and when it first saw it final.

    Both are seconds since the first poll of the watch, or None if it never saw that.
    """

    running: float | None = None
    final: float | None = None


@attrs.frozen
class NodeChange:
    """A node whose status or value changed between two polls.

    Attributes:
        node: the node, as it is now.
        before: its previous status, or None if the node is new.
    """

    node: Node
    before: NodeStatus | str | None


def contradicts_completion(nodes: Iterable[Node]) -> bool:
    """Return True if a node still runs and no output node succeeded.

    PromptLayer once reported runs as complete too early. A node with an unknown status proves
    nothing, nor does one that outlasts the output.
    """
    nodes = tuple(nodes)
    still_runs = any(node.status in (NodeStatus.QUEUED, NodeStatus.RUNNING) for node in nodes)
    return still_runs and not any(node.is_output_node and node.succeeded for node in nodes)


def frozen_map(items: Any) -> Any:
    """Return a mapping as a `FrozenMap`."""
    if isinstance(items, FrozenMap):
        return items
    return FrozenMap(dict(items))


def _counts(nodes: Mapping[str, Node]) -> Mapping[str, int]:
    return Counter(node.status for node in nodes.values())


@attrs.frozen
class Snapshot:
    """All nodes of an execution, at the time of one poll.

    https://docs.promptlayer.com/reference/get-workflow-version-execution-results

    Attributes:
        execution_id: the id of the execution.
        complete: whether the server reports the execution as complete (HTTP 200). A complete
            execution may have failed.
        nodes: the nodes by name, in the server's order. Read-only.
        raw: the decoded body, including unknown fields. Do not change it: snapshots share it.
        poll: the number of this poll, from 1. A single request is poll 1.
        elapsed: seconds since the watch began. For a single request, how long it took.
        times: when a watch first saw each node running, and first saw it final. Read-only.
    """

    execution_id: int
    complete: bool
    nodes: Mapping[str, Node] = attrs.field(
        converter=frozen_map, repr=lambda nodes: counts_repr(_counts(nodes))
    )
    raw: Any = attrs.field(default=None, repr=False)
    poll: int = 1
    elapsed: float = attrs.field(default=0.0, repr=lambda seconds: f"{seconds:.3f}")
    times: Mapping[str, NodeTimes] = attrs.field(
        factory=FrozenMap, converter=frozen_map, repr=False
    )

    @property
    def counts(self) -> Mapping[str, int]:
        """The number of nodes by status, 0 for a status that no node has."""
        return _counts(self.nodes)

    @property
    def progress(self) -> float:
        """The share of nodes that are final, 1.0 when complete, 0.0 without nodes."""
        if self.complete or not self.nodes:
            return float(self.complete)
        return sum(node.final for node in self.nodes.values()) / len(self.nodes)

    @property
    def output_nodes(self) -> tuple[Node, ...]:
        """The nodes marked as output, in the server's order."""
        return tuple(node for node in self.nodes.values() if node.is_output_node)

    @property
    def failed_nodes(self) -> tuple[Node, ...]:
        """The nodes that failed, in the server's order."""
        return tuple(node for node in self.nodes.values() if node.status == NodeStatus.FAILED)

    @property
    def succeeded(self) -> bool:
        """Whether the execution is complete and at least one output node succeeded.

        If the workflow marks no node as output: whether it is complete and no node failed.
        """
        if not self.complete:
            return False
        outputs = self.output_nodes
        if not outputs:
            return not self.failed_nodes
        return any(node.succeeded for node in outputs)

    def diff(self, previous: Snapshot | None) -> tuple[NodeChange, ...]:
        """Return the nodes whose status or value changed since `previous`, in the server's order.

        None counts as a snapshot without nodes. Nodes that only `previous` has are left out.
        """
        earlier: Mapping[str, Node] = {}
        if previous is not None:
            earlier = previous.nodes

        changes = []
        for name, node in self.nodes.items():
            before = earlier.get(name)
            if before is None:
                changes.append(NodeChange(node, None))
            elif before.status != node.status or not same_json(before.value, node.value):
                changes.append(NodeChange(node, before.status))

        return tuple(changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the snapshot as plain data for JSON, in the same form everywhere in this package.

        The execution id is a string, because it may exceed 2**53. Times are seconds since the first
        poll, rounded to milliseconds. `succeeded` is None until the execution is complete. It does
        not copy node values.

        Returns:
            `{"execution_id", "poll", "elapsed", "complete", "succeeded", "progress", "nodes"}`,
            where `nodes` maps each name to `{"name", "status", "value", "error_message",
            "raw_error_message", "is_output_node", "running", "final"}`.
        """
        succeeded = None
        if self.complete:
            succeeded = self.succeeded

        return {
            "execution_id": str(self.execution_id),
            "poll": self.poll,
            "elapsed": round(self.elapsed, 3),
            "complete": self.complete,
            "succeeded": succeeded,
            "progress": self.progress,
            "nodes": {name: node_dict(self, name) for name in self.nodes},
        }

    @overload
    def output(self, *, into: None = None) -> Any: ...

    @overload
    def output(self, *, into: TypeForm[T]) -> T: ...

    def output(self, *, into: Any = None) -> Any:
        """Return the main output of a complete execution, without I/O.

        Args:
            into: the type of the output, as for `Execution.output`, but always with the default
                converter.

        Raises:
            ExecutionFailed: the execution has no main output.
            InvalidOutput: the output does not match `into`.
            TypeError: `into` is not a type that values can be structured into.
            ValueError: the execution is still running, or the nodes leave the output open, because
                several output nodes succeeded or none is marked.
        """
        _check_is_complete(self)
        self.raise_for_failure()

        succeeded = [node for node in self.output_nodes if node.succeeded]
        if len(succeeded) != 1:
            why = "no node is marked as output"
            if succeeded:
                why = "several output nodes succeeded"
            raise ValueError(
                f"cannot tell the output of execution {self.execution_id} from its nodes, because"
                f" {why}. Use Execution.output"
            )

        value = succeeded[0].value
        if into is None:
            return value
        return _structuring.structure_output(value, into, None, self)

    @overload
    def outputs(self, *, into: None = None) -> dict[str, Any]: ...

    @overload
    def outputs(self, *, into: TypeForm[T]) -> T: ...

    def outputs(self, *, into: Any = None) -> Any:
        """Return the outputs of a complete execution by the names of their nodes, without I/O.

        Args:
            into: as for `Execution.outputs`, but always with the default converter.

        Raises:
            ExecutionFailed: the execution has no output.
            InvalidOutput: the outputs do not match `into`.
            TypeError: `into` is not a type that values can be structured into.
            ValueError: the execution is still running.
        """
        return named_outputs(self, into)

    def _repr_html_(self) -> str:
        """Return a table of the nodes, for notebooks."""
        return snapshot_html(self)

    def raise_for_failure(self) -> None:
        """Raise `ExecutionFailed` if the execution is complete and did not succeed."""
        if not self.complete or self.succeeded:
            return

        what = "failed"
        failed = blamed = self.failed_nodes
        if not failed:
            what = "completed, but no output node succeeded"
            blamed = self.output_nodes

        # However many nodes a workflow has, its error must stay readable.
        most = 20
        states = "; ".join(map(_state, blamed[:most]))
        if len(blamed) > most:
            states += f"; and {len(blamed) - most:,} more nodes"

        raise ExecutionFailed(
            f"{what}: {states}", failed=failed, execution_id=self.execution_id, last_snapshot=self
        )


def named_outputs(snapshot: Snapshot, into: Any, converter: Converter | None = None) -> Any:
    """Do what `Snapshot.outputs` does, with the session's converter."""
    _check_is_complete(snapshot)
    snapshot.raise_for_failure()
    if into is None:
        return {node.name: node.value for node in snapshot.output_nodes if node.succeeded}
    return _structuring.structure_outputs(snapshot, into, converter)


def _check_is_complete(snapshot: Snapshot) -> None:
    if not snapshot.complete:
        raise ValueError(
            f"execution {snapshot.execution_id} is still running, so it has no output yet"
        )


def _state(node: Node) -> str:
    """Return a node's name, its status and why it failed, for an error message."""
    state = f"node {node.name!r:.100} {node.status:.100}"
    if text := error_text(node):
        state += f": {text:.200}"
    return state


def node_dict(snapshot: Snapshot, name: str) -> dict[str, Any]:
    """Return one node of a snapshot in the form of `Snapshot.to_dict`."""
    node = snapshot.nodes[name]
    times = snapshot.times.get(name, NodeTimes())

    shown: dict[str, Any] = {name: getattr(node, name) for name in _NODE_FIELDS}
    shown["status"] = str(node.status)
    shown["running"] = _milliseconds(times.running)
    shown["final"] = _milliseconds(times.final)
    return shown


def _milliseconds(seconds: float | None) -> float | None:
    """Return seconds rounded to milliseconds."""
    if seconds is None:
        return None
    return round(seconds, 3)


def same_json(left: Any, right: Any) -> bool:
    """Return True if two decoded values are the same JSON.

    `1`, `1.0` and `true` are different, NaN is the same as NaN, and the order of keys is ignored.
    """
    # Stacks, because JSON may be nested deeper than Python can recurse.
    lefts, rights = [left], [right]
    while lefts:
        left, right = lefts.pop(), rights.pop()
        if left is right:
            continue

        kind = type(left)
        if kind is not type(right):
            return False

        if kind is dict:
            if left.keys() != right.keys():
                return False
            lefts.extend(left.values())
            rights.extend(map(right.__getitem__, left))
        elif kind is list:
            if len(left) != len(right):
                return False
            lefts.extend(left)
            rights.extend(right)
        elif left != right and not (left != left and right != right):  # noqa: PLR0124 - NaN
            return False

    return True


@attrs.frozen
class MainOutput:
    """The response to a request for the main output.

    https://docs.promptlayer.com/reference/get-workflow-version-execution-results

    Attributes:
        execution_id: the id of the execution.
        complete: whether the server reports the execution as complete (HTTP 200).
        value: the decoded body, meaningful only when complete. If no output node succeeded, the
            server sends the node map, and some outputs look like one. Request all outputs
            (`return_all_outputs=True`) to see whether the execution succeeded.
    """

    execution_id: int
    complete: bool
    value: Any = attrs.field(repr=short_repr)


@attrs.frozen(init=False)
class StartRequest(Generic[OutputT, InputsT]):
    """A run to start. Its attributes are the arguments of `Session.start`.

    A `Workflow` becomes its name, label, version and metadata here, and its output's type `into`.

    Its `key` may be any value by which you recognise the item. The session never sends it.
    """

    workflow: str | int = attrs.field(repr=short_repr)
    inputs: InputsT = attrs.field(repr=short_repr)
    label: str | None = attrs.field(repr=short_repr)
    version: int | None
    metadata: Mapping[str, str] | None = attrs.field(repr=short_repr)
    callback_url: str | None = attrs.field(repr=short_repr)
    key: Any = attrs.field(repr=short_repr)
    into: TypeForm[OutputT] = attrs.field(repr=False)

    def __init__(  # noqa: PLR0917 - in the order of its attributes
        self,
        workflow: str | int | Workflow[OutputT, InputsT],
        inputs: InputsT | None = None,
        label: str | None = None,
        version: int | None = None,
        metadata: Mapping[str, str] | None = None,
        callback_url: str | None = None,
        key: Any = None,
        *,
        into: Any = Any,
        **_unknown: Never,
    ) -> None:
        if _unknown:
            raise unexpected_argument("StartRequest", _unknown)

        given: Any = {} if inputs is None else inputs
        if isinstance(workflow, Workflow):
            if into is not Any:
                raise TypeError("into= is for a workflow given by name: a Workflow has its output=")
            check_class_of_inputs(workflow, given)
            into = workflow.output
            if label is None and version is None:
                label, version = workflow.label, workflow.version
            if workflow.metadata:
                metadata = {**workflow.metadata, **(metadata or {})}

        self.__attrs_init__(
            name_of(workflow), given, label, version, metadata, callback_url, key, into
        )


# Not with a decorator inside the class, which mypy's plugin for attrs does not look into.
StartRequest.__init__ = hiding_unknown(StartRequest.__init__)  # type: ignore[method-assign]
