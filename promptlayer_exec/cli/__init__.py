"""The command line (extra `cli`): `promptlayer-exec`, or `python -m promptlayer_exec`."""

from promptlayer_exec.cli._app import app, main

__all__ = ["app", "main"]
