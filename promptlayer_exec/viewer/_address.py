"""The address of the viewer, and the names that requests may use for it."""

from __future__ import annotations

import ipaddress

import attrs

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - to recognise them


@attrs.frozen
class Address:
    """The host and port that the viewer listens on.

    Args:
        host: an IP address or a host name.
        port: the port.
    """

    host: str
    port: int

    @property
    def base_url(self) -> str:
        """The URL of the viewer on its own machine."""
        host = "127.0.0.1" if self.host in _WILDCARDS else _in_url(self.host)
        return f"http://{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only its own machine can reach it."""
        return _in_url(self.host) in _LOOPBACK or (_is_ip(self.host) and self._ip.is_loopback)

    def is_meant(self, host: str) -> bool:
        """Return True if a `Host` header names this server; any other may be DNS rebinding."""
        name, _, port = host.lower().rpartition(":")
        if self.port == 80 and not port.isdecimal():
            name, port = host.lower(), "80"
        if port != str(self.port):
            return False
        if self.host in _WILDCARDS and _is_ip(name.strip("[]")):
            return True
        return name in (*_LOOPBACK, _in_url(self.host))

    @property
    def _ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        return ipaddress.ip_address(self.host)


def _in_url(host: str) -> str:
    return f"[{host.lower()}]" if ":" in host else host.lower()


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
