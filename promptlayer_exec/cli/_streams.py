"""Writing to standard output and standard error, line by line."""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


class OutputFailed(Exception):
    """Standard output could not be written to; `__cause__` tells why.

    It is no `OSError`: those may be anything's, and Typer and Rich have endings of their own for a
    broken pipe.
    """


class _Output(io.TextIOWrapper):
    """Standard output."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise OutputFailed from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OutputFailed from error


class _Errors(io.TextIOWrapper):
    """Standard error: where it fails there is nobody to tell, and the exit code says enough."""

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def guard_streams() -> None:
    """Let the standard streams take any text, and fail as their classes say; closed ones take all.

    What their encoding lacks is escaped.
    """
    sys.stdout = _guarded(sys.stdout, _Output)
    sys.stderr = _guarded(sys.stderr, _Errors)


def _guarded(stream: TextIO | None, kind: type[_Output] | type[_Errors]) -> TextIO:
    if stream is None:
        # Never closed, as the interpreter flushes it at the very end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        return kind(open(nowhere, "wb", closefd=False), "utf-8")
    if not isinstance(stream, io.TextIOWrapper):  # somebody else's
        return stream
    encoding = stream.encoding
    line_buffering, write_through = stream.line_buffering, stream.write_through
    return kind(
        stream.detach(),
        encoding,
        "backslashreplace",
        line_buffering=line_buffering,
        write_through=write_through,
    )


def out(text: str) -> None:
    """Write a line to standard output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def err(text: str) -> None:
    """Write a line to standard error, at once."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def discard_output() -> None:
    """Send what is still buffered nowhere: the interpreter flushes once more when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
