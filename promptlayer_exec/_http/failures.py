"""What is wrong with a connection, in words, and whether waiting may help."""

from __future__ import annotations

import os
import re
import ssl
from urllib.request import getproxies

import aiohttp
from yarl import URL

from promptlayer_exec._api.redaction import CREDENTIALS


class PermanentFailure(aiohttp.ClientError):
    """A failure that waiting will not fix; its text is safe to show."""


# Alerts of a server that refuses the handshake. Under TLS 1.3 they come after our last message.
_REFUSED_HANDSHAKE = re.compile("ALERT.*(CERTIFICATE|UNKNOWN_CA|HANDSHAKE|ACCESS_DENIED)")


def has_invalid_proxy() -> bool:
    """Return True if aiohttp cannot read the proxies of the environment, for all four schemes.

    The text of its own error may show a password.
    """
    proxies = getproxies()
    try:
        for scheme in ("http", "https", "ws", "wss"):
            URL(proxies.get(scheme, ""))
    except ValueError:
        return True
    return False


def is_permanent(error: BaseException | None) -> bool:
    """Return True if no connection can be made, and waiting will not change that."""
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return 400 <= error.status < 500 and error.status not in (408, 425, 429)
    return is_tls_failure(error) or isinstance(error, PermanentFailure | aiohttp.InvalidURL)


def is_tls_failure(error: BaseException | None) -> bool:
    """Return True if no TLS connection can be made."""
    if isinstance(error, PermanentFailure):
        error = error.__cause__
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        return not isinstance(error.os_error, ssl.SSLEOFError)  # the server disconnected
    if isinstance(error, (aiohttp.ClientSSLError, aiohttp.ServerFingerprintMismatch)):
        return True
    return isinstance(error, ssl.SSLError) and bool(_REFUSED_HANDSHAKE.search(str(error.reason)))


def tls_peer(error: BaseException | None, base_url: str) -> str:
    """Return who failed a handshake: the server, or the https proxy that aiohttp's error names."""
    if isinstance(error, PermanentFailure):
        error = error.__cause__
    url, host, port = URL(base_url), getattr(error, "host", None), getattr(error, "port", None)
    is_server = host is None or (host, port) == (url.raw_host, url.port)
    return base_url if is_server else f"the proxy {host}:{port}"


def _tls_reason(error: BaseException) -> str:
    """Return what is wrong with a TLS connection, and what to do about it."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        error = error.certificate_error
    elif isinstance(error, aiohttp.ClientConnectorSSLError):
        error = error.os_error
    if isinstance(error, ssl.SSLCertVerificationError):
        said = str(error.verify_message).rstrip(".")
        return (
            f"the server's certificate is not valid: {said}; if a private authority issued it, set"
            " SSL_CERT_FILE to that authority's certificate, or pass http= with an SSL context"
        )
    name = getattr(error, "reason", None) or str(error)
    if name == "WRONG_VERSION_NUMBER":
        return f"the server does not speak TLS on this port ({name}): check base_url"
    return (
        f"the handshake failed ({name}): if the server requires a client certificate or another TLS"
        " version, pass http= with an SSL context"
    )


def _connect_reason(error: aiohttp.ClientConnectorError) -> str:
    # aiohttp's own text shows its internal connection key.
    if error.errno is None:
        return str(error.os_error) or "the connection was closed while it was being made"
    return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)


def shows_secrets(error: BaseException | None) -> bool:
    """Return True if the repr of an error shows request headers, or the password of a proxy."""
    shown = aiohttp.ClientResponseError | aiohttp.InvalidURL
    return isinstance(error, shown) or _shows_password(error)


def _shows_password(error: BaseException | None) -> bool:
    return error is not None and (
        "BasicAuth(" in repr(error)
        or CREDENTIALS.search(repr(error)) is not None
        or _shows_password(error.__cause__)
        or _shows_password(error.__context__)
    )


def text_of(error: Exception) -> str:
    """Return the text of an error, and blank its repr if that may show the password of a proxy."""
    text = str(error) or repr(error)
    if isinstance(error, UnicodeError):  # its repr has all that could not be encoded
        error.args = ()
    return text


def reason_of(error: BaseException | None) -> str:
    if error is not None and is_tls_failure(error) and not isinstance(error, PermanentFailure):
        return _tls_reason(error)
    if (reason := _proxy_reason(error)) is not None:
        return reason
    if isinstance(error, aiohttp.ClientConnectorError):
        return _connect_reason(error)
    if isinstance(error, aiohttp.ClientResponseError):
        return f"not a valid HTTP response: {_unquoted(error.message)}"
    if isinstance(error, aiohttp.ClientOSError) and error.errno is None and error.__cause__:
        # aiohttp's text for a failed write does not say why.
        return reason_of(error.__cause__)
    # The text of aiohttp's own may show the headers of an answer that was cut in its head.
    is_cut = isinstance(error, aiohttp.ServerDisconnectedError)
    text = "Server disconnected" if is_cut else CREDENTIALS.sub("", str(error))
    return _unquoted(text) or type(error).__name__


def _proxy_reason(error: BaseException | None) -> str | None:
    """Return what is wrong with a proxy, without its password, which aiohttp's own text shows."""
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return f"the proxy refused the connection: {error.status} {_unquoted(error.message)}"
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return f"no connection to the proxy {error.host}:{error.port}: {_connect_reason(error)}"
    if isinstance(error, aiohttp.InvalidURL):  # not base_url: the session has checked that
        return "the URL of the proxy is not valid: it must be like http://user:password@host:port"
    return None


def _unquoted(text: str) -> str:
    """Remove the bytes that aiohttp's parsers quote: they may be the whole response."""
    return " ".join(re.split(r"(?:bytearray\()?b['\"]", text)[0].split()).rstrip(": ")[:200]
