"""The handle of one execution."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from promptlayer_exec._output import check_type

if TYPE_CHECKING:
    from typing_extensions import TypeForm

    from promptlayer_exec._models import Node, Snapshot
    from promptlayer_exec._session import Session

T = TypeVar("T")


class Execution:
    """One execution, as a session follows it: made by `Session.execution`, or `Session.start`.

    However many calls of `stream`, `finished_nodes`, `wait` and `output` follow it in one session,
    one poller asks the server. Handles are equal if session and id are. A pickled handle comes
    back without its session: it still tells the id.

    Attributes:
        id: the execution's id.
        workflow: the workflow's name or id, where this session started it.
        warning: what the server warned of at the start.
    """

    __slots__ = ("_session", "id", "warning", "workflow")

    def __init__(
        self,
        session: Session | None,
        execution_id: int,
        workflow: str | int | None = None,
        warning: str | None = None,
    ) -> None:
        self._session = session
        self.id = execution_id
        self.workflow = workflow
        self.warning = warning

    async def snapshot(self) -> Snapshot:
        """Return all nodes as they are now: one request, retried as the session's policy says.

        Raises:
            RequestError: the server refused, or could not be reached.
            ExecutionTimeout: the session's `wait_timeout` passed.
            SessionClosed: the session was closed.
        """
        return await self._open_session().get_results(self.id, return_all_outputs=True)

    def stream(
        self, *, timeout: float | EllipsisType | None = ...
    ) -> AsyncGenerator[Snapshot, None]:
        """Yield a snapshot on every poll, the complete one last.

        The first is the latest there is. A consumer slower than the polls gets the latest and
        skips older ones. Leave early through `contextlib.aclosing`, so that polling stops at once.

        Args:
            timeout: seconds from the first `anext`; `...` means the session's `wait_timeout`,
                None no limit.

        Raises:
            ExecutionTimeout: it was not complete in time; it goes on at the server.
            RequestError: the server refused, or could not be reached for too long.
            SessionClosed: the session was closed.
        """
        return self._open_session()._follow(self.id, timeout)

    def finished_nodes(
        self, *, timeout: float | EllipsisType | None = ...
    ) -> AsyncGenerator[Node, None]:
        """Yield each node once, when it becomes final; at completion the rest follow.

        Args:
            timeout: as for `stream`.

        Raises:
            PromptLayerExecError: as for `stream`.
        """
        return self._open_session()._finished_nodes(self.id, timeout)

    async def wait(self, *, timeout: float | EllipsisType | None = ...) -> Snapshot:
        """Wait until the execution is complete; failed nodes do not raise.

        Cancelling the wait does not cancel the execution: the server cannot.

        Args:
            timeout: as for `stream`.

        Returns:
            The complete snapshot.

        Raises:
            PromptLayerExecError: as for `stream`.
        """
        session = self._open_session()
        deadline = session._deadline(timeout)
        opening = await session._open(self.id)
        return await opening.completed(self.id, deadline)

    @overload
    async def output(
        self, *, timeout: float | EllipsisType | None = ..., into: None = None
    ) -> Any: ...

    @overload
    async def output(
        self, *, timeout: float | EllipsisType | None = ..., into: TypeForm[T]
    ) -> T: ...

    async def output(self, *, timeout: float | EllipsisType | None = ..., into: Any = None) -> Any:
        """Wait until the execution is complete, and return its main output.

        Which value that is, the nodes tell: the one of the output node that succeeded. Where
        several did, or no node is marked as output, the server is asked.

        Args:
            timeout: as for `stream`.
            into: the type to structure it into, with nothing coerced but int to float: an attrs
                class, dataclass, TypedDict, enum, pydantic model, `list[Report]`,
                `Report | None` ... A string that does not fit is read as JSON. None: as it is.

        Raises:
            ExecutionFailed: the execution has no main output.
            InvalidOutput: the output is not of the type `into`.
            TypeError: `into` is no type that can be structured.
            PromptLayerExecError: as for `stream`.
        """
        session = self._open_session()
        if into is not None:
            check_type(into, session._converter)
        return await session._output(self.id, session._deadline(timeout), into)

    def _open_session(self) -> Session:
        if self._session is None:
            raise RuntimeError(
                f"this handle was unpickled and has no session; session.execution({self.id}) has"
            )
        return self._session

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Execution):
            return NotImplemented
        return self.id == other.id and self._session is other._session

    def __hash__(self) -> int:
        return hash((id(self._session), self.id))

    def __repr__(self) -> str:
        workflow = "" if self.workflow is None else f" of {self.workflow!r}"
        return f"<Execution {self.id}{workflow}>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # A session, with its key, does not travel.
        return type(self), (None, self.id, self.workflow, self.warning)
