"""`python -m promptlayer_exec`, and the script `promptlayer-exec`."""

import sys

_NEEDED = ("rich", "typer")


def main() -> None:
    """Run the command line, or say in one line what it needs, and exit."""
    try:
        from promptlayer_exec.cli import main as run  # noqa: PLC0415 - it may not be there
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _NEEDED:
            raise
        sys.stderr.write("the command line needs an extra: pip install 'promptlayer-exec[cli]'\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
