"""`python -m promptlayer_exec`, and the script `promptlayer-exec`."""

from __future__ import annotations

import os
import signal
import sys

from promptlayer_exec._install import install_hint


def main() -> None:
    """Run the command line, or report which extra it needs, and exit."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_at_once)

    try:
        from promptlayer_exec.cli import main as run  # noqa: PLC0415 - an extra
    except ImportError as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and missing.partition(".")[0] in ("rich", "typer"):
            sys.stderr.write(f"the command line needs {install_hint('cli')}\n")
            sys.exit(2)
        # Not print_exception, with which Python 3.15 imports the package of a missing module again.
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(70)  # ExitCode.BUG, which cannot be imported here

    try:
        run()
    finally:
        # The exit code is decided. An interrupt would only disturb the interpreter's shutdown.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _exit_at_once(*_: object) -> None:
    # KeyboardInterrupt could be raised anywhere, for example during an import.
    os._exit(130)


if __name__ == "__main__":
    main()
