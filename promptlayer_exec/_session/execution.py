"""The handle of one execution."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, overload

from promptlayer_exec import _structuring
from promptlayer_exec._engine.abandoned import AbandonedRun, log_abandoned
from promptlayer_exec._engine.tasks import clock
from promptlayer_exec._values.errors import ExecutionFailed, PromptLayerExecError
from promptlayer_exec._values.events import logger
from promptlayer_exec._values.models import contradicts_completion, named_outputs, same_json
from promptlayer_exec._values.policies import Deadline, check_timeout
from promptlayer_exec._values.text import printable
from promptlayer_exec._values.workflow import OutputT

if TYPE_CHECKING:
    from typing_extensions import TypeForm

    from promptlayer_exec._engine.client import Client
    from promptlayer_exec._session.session import Session
    from promptlayer_exec._values.models import Node, Snapshot

T = TypeVar("T")


class Execution(Generic[OutputT]):
    """The handle of one execution, from `Session.start` or `Session.execution`.

    All `stream`, `finished_nodes`, `wait` and `output` calls in one session share one poller. The
    complete snapshot does not change: once a handle has it, these calls and `snapshot` return it
    without a request. Handles are equal if they have the same session and id. An unpickled handle
    keeps its id, but has no session.

    Attributes:
        id: the execution's id.
        workflow: the workflow's name or id, if this session started the run or you passed it to
            `Session.execution`.
        warning: the server's warning about the request, such as a missing input variable.
        is_new: whether the call that returned this handle started the run. False if an earlier call
            with the same key did, and from `Session.execution`, `find` and `recover`.
    """

    __slots__ = (
        *("_into", "_key", "_last", "_main_output", "_session"),
        *("id", "is_new", "warning", "workflow"),
    )

    def __init__(
        self,
        session: Session | None,
        execution_id: int,
        workflow: str | int | None = None,
        *,
        warning: str | None = None,
        is_new: bool = False,
        key: Any = None,
        into: Any = Any,
    ) -> None:
        self._session = session
        self._into = into  # the type of its output
        self._key = key  # for the log
        self._last: Snapshot | None = None
        self._main_output: tuple[Any, ...] | None = None  # as from `Client.ask_main_output`
        self.id = execution_id
        self.workflow = workflow
        self.warning = warning
        self.is_new = is_new

    async def snapshot(self) -> Snapshot:
        """Return the current state of all nodes, with one GET unless the execution is complete.

        Raises:
            PromptLayerExecError: as for `Session.get_results`.
        """
        if self._last is not None and self._last.complete:
            return self._last
        client = self._client()
        try:
            snapshot = await client.snapshot(self.id, client.deadline())
        except PromptLayerExecError as error:
            self._recall(error)
            raise

        if snapshot.complete and contradicts_completion(snapshot.nodes.values()):
            return snapshot  # but a watch asks again
        return self._remember(snapshot)

    def stream(
        self, *, timeout: float | EllipsisType | None = ...
    ) -> AsyncGenerator[Snapshot, None]:
        """Yield a snapshot on every poll, the complete one last.

        Show progress while the run works::

            async for snapshot in execution.stream():
                print(f"{snapshot.progress:.0%}", snapshot.counts)

        You get the latest snapshot first. If you are slower than the polls, you skip older ones. To
        stop early, wrap the generator in `contextlib.aclosing`. Polling then stops immediately.

        Args:
            timeout: seconds from the first `anext`. `...` means the session's `wait_timeout`, and
                None no limit.

        Raises:
            ExecutionTimeout: the execution was not complete in time. It continues on PromptLayer.
            RequestError: the server refused the request, or was unreachable for too long.
            SessionClosed: the session was closed.
        """
        self._require_session()
        return self._stream(check_timeout(timeout))

    def finished_nodes(
        self, *, timeout: float | EllipsisType | None = ...
    ) -> AsyncGenerator[Node, None]:
        """Yield each node once, as soon as it finishes or the execution is complete.

        The timeout and the errors are the same as for `stream`.
        """
        self._require_session()
        return self._finished_nodes(check_timeout(timeout))

    async def wait(self, *, timeout: float | EllipsisType | None = ...) -> Snapshot:
        """Wait until the execution is complete, and return the complete snapshot.

        Failed nodes do not raise. The timeout and the errors are the same as for `stream`. If you
        cancel the wait, the execution keeps running: PromptLayer cannot cancel one.
        """
        return await self._completed(self._deadline(timeout))

    @overload
    async def output(
        self, *, timeout: float | EllipsisType | None = ..., into: None = None
    ) -> OutputT: ...

    @overload
    async def output(
        self, *, timeout: float | EllipsisType | None = ..., into: TypeForm[T]
    ) -> T: ...

    async def output(self, *, timeout: float | EllipsisType | None = ..., into: Any = None) -> Any:
        """Wait until the execution is complete, and return its main output.

        It is the value of the output node that succeeded. If several succeeded, or the workflow
        marks no node as output, the session asks the server with one more request.

        Args:
            timeout: as for `stream`.
            into: the type of the output: an attrs class, dataclass, TypedDict, enum, pydantic
                model, `list[Report]`, `Report | None` and so on. An int may become a float, but
                nothing else is coerced. If a string does not match the type, the session parses its
                content as JSON. By default, the output type of the `Workflow` that this is a run
                of. Without either, the output is returned unchanged.

        Raises:
            ExecutionFailed: the execution has no main output.
            InvalidOutput: the output does not match `into`.
            TypeError: `into` is not a type that values can be structured into.
            PromptLayerExecError: as for `stream`.
        """
        deadline = self._deadline(timeout)
        into = self._into if into is None else into
        self._require_session()._check_type(into)
        return await self._output(deadline, into)

    @overload
    async def outputs(
        self, *, timeout: float | EllipsisType | None = ..., into: None = None
    ) -> dict[str, Any]: ...

    @overload
    async def outputs(
        self, *, timeout: float | EllipsisType | None = ..., into: TypeForm[T]
    ) -> T: ...

    async def outputs(self, *, timeout: float | EllipsisType | None = ..., into: Any = None) -> Any:
        """Wait until the execution is complete, and return its outputs by the names of their nodes.

        With a class, you get the nodes that its fields name, even if they are not output nodes::

            Nodes = TypedDict("Nodes", {"add links": str, "metadata agent": Metadata})

            nodes = await execution.outputs(into=Nodes)
            nodes["metadata agent"].title

        Args:
            timeout: as for `stream`.
            into: a type for the values of all output nodes that succeeded, such as
                `dict[str, Report]`, or a TypedDict, attrs class, dataclass or pydantic model whose
                fields have the names of nodes. Each value follows the rules of `output`. A node
                that did not succeed is missing, so give its field a default, or mark it
                `NotRequired`, if that may happen. None returns the values of the output nodes
                unchanged.

        Raises:
            ExecutionFailed: the execution has no output.
            InvalidOutput: the outputs do not match `into`.
            TypeError: `into` is not a type that values can be structured into.
            PromptLayerExecError: as for `stream`.
        """
        deadline = self._deadline(timeout)
        converter = self._require_session()._settings.converter
        if into is not None:
            self._require_session()._check_type(into)
        return named_outputs(await self._completed(deadline), into, converter)

    async def _output(self, deadline: Deadline, into: Any) -> Any:
        """Do what `output` does, with checked arguments."""
        snapshot = await self._completed(deadline)
        value = await self._main_output_of(snapshot, deadline)
        if into is Any:
            return value

        converter = self._require_session()._settings.converter
        return _structuring.structure_output(value, into, converter, snapshot)

    async def _main_output_of(self, snapshot: Snapshot, deadline: Deadline) -> Any:
        """Return the main output, and ask the server if the snapshot leaves it open."""
        snapshot.raise_for_failure()
        succeeded = [node for node in snapshot.output_nodes if node.succeeded]
        if len(succeeded) == 1:
            return succeeded[0].value

        if self._main_output is None:
            self._main_output = await self._client().ask_main_output(snapshot, deadline)

        # Without a main output, the server sends the node map, or an error status with it.
        has_output = self._main_output != ()
        if has_output and not succeeded:
            has_output = not same_json(self._main_output[0], snapshot.raw)
        if not has_output:
            why = "no node is marked as output"
            if succeeded:
                why = "PromptLayer found no output node"
            raise ExecutionFailed(
                f"completed without a main output: {why}",
                failed=(),
                execution_id=self.id,
                last_snapshot=snapshot,
            )
        return self._main_output[0]

    async def _completed(self, deadline: Deadline) -> Snapshot:
        if self._last is not None and self._last.complete:
            return self._last

        watch = self._client().watch(self.id)
        waiter = watch.join(deadline)
        try:
            return await watch.next(waiter)
        except PromptLayerExecError as error:
            self._recall(error)
            raise
        finally:
            if watch.latest is not None:
                self._remember(watch.latest)
            watch.leave(waiter)

    def _client(self) -> Client:
        try:
            return self._require_session()._open(self.id)
        except PromptLayerExecError as error:
            self._recall(error)
            raise

    def _recall(self, error: PromptLayerExecError) -> None:
        """Add the last snapshot of this handle's other calls to an error without one."""
        if error.last_snapshot is None or (self._last is not None and self._last.complete):
            error.last_snapshot = self._last

    async def _stream(
        self, timeout: float | EllipsisType | None, deadline: Deadline | None = None
    ) -> AsyncGenerator[Snapshot, None]:
        """Do what `stream` does, with a checked timeout or a given deadline."""
        if self._last is not None and self._last.complete:
            yield self._last
            return

        client = self._client()
        deadline = deadline or client.deadline(timeout)
        watch = client.watch(self.id)
        waiter = watch.join(deadline, streams=True)

        try:
            snapshot: Snapshot | None = None
            while snapshot is None or not snapshot.complete:
                snapshot = self._remember(await watch.next(waiter, snapshot))
                yield snapshot
        except PromptLayerExecError as error:
            self._recall(error)
            raise
        finally:
            watch.leave(waiter)

    async def _finished_nodes(
        self, timeout: float | EllipsisType | None
    ) -> AsyncGenerator[Node, None]:
        deadline = self._deadline(timeout)
        yielded = set()
        async with aclosing(self._stream(timeout, deadline)) as snapshots:
            async for snapshot in snapshots:
                for name, node in snapshot.nodes.items():
                    if name in yielded or not (node.final or snapshot.complete):
                        continue
                    if not snapshot.complete and clock() >= deadline.at:
                        break  # after the deadline, only a complete snapshot is delivered
                    yielded.add(name)
                    yield node

    def _remember(self, snapshot: Snapshot) -> Snapshot:
        """Return the snapshot, or the complete one if another call has got it meanwhile."""
        if self._last is None or not self._last.complete:
            self._last = snapshot
        return self._last

    async def _deliver(self, deadline: Deadline) -> OutputT:
        """Do what `output` does, for a caller that has no handle."""
        if self.warning:
            logger.warning(
                "execution %d of workflow %.100r: PromptLayer warns: %s",
                self.id,
                self.workflow,
                printable(self.warning[:1000]),
            )

        try:
            return await self._output(deadline, self._into)  # type: ignore[no-any-return]
        except PromptLayerExecError:  # it has the id
            raise
        except BaseException:
            self._report_undelivered()
            raise

    def _report_undelivered(self) -> None:
        """Log the id of a started run whose caller is gone."""
        log_abandoned(self._abandoned())

    def _abandoned(self) -> AbandonedRun:
        session = self._session
        has_store = session is not None and session._settings.starts is not None
        return AbandonedRun(
            self.id, self.workflow, self._key, is_recorded=has_store and self._key is not None
        )

    def _deadline(self, timeout: float | EllipsisType | None) -> Deadline:
        timeout = check_timeout(timeout)
        return self._require_session()._settings.deadline(timeout, now=clock())

    def _require_session(self) -> Session:
        if self._session is None:
            raise RuntimeError(
                f"an unpickled handle has no session. Use session.execution({self.id}) instead"
            )
        return self._session

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Execution):
            return NotImplemented
        return self.id == other.id and self._session is other._session

    def __hash__(self) -> int:
        return hash((id(self._session), self.id))

    def __repr__(self) -> str:
        if self.workflow is None:
            return f"<Execution {self.id}>"
        return f"<Execution {self.id} of {self.workflow!r:.100}>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # The session is not pickled: it holds the API key.
        unpickled = partial(
            type(self),
            warning=self.warning,
            is_new=self.is_new,
            key=self._key,
            into=self._into,
        )
        return unpickled, (None, self.id, self.workflow)
