"""How a command ends: exit codes, signals, and the report of an error."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from functools import partial
from queue import SimpleQueue
from types import FrameType
from typing import Any, Literal, Self

import attrs

from promptlayer_exec import (
    ConfigurationError,
    ExecutionTimeout,
    NotFound,
    RequestError,
    RetryPolicy,
    StartUnknown,
    StatusError,
)
from promptlayer_exec.cli._text import OutputFailed, err, in_options, out, printable

PROGRAM = "promptlayer-exec"
NO_RUN = "no run was started"  # a note of a start; the error of a refused one says so itself
_HANGUP: int | None = getattr(signal, "SIGHUP", None)  # Windows has none
_PATIENCE = 1.0  # seconds, five times, that an event loop may stand still after a signal
_HELP_EPILOG = """\
\b
Environment:
  PROMPTLAYER_API_KEY  the API key; it cannot be given as an option

\b
Exit codes:
"""


class ExitCode(IntEnum):
    """The exit codes, with their descriptions in the help texts."""

    description: str
    batch_description: str
    other_description: str  # of commands that are about no execution; empty if none uses the code

    SUCCEEDED = 0, "the execution succeeded", "every item succeeded", "the command succeeded"
    FAILED = 1, "the execution failed", "some items failed or are unknown", ""
    USAGE = 2, "the command was used incorrectly, or the API key is missing"
    TIMED_OUT = (
        3,
        "the execution was not complete in time",
        "an execution was not complete within an hour; its item waits",
        "",
    )
    REFUSED = (
        4,
        "the API refused a request or could not be reached",
        "the API refused a request or could not be reached; the items wait",
    )
    BUG = 70, "an error in this program"  # EX_SOFTWARE of sysexits.h
    OUTPUT_FAILED = 74, "standard output could not be written"  # EX_IOERR
    INTERRUPTED = 130, "interrupted"
    BROKEN_PIPE = 141, "standard output was closed"
    TERMINATED = 143, "terminated"

    def __new__(
        cls,
        value: int,
        description: str,
        batch_description: str | None = None,
        other_description: str | None = None,
    ) -> Self:
        code = int.__new__(cls, value)
        code._value_ = value
        code.description = description
        code.batch_description = description if batch_description is None else batch_description
        code.other_description = description if other_description is None else other_description
        return code


def help_epilog(
    of: Literal["execution", "batch", "other"] = "execution", examples: tuple[str, ...] = ()
) -> str:
    """Return the end of a help text: examples, where the key comes from, and the exit codes."""
    texts = {
        code: {
            "execution": code.description,
            "batch": code.batch_description,
            "other": code.other_description,
        }[of]
        for code in ExitCode
    }
    lines = [f"  {code.value:<3}  {text}" for code, text in texts.items() if text]
    return example_epilog(*examples) + _HELP_EPILOG + "\n".join(lines)


def example_epilog(*examples: str) -> str:
    """Return the end of a help text that shows how a command is used."""
    if not examples:
        return ""
    heading = "Example" if len(examples) == 1 else "Examples"
    return "\n".join(["\b", f"{heading}:", *(f"  {PROGRAM} {each}" for each in examples), "", ""])


class Misuse(Exception):
    """The command cannot do what it was asked to do."""


class Interrupted(Exception):
    """The process received SIGINT."""


class Terminated(Exception):
    """The process received SIGTERM, or SIGHUP because its terminal was closed."""


# Every error that can be expected to end a command early.
_EXIT_CODES: dict[type[Exception], ExitCode] = {
    Misuse: ExitCode.USAGE,
    ConfigurationError: ExitCode.USAGE,
    ExecutionTimeout: ExitCode.TIMED_OUT,
    StartUnknown: ExitCode.REFUSED,
    RequestError: ExitCode.REFUSED,
    Interrupted: ExitCode.INTERRUPTED,
    Terminated: ExitCode.TERMINATED,
}


@attrs.define
class Subject:
    """What a command works on; the report of its error names it."""

    execution_id: int | None = None  # as soon as it is known
    base_url: str | None = None  # if it was given as an option
    resumable: bool = False  # whether the report shows how to watch the execution again
    note: str = ""  # what an error says in addition while there is no execution
    is_batch: bool = False  # whether the note is about a batch, and not about whether a run started

    def command(self, name: str) -> str:
        """Return a command on the execution, for the user to type."""
        option = "" if self.base_url is None else f" --base-url {shlex.quote(self.base_url)}"
        return f"{PROGRAM} {name} {self.execution_id}{option}"


def run_command(
    work: Coroutine[Any, Any, ExitCode], subject: Subject, *, as_json: bool = False
) -> ExitCode:
    """Run a command, report its error if it fails (in JSON, too), and return the exit code."""
    report = partial(_report, subject=subject, as_json=as_json)
    try:
        return asyncio.run(_until_signal(work, report))
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - Typer hides some
        return report_crash(error)


async def _until_signal(
    work: Coroutine[Any, Any, ExitCode], report: Callable[[Exception], ExitCode]
) -> ExitCode:
    """Await the work, and report its error if it fails.

    The first signal cancels the work, and the second exits the process. Errors are reported while
    these handlers stand, so that a signal does not keep one from being written; and inside the
    loop, because closing it takes long while a host name is being resolved.

    These handlers run between any two instructions, even while standard output blocks. Handlers
    of the event loop do not, and closing the loop would restore KeyboardInterrupt, which could
    interrupt the closing of the loop or of a session and make it hang.

    A write that blocks the event loop, as to a terminal that does not read, ends the process, too.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    received: int | None = None
    signals: SimpleQueue[int | None] = SimpleQueue()  # which a handler may use
    threading.Thread(target=_end_if_stuck, args=(loop, signals), daemon=True).start()

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal received
        if received is not None:
            if number == _HANGUP:  # a closed terminal can send two
                return
            os._exit(128 + number)
        received = number
        loop.call_soon_threadsafe(task.cancel)
        signals.put(number)

    previous = {
        number: signal.signal(number, handle)
        for number in (signal.SIGINT, signal.SIGTERM, _HANGUP)
        # They are ignored in a script's background job, or with nohup.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        return await task
    except (asyncio.CancelledError, OutputFailed) as error:
        if received is None:
            raise
        if isinstance(error, OutputFailed):  # as on a terminal that was closed
            _discard_output()
        stopped = _ended_by(received)
        return report(stopped(stopped.__name__.lower()))
    except tuple(_EXIT_CODES) as error:
        return report(error)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signals.put(None)


def _ended_by(number: int) -> type[Exception]:
    return Interrupted if number == signal.SIGINT else Terminated


def _end_if_stuck(loop: asyncio.AbstractEventLoop, signals: SimpleQueue[int | None]) -> None:
    """Exit the process if the loop is blocked after a signal, and does not just compute."""
    number = signals.get()
    while number is not None and not loop.is_closed():
        turn, used = threading.Event(), time.process_time()
        with suppress(RuntimeError):  # it was closed just now
            loop.call_soon_threadsafe(turn.set)
        # Several waits: the first one is over when a process that was stopped goes on.
        is_alive = any(turn.wait(_PATIENCE) for _ in range(5)) or loop.is_closed()
        if not is_alive and time.process_time() - used < _PATIENCE:
            os._exit(_EXIT_CODES[_ended_by(number)])
        time.sleep(_PATIENCE)


def _report(error: Exception, subject: Subject, *, as_json: bool) -> ExitCode:
    code = next(code for kind, code in _EXIT_CODES.items() if isinstance(error, kind))
    message = in_options(str(error))
    execution_id = subject.execution_id
    says_if_started = isinstance(error, ExecutionTimeout | StartUnknown) or (
        isinstance(error, RequestError) and subject.note == NO_RUN
    )
    if execution_id is None and subject.note and (subject.is_batch or not says_if_started):
        message = f"{message.rstrip('.')}; {subject.note}"
    message = printable(message)
    if isinstance(error, NotFound) and execution_id is None:
        message += f" `{PROGRAM} workflows` lists the names."
    err(message)
    # The server refused the id or the key itself, so that a retry cannot help.
    is_permanent = (
        isinstance(error, StatusError)
        and error.last_snapshot is None
        and error.status not in RetryPolicy().statuses
    )
    can_go_on = code is not ExitCode.USAGE and not is_permanent
    if execution_id is not None and subject.resumable and can_go_on:
        command = subject.command("watch")
        err(f"execution {execution_id} is not affected; pick it up again with:\n  {command}")
    if as_json:
        id_text = None if execution_id is None else str(execution_id)
        fields = {"type": type(error).__name__, "message": message, "execution_id": id_text}
        out(json.dumps({"error": fields}))
    return code


def report_crash(error: BaseException) -> ExitCode:
    """Report an unexpected error, or a failure of standard output, and return the exit code."""
    if not isinstance(error, OutputFailed):
        traceback.print_exception(error, file=sys.stderr)
        err("this is a bug in promptlayer-exec: please report it with the lines above")
        return ExitCode.BUG
    _discard_output()
    if isinstance(error.__cause__, BrokenPipeError):
        return ExitCode.BROKEN_PIPE
    err(f"cannot write to standard output: {error}")
    return ExitCode.OUTPUT_FAILED


def _discard_output() -> None:
    # The interpreter flushes what standard output still buffers when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def listening(host: str, port: int) -> Iterator[None]:
    """Report that a server cannot listen; a `UnicodeError` stands for a malformed host name."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        # socket.create_server repeats the address after the reason.
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        hint = "; --port 0 takes a free port" if port else ""
        raise Misuse(f"cannot listen on {host}, port {port}: {reason}{hint}") from None
