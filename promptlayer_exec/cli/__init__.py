"""The command line (extra `cli`): `promptlayer-exec`, or `python -m promptlayer_exec`."""

from ._app import app, main

__all__ = ["app", "main"]
