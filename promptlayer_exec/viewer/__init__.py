"""A page that shows executions as they run (extra `viewer`): `promptlayer-exec view`."""

try:
    from ._address import Address
    from ._app import create_app
    from ._board import Board
    from ._server import listen, serve
except ModuleNotFoundError as error:
    error.add_note("this needs an extra: pip install 'promptlayer-exec[viewer]'")
    raise

__all__ = ["Address", "Board", "create_app", "listen", "serve"]
