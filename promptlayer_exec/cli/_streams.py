"""Writing to standard output and standard error, line by line."""

import io
import os
import sys
from typing import cast


def accept_any_text() -> None:
    """Let standard output escape what its encoding lacks, as standard error does."""
    cast(io.TextIOWrapper, sys.stdout).reconfigure(errors="backslashreplace")


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
