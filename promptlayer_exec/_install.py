"""How to install an extra: the one place in the code that a release on an index changes."""

from __future__ import annotations

# The package is on no index yet. With double quotes it works in every shell, Windows's too.
_COMMAND = 'in a checkout of promptlayer-exec, run: python -m pip install ".[{extras}]"'


def install_hint(*extras: str) -> str:
    """Return the sentence that says how to install extras."""
    return _COMMAND.format(extras=",".join(extras))
