"""`python -m promptlayer_exec`, and the script `promptlayer-exec`."""

import os
import signal
import sys
import traceback
from typing import NoReturn

_NEEDED = ("rich", "typer")


def main() -> None:
    """Run the command line, or say in one line what it needs, and exit."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _quit)
    try:
        _run()
    finally:
        # How it ends is decided; an interrupt would but disturb the interpreter's own end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run() -> None:
    try:
        from promptlayer_exec.cli import main as run  # noqa: PLC0415 - it may not be there
    except ImportError as error:
        _explain(error)
    run()


def _explain(error: ImportError) -> NoReturn:
    if (
        isinstance(error, ModuleNotFoundError)
        and error.name is not None
        and error.name.partition(".")[0] in _NEEDED
    ):
        sys.stderr.write("the command line needs an extra: pip install 'promptlayer-exec[cli]'\n")
        sys.exit(2)
    traceback.print_exception(error)
    sys.exit(70)  # as ExitCode.BUG, which may not be there


def _quit(*_: object) -> None:
    # KeyboardInterrupt would strike anywhere, as in the midst of an import.
    os._exit(130)


if __name__ == "__main__":
    main()
