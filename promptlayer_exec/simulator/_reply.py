"""An answer of the server as a value."""

from collections.abc import Mapping

from aiohttp import web
from attrs import field, frozen

from ._scenario import encode

JSON_TYPE = {"Content-Type": "application/json"}


@frozen
class Reply:
    """A status, an exact body and headers."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(factory=dict)

    @classmethod
    def json(cls, status: int, text: str, headers: Mapping[str, str] | None = None) -> "Reply":
        """Send JSON text as the server does, with a newline behind it."""
        return cls(status, f"{text}\n".encode(), {**JSON_TYPE, **(headers or {})})

    @classmethod
    def error(cls, status: int, message: str, headers: Mapping[str, str] | None = None) -> "Reply":
        """Send the server's error object."""
        return cls.json(status, encode({"success": False, "message": message}), headers)

    def response(self) -> web.Response:
        """Make a response of it, which can be sent once."""
        return web.Response(status=self.status, body=self.body, headers=self.headers)
