"""Explains why a connection failed, and whether waiting may help."""

from __future__ import annotations

import os
import re
import ssl

import aiohttp
from yarl import URL

from promptlayer_exec._api.redaction import CREDENTIALS
from promptlayer_exec._values.errors import TLSProblem

# Alerts from a server that refuses the handshake. In TLS 1.3 they follow our last message.
_REFUSED_HANDSHAKE = re.compile("ALERT.*(CERTIFICATE|UNKNOWN_CA|HANDSHAKE|ACCESS_DENIED)")

# By OpenSSL's numbers. Others are those of an authority that this machine does not trust.
_CERTIFICATE_PROBLEMS: dict[int, TLSProblem] = {
    9: "expired",  # not yet valid, which also means that a clock is wrong
    10: "expired",
    62: "another host",
    64: "another host",  # an IP address
}


def is_permanent(error: BaseException) -> bool:
    """Return True if there can be no connection, and waiting will not change that."""
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return 400 <= error.status < 500 and error.status not in (408, 425, 429)
    return is_tls_failure(error) or isinstance(error, aiohttp.InvalidURL)


def is_unreachable(error: BaseException) -> bool:
    """Return True if there was no connection to the server, not even one that broke later."""
    kinds = aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError, aiohttp.InvalidURL
    return isinstance(error, kinds)


def is_tls_failure(error: BaseException | None) -> bool:
    """Return True if TLS failed, which means that the server has read no request."""
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        return not isinstance(error.os_error, ssl.SSLEOFError)  # the server disconnected
    if isinstance(error, (aiohttp.ClientSSLError, aiohttp.ServerFingerprintMismatch)):
        return True
    if isinstance(error, ssl.SSLError):
        return _REFUSED_HANDSHAKE.search(str(error.reason)) is not None
    # aiohttp makes the alert the cause of a lost connection.
    return isinstance(error, aiohttp.ClientError) and is_tls_failure(error.__cause__)


def tls_peer(error: BaseException, base_url: str) -> str:
    """Return the peer of a failed handshake: the server, or the https proxy in aiohttp's error."""
    url, host, port = URL(base_url), getattr(error, "host", None), getattr(error, "port", None)
    if host is None or (host, port) == (url.raw_host, url.port):
        return base_url
    return f"the proxy {host}:{port}"


def reason_of(error: BaseException) -> str:  # noqa: PLR0911 - a table
    """Return an error's message, without a proxy's password or a peer's quoted bytes."""
    if is_tls_failure(error):
        return _tls_reason(error)
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return f"the proxy refused the connection: {error.status} {_unquoted(error.message)}"
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return f"no connection to the proxy {error.host}:{error.port}: {_connect_reason(error)}"
    if isinstance(error, aiohttp.InvalidURL):  # of the proxy: the session has checked base_url
        return "the proxy's URL is invalid: it must look like http://user:password@host:port"
    if isinstance(error, aiohttp.ClientConnectorError):
        return _connect_reason(error)

    if isinstance(error, aiohttp.ClientResponseError):
        return f"the response is not valid HTTP: {_unquoted(error.message)}"
    if isinstance(error, aiohttp.ClientOSError) and error.errno is None and error.__cause__:
        return reason_of(error.__cause__)  # aiohttp's text for a failed write lacks the reason
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "Server disconnected"  # its own text may show the head of a response
    return _unquoted(CREDENTIALS.sub("", str(error))) or type(error).__name__


def tls_problem(error: BaseException) -> TLSProblem | None:
    """Return why TLS failed, in a word, or None if it did not."""
    if not is_tls_failure(error):
        return None
    cause = _tls_cause(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _CERTIFICATE_PROBLEMS.get(cause.verify_code, "certificate")
    if getattr(cause, "reason", None) == "WRONG_VERSION_NUMBER":
        return "no TLS"
    return "handshake"


def _tls_cause(error: BaseException) -> BaseException:
    cause: BaseException = error
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        cause = error.certificate_error
    elif isinstance(error, aiohttp.ClientConnectorSSLError):
        cause = error.os_error
    elif not isinstance(error, ssl.SSLError) and error.__cause__ is not None:
        cause = _tls_cause(error.__cause__)
    return cause


def _tls_reason(error: BaseException) -> str:
    cause = _tls_cause(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"the server's certificate is not valid: {str(cause.verify_message).rstrip('.')}"
    name = getattr(cause, "reason", None) or str(cause)
    if name == "WRONG_VERSION_NUMBER":
        return f"the server does not use TLS on this port ({name})"
    return f"the handshake failed: {name}"


def _connect_reason(error: aiohttp.ClientConnectorError) -> str:
    # aiohttp's own text shows its internal connection key.
    if isinstance(error, aiohttp.ClientConnectorDNSError):  # the host may be a proxy
        return f"cannot resolve the host name {error.host}: {error.os_error.strerror}"
    if error.errno is None:
        return str(error.os_error) or "the server closed the connection before it opened"
    if error.errno > 0:
        return os.strerror(error.errno)
    return str(error.strerror)


def _unquoted(text: str) -> str:
    """Remove the bytes that aiohttp's parsers quote: they may be the whole response."""
    return " ".join(re.split(r"(?:bytearray\()?b['\"]", text)[0].split()).rstrip(": ")[:200]
