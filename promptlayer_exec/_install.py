"""How to install an extra. Once the package is on an index, only this module changes."""

from __future__ import annotations

from promptlayer_exec._version import __version__


def install_hint(*extras: str) -> str:
    """Return what must be installed, and how: `the extra "cli": install ... again with it, ...`."""
    named = " and ".join(f'"{extra}"' for extra in extras)
    what = f"the extra {named}: install promptlayer-exec again with it"
    if len(extras) > 1:
        what = f"the extras {named}: install promptlayer-exec again with them"

    # The package is on no index yet. Double quotes work in every shell, also on Windows.
    brackets = f"[{','.join(extras)}]"
    return (
        f'{what}, for example python -m pip install ".{brackets}" in a checkout, or'
        f' "./promptlayer_exec-{__version__}-py3-none-any.whl{brackets}" where you have a wheel'
    )
