"""Commands that are told to the user, to be typed as they are."""

import shlex

PROGRAM = "promptlayer-exec"


def command(name: str, execution_id: int, *, base_url: str | None) -> str:
    """Return a command of this program on an execution.

    Args:
        name: the command.
        execution_id: the execution.
        base_url: the server, if it was given as an option.
    """
    where = "" if base_url is None else f" --base-url {shlex.quote(base_url)}"
    return f"{PROGRAM} {name} {execution_id}{where}"
