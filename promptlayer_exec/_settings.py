"""Reading and checking the settings of a session; each check raises `ConfigurationError`."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from typing import Any

from yarl import URL

from promptlayer_exec._errors import ConfigurationError

DEFAULT_BASE_URL = "https://api.promptlayer.com"
_KEY_VARIABLE = "PROMPTLAYER_API_KEY"
_URL_VARIABLE = "PROMPTLAYER_BASE_URL"
_TRUST_VARIABLE = "PROMPTLAYER_EXEC_TRUST_ENV"
_YES = ("1", "true", "yes", "on")
_NO = ("", "0", "false", "no", "off")


def find_api_key(api_key: str | None) -> str | None:
    """Return the API key: the argument, else `$PROMPTLAYER_API_KEY`, else None.

    An empty variable counts as unset. The error for a key that cannot be sent does not show it.
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
            "remove white space, line breaks and typographic quotation marks"
        )
    return api_key


def find_base_url(base_url: str | None) -> str:
    """Return the base URL: the argument, else `$PROMPTLAYER_BASE_URL`, else PromptLayer's.

    It is percent-encoded and has no trailing slash. An empty variable counts as unset.
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
        (url.raw_host or "").encode("idna")  # name resolution will do the same
    except ValueError:
        # The cause would show the URL, and a password in it.
        raise ConfigurationError(f"{source} must be a valid URL") from None
    if url.raw_user is not None or url.raw_password is not None:
        raise ConfigurationError(f"{source} must not contain a user name or password")
    if url.scheme not in ("http", "https") or not url.host or not port_is_valid:
        raise ConfigurationError(
            f"{source} must be an http:// or https:// URL with a host, got {base_url!r}"
        )
    if url.raw_query_string or url.raw_fragment:
        raise ConfigurationError(f"{source} must not have a query or fragment, got {base_url!r}")
    return str(url).rstrip("/")


def sends_in_the_clear(base_url: str) -> bool:
    """Return True if the API key would be sent over a network without encryption."""
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


def find_trust_env(trust_env: bool) -> bool:
    """Return whether the argument or `$PROMPTLAYER_EXEC_TRUST_ENV` asks for proxies and .netrc."""
    if not isinstance(trust_env, bool):
        raise ConfigurationError(f"trust_env must be True or False, got {trust_env!r:.100}")
    value = os.environ.get(_TRUST_VARIABLE, "").lower()
    if value not in (*_YES, *_NO):
        raise ConfigurationError(f"{_TRUST_VARIABLE} must be 1 or 0, got {value!r:.100}")
    return trust_env or value in _YES


def check_kind(name: str, value: Any, kind: type, meant: str) -> None:
    """Check that a setting is an instance of a class; the error says what is `meant`."""
    if not isinstance(value, kind):
        raise ConfigurationError(f"{name} must be {meant}, got {value!r:.100}")


def check_limiter(limiter: Any) -> None:
    """Check that a limiter is an object with a method `acquire`."""
    if isinstance(limiter, type) or not callable(getattr(limiter, "acquire", None)):
        raise ConfigurationError(
            f"limiter must be an object with `async def acquire(self)`, got {limiter!r:.100}"
        )


def check_observers(observers: Any) -> None:
    """Check that observers are several callables."""
    if isinstance(observers, str) or not isinstance(observers, Iterable):
        raise ConfigurationError(f"observers must be a list of callables, got {observers!r:.100}")
    for observer in observers:
        if not callable(observer):
            raise ConfigurationError(f"observers must be callable, got {observer!r:.100}")


def check_count(name: str, value: Any) -> int:
    """Return a setting that must be an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} must be an int of at least 1, got {value!r:.100}")
    return value
