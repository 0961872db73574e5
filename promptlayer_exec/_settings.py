"""The settings of a session, checked."""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Any

from yarl import URL

from promptlayer_exec._errors import ConfigurationError

DEFAULT_BASE_URL = "https://api.promptlayer.com"
_KEY_VARIABLE = "PROMPTLAYER_API_KEY"
_URL_VARIABLE = "PROMPTLAYER_BASE_URL"


def find_api_key(api_key: str | None) -> str | None:
    """Return the API key: the argument, else `$PROMPTLAYER_API_KEY`, else None.

    Raises:
        ConfigurationError: it cannot be sent as a header. The message does not show it.
    """
    source = "api_key"
    if api_key is None:
        source = _KEY_VARIABLE
        api_key = os.environ.get(_KEY_VARIABLE) or None
    if api_key is None:
        return None
    if not _matches(r"[\x21-\x7e]+", api_key):
        raise ConfigurationError(
            f"{source} must be a non-empty string of visible ASCII characters: "
            "look for white space, line breaks or quotation marks that came along when it was read"
        )
    return api_key


def find_base_url(base_url: str | None) -> str:
    """Return the base URL, percent-encoded and without a trailing slash.

    It is the argument, else `$PROMPTLAYER_BASE_URL`, else PromptLayer's own.

    Raises:
        ConfigurationError: it is no plain http or https URL.
    """
    source = "base_url"
    if base_url is None:
        source = _URL_VARIABLE
        base_url = os.environ.get(_URL_VARIABLE) or DEFAULT_BASE_URL
    if not _matches(r"[^\s\x00-\x20\x7f]+", base_url):
        raise ConfigurationError(f"{source} must be a URL without white space or line breaks")
    try:
        url = URL(base_url)
        port_is_valid = url.port is not None
        (url.raw_host or "").encode("idna")  # as name resolution will
    except ValueError:
        # The message of the cause shows the URL, and with it any password.
        raise ConfigurationError(f"{source} is no valid URL") from None
    if url.raw_user is not None or url.raw_password is not None:
        raise ConfigurationError(f"{source} must not carry a user name or password")
    if url.scheme not in ("http", "https") or not url.host or not port_is_valid:
        raise ConfigurationError(f"{source} must begin with http:// or https://, not {base_url!r}")
    if url.raw_query_string or url.raw_fragment:
        raise ConfigurationError(f"{source} must not have a query or fragment: {base_url!r}")
    return str(url).rstrip("/")


def sends_in_the_clear(base_url: str) -> bool:
    """Tell whether the key would travel over a network unencrypted."""
    url = URL(base_url)
    host = url.host or ""
    if url.scheme != "http" or host == "localhost" or host.endswith(".localhost"):
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def _matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def check_count(name: str, value: Any) -> int:
    """Return `value`, an int of at least 1.

    Raises:
        ConfigurationError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} must be an int of at least 1, not {value!r}")
    return value
