"""A page that shows executions as they run (extra `viewer`): `promptlayer-exec view`."""

from ._address import Address
from ._app import create_app
from ._board import Board
from ._server import listen, serve

__all__ = ["Address", "Board", "create_app", "listen", "serve"]
