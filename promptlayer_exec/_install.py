"""How to install an extra. Once the package is on an index, only this module changes."""

from __future__ import annotations

from promptlayer_exec._version import __version__


def install_hint(*extras: str) -> str:
    """Return which extra is missing and how to install it: `the extra "cli" (python ...)`."""
    named = " and ".join(f'"{extra}"' for extra in extras)
    plural = "s" if len(extras) > 1 else ""

    # The package is on no index yet. Double quotes work in every shell, even on Windows.
    brackets = f"[{','.join(extras)}]"
    return (
        f'the extra{plural} {named} (python -m pip install ".{brackets}" in a checkout, or'
        f' "./promptlayer_exec-{__version__}-py3-none-any.whl{brackets}" with a wheel)'
    )
