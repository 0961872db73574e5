"""The session for synchronous code: the asynchronous one, in a thread of its own.

Its names, arguments and errors are those of `promptlayer_exec.Session`, which documents them.
"""

from __future__ import annotations

import asyncio
import atexit
import inspect
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import partial, wraps
from queue import Empty, SimpleQueue
from types import EllipsisType
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    Never,
    NoReturn,
    ParamSpec,
    Self,
    TypeVar,
    cast,
    overload,
)
from weakref import WeakSet

import anyio
import attrs
from anyio.from_thread import BlockingPortal

import promptlayer_exec as asynchronous
from promptlayer_exec import (
    ExecutionFailed,
    InvalidOutput,
    MainOutput,
    Node,
    Outcome,
    PromptLayerExecError,
    SessionClosed,
    Snapshot,
    StartRequest,
    StartUnknown,
    Workflow,
    WorkflowDefinition,
    WorkflowSummary,
    _integration,
)
from promptlayer_exec._integration import InputsT, OutputT, hiding_unknown

if TYPE_CHECKING:
    from typing_extensions import TypeForm

__all__ = ["Execution", "Session"]

P = ParamSpec("P")
T = TypeVar("T")
ItemT = TypeVar("ItemT")

# Waiting threads look for Ctrl-C this often, in seconds, because on Windows it interrupts no wait.
_STEP = 0.1

# After this many seconds, closing tells what it waits for.
_PATIENCE = 0.1

# A program that starts runs, and never asks for their outcomes, keeps this many handles.
_MOST_STARTED = 1000

_END: Any = object()


class _Call(Generic[T]):
    """One call of a thread. Its coroutine runs in the session's event loop.

    `inbox` has what the loop asks the waiting thread to do.
    """

    def __init__(
        self, function: Callable[[], Awaitable[T]], inbox: SimpleQueue[Callable[[], object]]
    ) -> None:
        self._function = function
        self._inbox = inbox
        self._is_cancelled = False
        self._task: asyncio.Task[Any] | None = None
        self.outcome: Future[T] = Future()

    async def run(self) -> None:
        """Make the call, in the loop."""
        self._task = asyncio.current_task()
        try:
            if not self._is_cancelled:
                self.outcome.set_result(await self._function())
        except asyncio.CancelledError:
            self.outcome.set_exception(SessionClosed())
        except BaseException as error:  # noqa: BLE001 - the thread gets it
            self.outcome.set_exception(error)
        finally:
            self._inbox.put(lambda: None)  # wakes the thread

    async def cancel(self) -> None:
        """Cancel the call, in the loop, and wait until it has reported what it leaves behind."""
        self._is_cancelled = True  # it may not have begun
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def wait(self) -> T:
        """Do what the loop asks for, and return the result of the call."""
        while not self.outcome.done():
            with suppress(Empty):
                self._inbox.get(timeout=_STEP)()
        return self.outcome.result()


class _LoopThread:
    """A thread with the event loop of a session, for the calls of all other threads."""

    def __init__(self, session: Session) -> None:
        self._session = session
        # Not `start_blocking_portal`: it waits for its thread if Ctrl-C interrupts it, but never
        # tells the thread to stop.
        self._opened: Future[BlockingPortal] = Future()
        self._calls: set[_Call[Any]] = set()
        self._thread = threading.Thread(
            target=anyio.run, args=(self._serve,), name="promptlayer_exec.sync", daemon=True
        )
        self._thread.start()

    async def _serve(self) -> None:
        async with BlockingPortal() as portal:
            self._opened.set_result(portal)
            await portal.sleep_until_stopped()

    def call(
        self,
        function: Callable[[], Awaitable[T]],
        inbox: SimpleQueue[Callable[[], object]] | None = None,
    ) -> T:
        """Make a call, and wait for it.

        Ctrl-C, and whatever else a signal raises in this thread, cancels the call. It then logs the
        ids of its runs, as in asyncio.
        """
        _refuse_in_coroutine()
        portal = self._opened.result()
        call = _Call(function, SimpleQueue() if inbox is None else inbox)
        self._calls.add(call)

        try:
            try:
                portal.start_task_soon(call.run)
            except RuntimeError:  # it was stopped
                raise SessionClosed from None
            return call.wait()
        except BaseException as error:
            if call.outcome.done() and error is call.outcome.exception():
                raise
            try:
                self.end(call.cancel)
            finally:  # after another Ctrl-C, too
                _report_unreceived(call.outcome)
                self._session._report_started()
            raise
        finally:
            self._calls.discard(call)

    async def cancel_calls(self) -> None:
        """Cancel the calls of all threads, which then log the ids of their runs."""
        for call in list(self._calls):
            await call.cancel()

    def end(self, ending: Callable[[], Awaitable[None]]) -> None:
        """Wait until a coroutine has ended calls or the session.

        Start requests in flight delay that until their responses are there. Ctrl-C gives those up:
        then a line of the log names each run that may have started.
        """
        portal = self._opened.result()
        try:
            ended = portal.start_task_soon(self._end, ending)
        except RuntimeError:  # it was stopped
            return

        try:
            _wait(ended)
        except BaseException:
            with suppress(RuntimeError):
                portal.start_task_soon(self._give_up)
            _wait(ended)
            raise
        ended.result()

    async def _end(self, ending: Callable[[], Awaitable[None]]) -> None:
        task = asyncio.ensure_future(ending())
        await asyncio.wait([task], timeout=_PATIENCE)
        waiting = _integration.sends_delaying_closing(self._session._session)
        if waiting and not task.done():
            count = "1 start request" if len(waiting) == 1 else f"{len(waiting)} start requests"
            limit = _integration.settings(self._session._session).request_timeout
            text = f"waiting up to {limit:g} s for the response to {count}, so that no id is lost."
            print(f"{text} Ctrl-C gives up", file=sys.stderr, flush=True)  # noqa: T201
        await task

    async def _give_up(self) -> None:
        for send in _integration.sends_delaying_closing(self._session._session):
            send.give_up()

    def stop(self) -> None:
        """Stop the loop, once all calls have ended."""
        portal = self._opened.result()
        with suppress(RuntimeError):  # it has stopped
            portal.start_task_soon(portal.stop)
        while self._thread.is_alive():
            self._thread.join(_STEP)


def _wait(future: Future[None]) -> None:
    """Wait until a future is done, in steps."""
    while not future.done():
        wait([future], timeout=_STEP)


def _refuse_in_coroutine() -> None:
    """Raise `RuntimeError` in a coroutine or a callback, whose event loop the call would block.

    A notebook runs the code of its cells in a loop as well, but waits for it anyway.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return

    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "<module>":
        is_coroutine = frame.f_code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR)
        if is_coroutine or frame.f_globals.get("__name__") == "asyncio.events":
            break
        frame = frame.f_back
    else:
        if frame is not None:
            return

    raise RuntimeError(
        "promptlayer_exec.sync.Session would block this event loop. In a coroutine, use"
        " promptlayer_exec.Session and await its calls"
    )


def _report_unreceived(outcome: Future[Any]) -> None:
    """Log the runs in a result or error that arrived just when its caller was interrupted."""
    if not outcome.done():
        return
    if (error := outcome.exception()) is not None:
        has_run = isinstance(error, PromptLayerExecError) and error.execution_id is not None
        if has_run or isinstance(error, StartUnknown):
            _integration.warn_of_run("%s", error)
        return

    result = outcome.result()
    results = result if isinstance(result, list) else [result]
    _integration.report_abandoned(item for item in results if isinstance(item, Outcome))


class _Items(AsyncIterator[Any]):
    """Items for a fan-out, each taken in the thread that waits for outcomes.

    Django's querysets, for example, refuse to run in a thread with an event loop.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items
        self._iterator: Iterator[Any] | None = None
        self._given: dict[int, Any] = {}
        self._count = 0
        self.inbox: SimpleQueue[Callable[[], object]] = SimpleQueue()

    async def __anext__(self) -> Any:
        taken: Future[Any] = Future()
        self.inbox.put(partial(self._take, taken))
        item = await asyncio.wrap_future(taken)
        if item is _END:
            raise StopAsyncIteration

        index, self._count = self._count, self._count + 1
        if isinstance(item, Execution):
            self._given[index] = item
            return item._execution
        return item

    def _take(self, taken: Future[Any]) -> None:
        if not taken.set_running_or_notify_cancel():
            return
        try:
            if self._iterator is None:
                self._iterator = iter(self._items)
            item = next(self._iterator, _END)
        except Exception as error:  # noqa: BLE001 - the fan-out raises it
            taken.set_exception(error)
        else:
            taken.set_result(item)

    def given(self, outcome: Outcome[Any, Any]) -> Any:
        """Return the item of an outcome, as the caller gave it."""
        return self._given.pop(outcome.index, outcome.item)


@attrs.frozen(repr=False)
class Execution(Generic[OutputT]):
    """The handle of one execution, from `Session.start` or `Session.execution`.

    Its calls are those of `promptlayer_exec.Execution`.
    """

    _session: Session = attrs.field(alias="session")
    _execution: asynchronous.Execution[OutputT] = attrs.field(alias="execution")

    @property
    def id(self) -> int:
        """The execution's id."""
        return self._execution.id

    def snapshot(self) -> Snapshot:
        """Return the current state of all nodes, with one GET unless the execution is complete."""
        return self._session._seen(self.id, self._session._call(self._execution.snapshot))

    def stream(
        self, *, timeout: float | EllipsisType | None = ...
    ) -> Generator[Snapshot, None, None]:
        """Yield a snapshot on every poll, the complete one last."""
        return self._stream(self._execution.stream(timeout=timeout))

    def _stream(self, snapshots: AsyncGenerator[Snapshot, None]) -> Generator[Snapshot, None, None]:
        for snapshot in self._session._iterate(snapshots):
            yield self._session._seen(self.id, snapshot)

    def finished_nodes(
        self, *, timeout: float | EllipsisType | None = ...
    ) -> Generator[Node, None, None]:
        """Yield each node once, as soon as it finishes or the execution is complete."""
        return self._finished_nodes(self._execution.finished_nodes(timeout=timeout))

    def _finished_nodes(self, nodes: AsyncGenerator[Node, None]) -> Generator[Node, None, None]:
        yield from self._session._iterate(nodes)
        self._session._received(self.id)

    def wait(self, *, timeout: float | EllipsisType | None = ...) -> Snapshot:
        """Wait until the execution is complete, and return the complete snapshot."""
        return self._outcome(partial(self._execution.wait, timeout=timeout))

    @overload
    def output(
        self, *, timeout: float | EllipsisType | None = ..., into: None = None
    ) -> OutputT: ...

    @overload
    def output(self, *, timeout: float | EllipsisType | None = ..., into: TypeForm[T]) -> T: ...

    def output(self, *, timeout: float | EllipsisType | None = ..., into: Any = None) -> Any:
        """Wait until the execution is complete, and return its main output."""
        return self._outcome(partial(self._execution.output, timeout=timeout, into=into))

    @overload
    def outputs(
        self, *, timeout: float | EllipsisType | None = ..., into: None = None
    ) -> dict[str, Any]: ...

    @overload
    def outputs(self, *, timeout: float | EllipsisType | None = ..., into: TypeForm[T]) -> T: ...

    def outputs(self, *, timeout: float | EllipsisType | None = ..., into: Any = None) -> Any:
        """Wait until the execution is complete, and return its outputs by their nodes' names."""
        return self._outcome(partial(self._execution.outputs, timeout=timeout, into=into))

    def _outcome(self, function: Callable[[], Awaitable[T]]) -> T:
        try:
            result = self._session._call(function)
        except (ExecutionFailed, InvalidOutput):
            self._session._received(self.id)
            raise
        self._session._received(self.id)
        return result

    def __repr__(self) -> str:
        return repr(self._execution)


def _with_settings_of(
    make: Callable[P, asynchronous.Session],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Session, P], None]]:
    """Give `__init__` the arguments of the asynchronous session, and their types."""
    decorator: Any = wraps(cast(Any, make).__init__)
    return cast(
        "Callable[[Callable[..., None]], Callable[Concatenate[Session, P], None]]", decorator
    )


class Session:
    """Starts and follows executions from synchronous code, such as scripts, Django and Celery.

    Share one session, also between threads::

        with Session() as session:  # the key is in $PROMPTLAYER_API_KEY
            print(session.run("write-report", {"topic": "otters"}))

    You can also let its first call open it, and close it with `session.close()`. It takes the
    settings of `promptlayer_exec.Session`, whose calls it makes in a thread of its own.

    If Ctrl-C or an exception ends a call or the `with` block, a line of the log leads to the runs
    whose outcomes nobody received. If the interpreter exits with an open session, it closes the
    session and logs them as well. Without logging, Python prints the line to stderr.

    A child process opens the session of its parent afresh.

    Args:
        settings: those of `promptlayer_exec.Session`. It calls observers and the limiter in its own
            thread. It cannot borrow an `aiohttp.ClientSession`, because that belongs to the event
            loop in which you create it.

    Raises:
        ConfigurationError: a setting is malformed. A missing key raises it in the first call.
    """

    @_with_settings_of(asynchronous.Session)
    def __init__(self, *args: Any, **settings: Any) -> None:
        self._begin = partial(asynchronous.Session, *args, **settings)
        self._session = self._begin()
        self._is_closed = False
        self._reset()
        _sessions.add(self)

    def _reset(self) -> None:
        """Forget the thread and the runs of the process that this one was forked from."""
        self._lock = threading.RLock()
        self._thread: _LoopThread | None = None
        # The runs that it started, by id, until their outcomes are received.
        self._started: OrderedDict[int, asynchronous.Execution[Any]] = OrderedDict()

    def _reset_after_fork(self) -> None:
        if self._thread is not None:
            # In place, so that the handles made before belong to it.
            self._session.__init__(*self._begin.args, **self._begin.keywords)  # type: ignore[misc]
        self._reset()

    def __enter__(self) -> Self:
        """Open the session, or reopen it if it was closed."""
        self._is_closed = False
        try:
            self._call(self._session.__aenter__)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the session."""
        self.close()

    def close(self) -> None:
        """Close the session: every wait and call in it raises `SessionClosed`.

        It waits for the responses to start requests that were already sent. Ctrl-C gives those up,
        and a line of the log then names each run that may have started.
        """
        _refuse_in_coroutine()
        if sys.exception() is not None:  # it ends the `with` block, or a `finally` closes
            self._report_started()

        self._is_closed = True
        thread = self._thread
        if thread is None:
            thread = _LoopThread(self)  # the asynchronous session must know
        try:
            thread.end(self._session.aclose)
        finally:
            thread.stop()
            if self._thread is thread:
                self._thread = None
            self._started.clear()  # as planned
            _open_sessions.discard(self)

    def _exit(self) -> None:
        """Close the session when the interpreter exits."""
        with suppress(KeyboardInterrupt):  # it has given up the responses
            if self._thread is not None:
                self._thread.end(self._thread.cancel_calls)
        self._report_started()
        with suppress(KeyboardInterrupt):
            self.close()

    @contextmanager
    def _loop(self) -> Iterator[_LoopThread]:
        """Yield the thread of the open session.

        For a closed one it is a thread for this call, which raises `SessionClosed`, or returns what
        a complete handle remembers.
        """
        if self._is_closed:
            thread = _LoopThread(self)
            try:
                yield thread
            finally:
                thread.stop()
            return

        with self._lock:
            if self._thread is None:
                _refuse_in_coroutine()
                _open_sessions.add(self)
                self._thread = _LoopThread(self)
            thread = self._thread
        yield thread

    def _call(
        self,
        function: Callable[[], Awaitable[T]],
        inbox: SimpleQueue[Callable[[], object]] | None = None,
    ) -> T:
        with self._loop() as thread:
            return thread.call(function, inbox)

    def _iterate(
        self,
        values: AsyncGenerator[T, None],
        inbox: SimpleQueue[Callable[[], object]] | None = None,
    ) -> Generator[T, None, None]:
        """Yield what an asynchronous generator yields in the session's loop.

        If the caller stops early, the loop closes the generator, because nothing refers to it.
        """
        following = partial(anext, values, _END)
        with self._loop() as thread:
            while (value := thread.call(following, inbox)) is not _END:
                yield value

    def _seen(self, execution_id: int, snapshot: Snapshot) -> Snapshot:
        if snapshot.complete:
            self._received(execution_id)
        return snapshot

    def _received(self, execution_id: int) -> None:
        self._started.pop(execution_id, None)

    def _report_started(self) -> None:
        """Log the runs whose outcomes nobody received."""
        executions = [self._started.pop(execution_id, None) for execution_id in [*self._started]]
        # Of some, another thread was quicker.
        _integration.report_all_undelivered(execution for execution in executions if execution)

    @overload
    def get_results(
        self, execution_id: int | str, *, return_all_outputs: Literal[False] = False
    ) -> MainOutput: ...

    @overload
    def get_results(
        self, execution_id: int | str, *, return_all_outputs: Literal[True]
    ) -> Snapshot: ...

    @overload
    def get_results(
        self, execution_id: int | str, *, return_all_outputs: bool
    ) -> MainOutput | Snapshot: ...

    def get_results(
        self, execution_id: int | str, *, return_all_outputs: bool = False
    ) -> MainOutput | Snapshot:
        """Return an execution's current results, with one GET."""
        return self._call(
            partial(self._session.get_results, execution_id, return_all_outputs=return_all_outputs)
        )

    @hiding_unknown
    def start(
        self,
        workflow: str | int | Workflow[OutputT, InputsT],
        inputs: InputsT | None = None,
        *,
        label: str | None = None,
        version: int | None = None,
        metadata: Mapping[str, str] | None = None,
        callback_url: str | None = None,
        key: str | None = None,
        timeout: float | EllipsisType | None = ...,
        **_unknown: Never,
    ) -> Execution[OutputT]:
        """Start a run, and return its handle."""

        async def start() -> asynchronous.Execution[OutputT]:
            execution = await self._session.start(
                *(workflow, inputs),
                label=label,
                version=version,
                metadata=metadata,
                callback_url=callback_url,
                key=key,
                timeout=timeout,
                **_unknown,
            )
            return self._remember(execution)

        return Execution(self, self._call(start))

    def _remember(
        self, execution: asynchronous.Execution[OutputT]
    ) -> asynchronous.Execution[OutputT]:
        """Remember a run until its outcome is received. In the loop, so that Ctrl-C finds it."""
        self._started[execution.id] = execution
        if len(self._started) > _MOST_STARTED:
            self._started.popitem(last=False)
        return execution

    @overload
    def run(
        self,
        workflow: str | int | Workflow[OutputT, InputsT],
        inputs: InputsT | None = None,
        *,
        label: str | None = None,
        version: int | None = None,
        metadata: Mapping[str, str] | None = None,
        callback_url: str | None = None,
        key: str | None = None,
        timeout: float | EllipsisType | None = ...,
        into: None = None,
    ) -> OutputT: ...

    @overload
    def run(
        self,
        workflow: str | int,
        inputs: Any = None,
        *,
        label: str | None = None,
        version: int | None = None,
        metadata: Mapping[str, str] | None = None,
        callback_url: str | None = None,
        key: str | None = None,
        timeout: float | EllipsisType | None = ...,
        into: TypeForm[OutputT],
    ) -> OutputT: ...

    @hiding_unknown
    def run(
        self,
        workflow: str | int | Workflow[Any, Any],
        inputs: Any = None,
        *,
        label: str | None = None,
        version: int | None = None,
        metadata: Mapping[str, str] | None = None,
        callback_url: str | None = None,
        key: str | None = None,
        timeout: float | EllipsisType | None = ...,
        into: Any = None,
        **_unknown: Never,
    ) -> Any:
        """Start a run, wait until it is complete, and return its main output."""
        run: Any = self._session.run
        return self._call(
            partial(
                run,
                workflow,
                inputs,
                label=label,
                version=version,
                metadata=metadata,
                callback_url=callback_url,
                key=key,
                timeout=timeout,
                into=into,
                **_unknown,
            )
        )

    @hiding_unknown
    def definition(
        self,
        workflow: str | int | Workflow[Any, Any],
        *,
        label: str | None = None,
        version: int | None = None,
        **_unknown: Never,
    ) -> WorkflowDefinition:
        """Return one version of a workflow: its required inputs, nodes and edges."""
        return self._call(
            partial(self._session.definition, workflow, label=label, version=version, **_unknown)
        )

    def workflows(
        self,
        *,
        sort_by: Literal["created_at", "updated_at", "name", "id"] | None = None,
        sort_order: Literal["asc", "desc"] | None = None,
        external_source: str | None = None,
        external_id: str | None = None,
    ) -> Generator[WorkflowSummary, None, None]:
        """Yield every workflow of the workspace, with one request for each page of 100."""
        return self._iterate(
            self._session.workflows(
                sort_by=sort_by,
                sort_order=sort_order,
                external_source=external_source,
                external_id=external_id,
            )
        )

    def find(self, key: str) -> Execution | None:
        """Return the handle of the run that a key has started, or None. It starts nothing."""
        execution = self._call(partial(self._session.find, key))
        return None if execution is None else Execution(self, execution)

    def recover(
        self, error: StartUnknown, *, timeout: float | EllipsisType | None = ...
    ) -> Execution:
        """After a `StartUnknown`, wait for the callback of the run, and return its handle."""

        async def recover() -> asynchronous.Execution:
            return self._remember(await self._session.recover(error, timeout=timeout))

        return Execution(self, self._call(recover))

    @overload
    def as_completed(
        self,
        items: Iterable[StartRequest[OutputT, InputsT]],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: None = None,
    ) -> Generator[Outcome[StartRequest[OutputT, InputsT], OutputT, Execution], None, None]: ...

    @overload
    def as_completed(
        self,
        items: Iterable[Execution[OutputT]],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: None = None,
    ) -> Generator[Outcome[Execution[OutputT], OutputT, Execution], None, None]: ...

    @overload
    def as_completed(
        self,
        items: Iterable[ItemT],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: None = None,
    ) -> Generator[Outcome[ItemT, Any, Execution], None, None]: ...

    @overload
    def as_completed(
        self,
        items: Iterable[ItemT],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: TypeForm[OutputT],
    ) -> Generator[Outcome[ItemT, OutputT, Execution], None, None]: ...

    def as_completed(
        self,
        items: Iterable[Any],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: Any = None,
    ) -> Generator[Outcome[Any, Any, Execution], None, None]:
        """Run or follow many executions in parallel, and yield each outcome as it arrives.

        It takes items in the calling thread, while it waits for the next outcome.
        """
        taken = _items(items)
        outcomes = self._session.as_completed(
            taken, max_in_flight=max_in_flight, timeout=timeout, into=into
        )
        return self._outcomes(taken, outcomes)

    def _outcomes(
        self, items: _Items, outcomes: AsyncGenerator[Outcome[Any, Any], None]
    ) -> Generator[Outcome[Any, Any, Execution], None, None]:
        for outcome in self._iterate(outcomes, items.inbox):
            yield self._outcome(items, outcome)

    def _outcome(self, items: _Items, outcome: Outcome[Any, Any]) -> Outcome[Any, Any, Execution]:
        item, execution = items.given(outcome), None
        if outcome.execution is not None:
            self._received(outcome.execution.id)
            execution = item if isinstance(item, Execution) else Execution(self, outcome.execution)
        changed: Any = attrs.evolve(outcome, item=item, execution=cast(Any, execution))
        return cast("Outcome[Any, Any, Execution]", changed)

    @overload
    def collect(
        self,
        items: Iterable[StartRequest[OutputT, InputsT]],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: None = None,
    ) -> list[Outcome[StartRequest[OutputT, InputsT], OutputT, Execution]]: ...

    @overload
    def collect(
        self,
        items: Iterable[Execution[OutputT]],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: None = None,
    ) -> list[Outcome[Execution[OutputT], OutputT, Execution]]: ...

    @overload
    def collect(
        self,
        items: Iterable[ItemT],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: None = None,
    ) -> list[Outcome[ItemT, Any, Execution]]: ...

    @overload
    def collect(
        self,
        items: Iterable[ItemT],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: TypeForm[OutputT],
    ) -> list[Outcome[ItemT, OutputT, Execution]]: ...

    def collect(
        self,
        items: Iterable[Any],
        *,
        max_in_flight: int = 100,
        timeout: float | EllipsisType | None = ...,
        into: Any = None,
    ) -> list[Outcome[Any, Any, Execution]]:
        """Return the outcomes of all items, in the order of the items."""
        taken = _items(items)
        collect = partial(
            self._session.collect,
            taken,
            max_in_flight=max_in_flight,
            timeout=timeout,
            into=into,
        )
        outcomes = self._call(collect, taken.inbox)
        return [self._outcome(taken, outcome) for outcome in outcomes]

    def stream_all(
        self,
        items: Iterable[int | str | Execution],
        *,
        timeout: float | EllipsisType | None = ...,
    ) -> Generator[tuple[Execution, Snapshot], None, None]:
        """Follow many executions in one loop, and yield each with its snapshot on every poll."""
        given: Any = items
        if isinstance(given, Iterable) and not isinstance(given, str):
            given = [item._execution if isinstance(item, Execution) else item for item in given]
        return self._stream_all(self._session.stream_all(given, timeout=timeout))

    def _stream_all(
        self, snapshots: AsyncGenerator[tuple[asynchronous.Execution, Snapshot], None]
    ) -> Generator[tuple[Execution, Snapshot], None, None]:
        for execution, snapshot in self._iterate(snapshots):
            yield Execution(self, execution), self._seen(execution.id, snapshot)

    def execution(
        self, execution_id: int | str, workflow: str | int | Workflow[OutputT, Any] | None = None
    ) -> Execution[OutputT]:
        """Return the handle of an execution, without any I/O."""
        return Execution(self, self._session.execution(execution_id, workflow))

    def __repr__(self) -> str:
        return repr(self._session)

    def __reduce__(self) -> NoReturn:
        self._session.__reduce__()


def _items(items: Iterable[Any]) -> _Items:
    if not isinstance(items, Iterable):
        raise TypeError(f"items must be an iterable, not {items!r:.100}")
    return _Items(items)


_sessions: WeakSet[Session] = WeakSet()

# Those whose thread runs, also if the program has dropped them.
_open_sessions: set[Session] = set()


@atexit.register
def _close_open_sessions() -> None:
    for session in list(_open_sessions):
        session._exit()


def _reset_after_fork() -> None:
    _open_sessions.clear()
    for session in list(_sessions):
        session._reset_after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_reset_after_fork)
