"""How to install an extra: the one place in the code that a release on an index changes."""

from __future__ import annotations

from promptlayer_exec._version import __version__

# The package is on no index yet. With double quotes it works in every shell, Windows's too.
_COMMAND = 'python -m pip install ".[{extras}]"'
_WHEEL = f'"./promptlayer_exec-{__version__}-py3-none-any.whl[{{extras}}]"'


def install_hint(*extras: str) -> str:
    """Return what must be installed, and how: `the extra "cli": install ... again with it, ...`."""
    named = " and ".join(f'"{extra}"' for extra in extras)
    which, it = ("extra", "it") if len(extras) == 1 else ("extras", "them")
    brackets = ",".join(extras)
    return (
        f"the {which} {named}: install promptlayer-exec again with {it}, for example"
        f" {_COMMAND.format(extras=brackets)} in a checkout, or"
        f" {_WHEEL.format(extras=brackets)} where you have a wheel"
    )
