"""How a command ends: its exit code, and what it says when it could not do its work."""

import asyncio
import json
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Self

from promptlayer_exec import (
    ConfigurationError,
    ExecutionTimeout,
    RequestError,
    RetryPolicy,
    StartUnknown,
    StatusError,
)

from ._signals import Signals
from ._streams import OutputFailed, discard_output, err, out
from ._text import printable


class ExitCode(IntEnum):
    """What the exit codes mean."""

    SUCCEEDED = 0
    FAILED = 1
    USAGE = 2
    TIMED_OUT = 3
    REFUSED = 4
    BUG = 70  # EX_SOFTWARE of sysexits.h
    OUTPUT_FAILED = 74  # EX_IOERR
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143


EXIT_CODES = """\b
Exit codes:
  0    the execution succeeded
  1    it is complete, and failed
  2    the command was used wrongly, or the API key is missing
  3    it was not complete in time
  4    the API refused, or could not be reached
  70   an error in this program
  74   standard output could not be written to
  130  interrupted
  141  standard output was closed
  143  terminated"""


class Misuse(Exception):
    """What the user asked for cannot be done; nothing was sent."""


@dataclass
class Subject:
    """What a command concerns: an execution, or one that it starts and learns of on its way.

    Attributes:
        execution_id: the execution, as soon as there is one.
        pick_up: returns the command that picks an execution up again.
        remark: what is to be said of it, if the command ends early, while there is no execution.
    """

    execution_id: int | None = None
    pick_up: Callable[[int], str] | None = None
    remark: str = ""


def conclude(
    work: Coroutine[Any, Any, ExitCode], subject: Subject, *, as_json: bool = False
) -> ExitCode:
    """Do a command's work, and say what went wrong if it did.

    Args:
        work: returns the exit code; SIGINT and SIGTERM cancel it.
        subject: what it concerns.
        as_json: whether an error is written to standard output too, as a line of JSON.
    """
    return asyncio.run(_concluded(work, subject, as_json=as_json))


async def _concluded(
    work: Coroutine[Any, Any, ExitCode], subject: Subject, *, as_json: bool
) -> ExitCode:
    # Inside of the loop: closing it may take long, as where a name is still being looked up.
    signals = Signals()
    with Ending() as ending, _Trouble(ending, signals, subject, as_json=as_json):
        ending.code = await signals.run(work)
    return ending.code


class Ending:
    """Turns what nobody expects, and the end of standard output, into an exit code and words."""

    def __init__(self) -> None:
        self.code = ExitCode.SUCCEEDED

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> bool:
        match error:
            case None | KeyboardInterrupt() | SystemExit():
                return False
            case OutputFailed(__cause__=OSError() as cause):
                self._give_up_output(cause)
            case _:
                self.code = ExitCode.BUG
                traceback.print_exception(error, file=sys.stderr)
                err("this is a bug of promptlayer-exec: please report it, with the lines above")
        return True

    def _give_up_output(self, error: OSError) -> None:
        discard_output()
        if isinstance(error, BrokenPipeError):
            self.code = ExitCode.BROKEN_PIPE
            return
        self.code = ExitCode.OUTPUT_FAILED
        err(f"cannot write to standard output: {error.strerror or error}")


class _Trouble:
    """Turns what may well end a command early into an exit code and words."""

    def __init__(
        self, ending: Ending, signals: Signals, subject: Subject, *, as_json: bool
    ) -> None:
        self._ending = ending
        self._signals = signals
        self._subject = subject
        self._as_json = as_json

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> bool:
        match error:
            case asyncio.CancelledError() if self._signals.received == signal.SIGINT:
                self._say(ExitCode.INTERRUPTED, "Interrupted", self._remarked("interrupted"))
            case asyncio.CancelledError() if self._signals.received == signal.SIGTERM:
                self._say(ExitCode.TERMINATED, "Terminated", self._remarked("terminated"))
            case ConfigurationError() | Misuse():
                self._subject.pick_up = None
                self._say(ExitCode.USAGE, type(error).__name__, self._remarked(str(error)))
            case ExecutionTimeout():
                self._say(ExitCode.TIMED_OUT, type(error).__name__, str(error))
            case StartUnknown():
                self._say(ExitCode.REFUSED, type(error).__name__, str(error))
            case RequestError():
                if isinstance(error, StatusError) and _is_final(error):
                    self._subject.pick_up = None
                self._say(ExitCode.REFUSED, type(error).__name__, self._remarked(str(error)))
            case _:
                return False
        return True

    def _remarked(self, message: str) -> str:
        if self._subject.execution_id is None and self._subject.remark:
            return f"{message.rstrip('.')}; {self._subject.remark}"
        return message

    def _say(self, code: ExitCode, kind: str, message: str) -> None:
        self._ending.code = code
        message = printable(message)
        err(message)
        execution_id = self._subject.execution_id
        if execution_id is not None and self._subject.pick_up is not None:
            err(f"execution {execution_id} is not affected; pick it up again with:")
            err(f"  {self._subject.pick_up(execution_id)}")
        if self._as_json:
            about = {
                "type": kind,
                "message": message,
                "execution_id": None if execution_id is None else str(execution_id),
            }
            out(json.dumps({"error": about}))


def _is_final(error: StatusError) -> bool:
    """Tell whether the very id or key was refused, so that it is of no use to try again."""
    return error.last_snapshot is None and error.status not in RetryPolicy().statuses
