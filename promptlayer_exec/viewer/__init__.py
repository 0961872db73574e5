"""A page that shows executions as they run (extra `viewer`): `promptlayer-exec view`."""

from promptlayer_exec._integration import install_hint

try:
    from promptlayer_exec.viewer._board import Board
    from promptlayer_exec.viewer._guard import Address
    from promptlayer_exec.viewer._history import History
    from promptlayer_exec.viewer._serving import create_app, listen, serve
except ModuleNotFoundError as error:
    error.add_note(f"this needs {install_hint('viewer')}")
    raise

__all__ = ["Address", "Board", "History", "create_app", "listen", "serve"]
