"""A page that shows executions as they run (extra `viewer`): `promptlayer-exec view`."""

try:
    from promptlayer_exec.viewer._board import Board
    from promptlayer_exec.viewer._guard import Address
    from promptlayer_exec.viewer._server import create_app, listen, serve
except ModuleNotFoundError as error:
    error.add_note("this needs an extra: pip install 'promptlayer-exec[viewer]'")
    raise

__all__ = ["Address", "Board", "create_app", "listen", "serve"]
