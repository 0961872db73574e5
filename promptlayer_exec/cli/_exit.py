"""How a command exits: exit codes, signals, hints, and the report of an error."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from enum import IntEnum
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec

import attrs
import typer

import promptlayer_exec
from promptlayer_exec import Snapshot
from promptlayer_exec._advice import explain
from promptlayer_exec._integration import is_from_gateway, is_transient, printable
from promptlayer_exec._ways_out import WayOut, suggest
from promptlayer_exec.cli._printing import err, out
from promptlayer_exec.cli._sentences import running_line

P = ParamSpec("P")

_HANGUP: int | None = getattr(signal, "SIGHUP", None)  # Windows has none


class ExitCode(IntEnum):
    """The exit codes. `help exit-codes` explains them."""

    SUCCEEDED = 0
    FAILED = 1
    USAGE = 2
    TIMED_OUT = 3
    UNAVAILABLE = 4
    BUG = 70  # EX_SOFTWARE of sysexits.h
    OUTPUT_FAILED = 74  # EX_IOERR
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143


class Misuse(Exception):
    """The command cannot do what the user asked for. `hint` shows a command that helps."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Interrupted(Exception):
    """The process received SIGINT."""


class Terminated(Exception):
    """The process received SIGTERM, or SIGHUP because its terminal closed."""


# Every error that can be expected to end a command early.
_EXIT_CODES: dict[type[Exception], ExitCode] = {
    Misuse: ExitCode.USAGE,
    promptlayer_exec.ConfigurationError: ExitCode.USAGE,
    promptlayer_exec.KeyConflict: ExitCode.USAGE,
    promptlayer_exec.ExecutionFailed: ExitCode.FAILED,
    promptlayer_exec.StartUnknown: ExitCode.FAILED,
    promptlayer_exec.ExecutionTimeout: ExitCode.TIMED_OUT,
    promptlayer_exec.StoreUnavailable: ExitCode.UNAVAILABLE,
    promptlayer_exec.RequestError: ExitCode.UNAVAILABLE,  # unless waiting does not help
    Interrupted: ExitCode.INTERRUPTED,
    Terminated: ExitCode.TERMINATED,
}


def hint(text: str, command: str) -> str:
    """Return a text, and below it the command that it is about, ready to copy."""
    return f"{text}\n  {command}"


def way_hints(ways: Iterable[WayOut]) -> list[str]:
    """Return a hint for each way out of a state."""
    return [hint(f"{way.what}:", way.command) for way in ways]


@attrs.define
class Subject:
    """What a command works on, for the report of its error."""

    execution_id: int | None = None  # as soon as it is known
    snapshot: Snapshot | None = None  # the last one, while the command watches
    base_url: str | None = None  # if it was given as an option
    resumable: bool = False  # whether the report shows how to watch the execution again
    note: str = ""  # a sentence to add to an error while there is no execution
    failure: Exception | None = None  # of a start. Its text already includes the note
    refusal: ExitCode = ExitCode.FAILED  # the exit code if PromptLayer refuses a request
    hint: str = ""  # what to do next, while there is no execution
    stopping: str = ""  # what to print if the command takes a while to finish after a signal
    as_json: bool = False  # whether an error is also written to standard output


# The subject of the running command, which fills it in.
THIS_SUBJECT: ContextVar[Subject] = ContextVar("subject")


def command(function: Callable[P, Coroutine[Any, Any, ExitCode | None]]) -> Callable[P, None]:
    """Turn a coroutine function into a command. Returning None means success."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        subject = Subject(as_json=kwargs.get("as_json") is True)
        THIS_SUBJECT.set(subject)
        raise typer.Exit(run_command(function(*args, **kwargs), subject))

    return run


def run_command(work: Coroutine[Any, Any, ExitCode | None], subject: Subject) -> ExitCode:
    """Run a command, report its error if it fails, and return the exit code."""
    try:
        return asyncio.run(_until_signal(work, subject)) or ExitCode.SUCCEEDED
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - Typer hides some
        return report_crash(error)


async def _until_signal(
    work: Coroutine[Any, Any, ExitCode | None], subject: Subject
) -> ExitCode | None:
    """Await the work, and report its error if it fails.

    It reports an error before it restores the signal handlers, so that a signal cannot suppress the
    report, and inside the loop, because closing the loop takes long while a name lookup is in
    progress.
    """
    task = asyncio.ensure_future(work)

    with _cancelled_by_signals(task, subject) as received:
        try:
            return await task
        except tuple(_EXIT_CODES) as error:
            return _report(error, subject)
        except (asyncio.CancelledError, OSError) as error:
            if not received:
                raise
            if isinstance(error, OSError):  # as on a terminal that was closed
                _discard(sys.stdout)
            if signal.SIGINT in received:
                return _report(Interrupted("interrupted"), subject)
            return _report(Terminated("terminated"), subject)


@contextmanager
def _cancelled_by_signals(task: asyncio.Future[Any], subject: Subject) -> Iterator[list[int]]:
    """Let the first signal cancel the task, and add the number of the signal to the list.

    The second signal exits the process, even while it waits for a write.
    """
    loop = asyncio.get_running_loop()
    received: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        if not received:
            received.append(number)
            loop.call_soon_threadsafe(cancel)
        elif number != _HANGUP:  # a closed terminal can send two
            os._exit(128 + number)

    def cancel() -> None:
        task.cancel()
        # Time enough to cancel a request not sent yet, and no long wait without a message.
        loop.call_later(0.3, explain_the_wait)

    def explain_the_wait() -> None:
        if subject.stopping and not task.done():
            err(subject.stopping)

    previous = {
        number: signal.signal(number, handle)
        for number in (signal.SIGINT, signal.SIGTERM, _HANGUP)
        # A script's background job and nohup ignore them.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _exit_code(error: Exception, subject: Subject) -> ExitCode:
    code = next(code for kind, code in _EXIT_CODES.items() if isinstance(error, kind))
    if code is ExitCode.UNAVAILABLE and not may_pass(error):
        return subject.refusal
    return code


def may_pass(error: Exception) -> bool:
    """Return True if PromptLayer or the database is away, so the same command may work later."""
    if isinstance(error, promptlayer_exec.ConnectionFailed | promptlayer_exec.StoreUnavailable):
        return True
    if isinstance(error, promptlayer_exec.StatusError):
        if error.status == 402:  # until somebody pays the account's bill
            return True
        # Unless it is about one run: a batch has already asked for its results for minutes.
        if error.execution_id is None and is_from_gateway(error):
            return True
    return isinstance(error, promptlayer_exec.RequestError) and is_transient(error)


def _note(error: Exception, subject: Subject) -> str:
    """Return what to add to an error while there is no execution."""
    if subject.failure is None:
        return subject.note
    # If the command was interrupted, its start may have failed with another error.
    return "" if type(error) is type(subject.failure) else explain(subject.failure)


def _report(error: Exception, subject: Subject) -> ExitCode:
    code = _exit_code(error, subject)
    execution_id = subject.execution_id

    message = explain(error)
    if execution_id is None and (note := _note(error, subject)):
        message = f"{message.rstrip('.')}. {note}"
    err(message)

    if isinstance(error, Misuse) and error.hint:
        err(printable(error.hint, keep="\n"))
    elif execution_id is None and subject.hint:
        err(subject.hint)
    elif execution_id is not None and subject.resumable and _can_be_resumed(error):
        err(hint(_how_it_is(execution_id, subject), _watch_again(execution_id, subject)))

    if subject.as_json:
        id_text = None if execution_id is None else str(execution_id)
        fields = {"type": type(error).__name__, "message": message, "execution_id": id_text}
        out(json.dumps({"error": fields}))
    return code


def _how_it_is(execution_id: int, subject: Subject) -> str:
    if subject.snapshot is None:
        return f"execution {execution_id} is not affected. Follow it with:"
    seen = running_line(subject.snapshot)
    return f"execution {execution_id} continues on PromptLayer, {seen}. Follow it with:"


def _watch_again(execution_id: int, subject: Subject) -> str:
    return suggest(f"watch {execution_id}", subject.base_url)


def _can_be_resumed(error: Exception) -> bool:
    """Return False if another attempt would fail the same way: PromptLayer refuses key or id."""
    if isinstance(error, Misuse | promptlayer_exec.ConfigurationError):
        return False
    if isinstance(error, promptlayer_exec.StatusError) and not may_pass(error):
        return error.last_snapshot is not None
    return True


def report_crash(error: BaseException) -> ExitCode:
    """Report an unexpected error, or a failure to write output, and return the exit code."""
    if not isinstance(error, OSError) or error.errno is None:
        traceback.print_exception(error, file=sys.stderr)
        err("this is a bug in promptlayer-exec: please report it with the lines above")
        return ExitCode.BUG

    code = ExitCode.BROKEN_PIPE
    if not isinstance(error, BrokenPipeError):
        code = ExitCode.OUTPUT_FAILED
        with suppress(OSError):
            err(f"cannot write the output: {error.strerror}")
    _discard(sys.stdout, sys.stderr)
    return code


def _discard(*streams: Any) -> None:
    # When it exits, the interpreter flushes what they still buffer.
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def listening(host: str, port: int) -> Iterator[None]:
    """Report that a server cannot listen."""
    try:
        yield
    except OSError as error:
        # The text of socket.create_server repeats the address after the reason.
        reason = error.strerror
        if error.errno is not None and error.errno > 0:  # a failed name lookup has another one
            reason = os.strerror(error.errno)
        advice = ". --port 0 picks a free port" if port else ""
        raise Misuse(f"cannot listen on {host}, port {port}: {reason}{advice}") from None
