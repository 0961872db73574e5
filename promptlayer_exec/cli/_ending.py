"""How a command ends: its exit code, and what it says when it could not do its work."""

import asyncio
import json
import signal
from collections.abc import Coroutine
from contextlib import suppress
from enum import IntEnum
from typing import Any, Self

from promptlayer_exec import (
    ConfigurationError,
    ExecutionTimeout,
    RequestError,
    StatusError,
)

from ._streams import discard_output, err, out
from ._text import printable


class ExitCode(IntEnum):
    """What the exit codes mean."""

    SUCCEEDED = 0
    FAILED = 1
    USAGE = 2
    TIMED_OUT = 3
    REFUSED = 4
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
  130  interrupted
  141  standard output was closed
  143  terminated"""


def conclude(
    work: Coroutine[Any, Any, ExitCode],
    *,
    execution_id: int | None = None,
    pick_up: str | None = None,
    as_json: bool = False,
) -> ExitCode:
    """Do a command's work, and say what went wrong if it did.

    Args:
        work: returns the exit code; SIGINT and SIGTERM cancel it.
        execution_id: the execution that it concerns, if it concerns one.
        pick_up: the command that picks the execution up again.
        as_json: whether an error is written to standard output too, as a line of JSON.
    """
    with _Ending(execution_id, pick_up, as_json=as_json) as ending:
        ending.code = asyncio.run(_terminable(work))
    return ending.code


async def _terminable(work: Coroutine[Any, Any, ExitCode]) -> ExitCode:
    task = asyncio.ensure_future(work)
    with suppress(NotImplementedError):  # on Windows
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


class _Ending:
    """Turns what ends a command early into an exit code and words."""

    def __init__(self, execution_id: int | None, pick_up: str | None, *, as_json: bool) -> None:
        self.code = ExitCode.SUCCEEDED
        self._execution_id = execution_id
        self._pick_up = pick_up
        self._as_json = as_json

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> bool:
        try:
            return self._tell(error)
        except BrokenPipeError:
            discard_output()
            self.code = ExitCode.BROKEN_PIPE
            return True

    def _tell(self, error: BaseException | None) -> bool:
        match error:
            case KeyboardInterrupt():
                self._say(ExitCode.INTERRUPTED, "Interrupted", "interrupted")
            case asyncio.CancelledError():
                self._say(ExitCode.TERMINATED, "Terminated", "terminated")
            case ConfigurationError():
                self._pick_up = None
                self._say(ExitCode.USAGE, type(error).__name__, str(error))
            case ExecutionTimeout():
                self._say(ExitCode.TIMED_OUT, type(error).__name__, str(error))
            case RequestError():
                if isinstance(error, StatusError) and error.last_snapshot is None:
                    self._pick_up = None  # the very id or key was refused
                self._say(ExitCode.REFUSED, type(error).__name__, str(error))
            case BrokenPipeError():
                raise error
            case _:
                return False
        return True

    def _say(self, code: ExitCode, kind: str, message: str) -> None:
        self.code = code
        message = printable(message)
        err(message)
        if self._pick_up is not None:
            err(f"execution {self._execution_id} is not affected; pick it up again with:")
            err(f"  {self._pick_up}")
        if self._as_json:
            execution_id = str(self._execution_id)
            about = {"type": kind, "message": message, "execution_id": execution_id}
            out(json.dumps({"error": about}))
