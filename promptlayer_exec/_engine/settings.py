"""Reads and checks the settings of a session. Each check raises `ConfigurationError`."""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Callable, Sequence
from inspect import iscoroutinefunction, isroutine
from types import EllipsisType
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies, proxy_bypass

import attrs
import cattrs
from yarl import URL

from promptlayer_exec._values.arguments import check_count
from promptlayer_exec._values.errors import ConfigurationError
from promptlayer_exec._values.events import Observer
from promptlayer_exec._values.policies import (
    Deadline,
    Limiter,
    PollPolicy,
    RetryPolicy,
    check_seconds,
)
from promptlayer_exec._values.start_records import StartStore
from promptlayer_exec.webhooks import Callbacks

if TYPE_CHECKING:
    import aiohttp

    from promptlayer_exec._engine.backplane import Backplane

DEFAULT_BASE_URL = "https://api.promptlayer.com"


def find_api_key(api_key: str | None) -> str | None:
    """Return the API key: the argument, else `$PROMPTLAYER_API_KEY`, else None.

    An empty variable counts as unset. The error for a malformed key does not show it.
    """
    source = "api_key"
    if api_key is None:
        source = "PROMPTLAYER_API_KEY"
        api_key = os.environ.get(source) or None
    if api_key is None:
        return None

    if not _matches(r"[\x21-\x7e]+", api_key):
        raise ConfigurationError(
            f"{source} must be a non-empty string of visible ASCII characters",
            advice="Remove any white space, line breaks and typographic quotation marks.",
            setting="api_key",
        )
    return api_key


def find_base_url(base_url: str | None) -> str:
    """Return the base URL: the argument, else `$PROMPTLAYER_BASE_URL`, else PromptLayer's.

    It is percent-encoded and has no trailing slash. An empty variable counts as unset.
    """
    source = "base_url"
    if base_url is None:
        source = "PROMPTLAYER_BASE_URL"
        base_url = os.environ.get(source) or DEFAULT_BASE_URL

    def refused(rule: str, got: str | None = None) -> ConfigurationError:
        return ConfigurationError(f"{source} must {rule}", setting="base_url", got=got)

    if not _matches(r"[^\s\x00-\x20\x7f]+", base_url):
        raise refused("be a URL without white space or line breaks")
    try:
        url = URL(base_url)
        port_is_valid = url.port is not None
        # `host` raises if the name cannot be decoded. Name resolution encodes `raw_host`.
        if url.host and url.raw_host:
            url.raw_host.encode("idna")
    except ValueError:
        # The cause would show the URL, with any password.
        raise refused("be a valid URL") from None

    if url.raw_user is not None or url.raw_password is not None:
        raise refused("not contain a user name or password")
    if url.scheme not in ("http", "https") or not url.host or not port_is_valid:
        raise refused("be an http:// or https:// URL with a host", repr(base_url))
    # aiohttp would reject `127.1` in each request, and blame the URL of a proxy.
    if _matches(r"[\d.]+", url.host) and _ip_address(url.host) is None:
        raise refused("have the name or the complete IP address of a host", repr(base_url))
    if url.raw_query_string or url.raw_fragment:
        raise refused("not have a query or fragment", repr(base_url))

    return str(url).rstrip("/")


def sends_in_the_clear(base_url: str) -> bool:
    """Return True if the API key would be sent over a network without encryption."""
    url = URL(base_url)
    return url.scheme == "http" and not _is_loopback(url.host or "")


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _ip_address(host)
    return address is not None and address.is_loopback


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _find_push(push: Any) -> Any:
    """Return the argument, or else the environment variable, which can also turn push off."""
    text = os.environ.get("PROMPTLAYER_EXEC_PUSH", "").lower()

    if text in ("1", "true", "yes", "on"):
        return True if push is None else push
    if text in ("0", "false", "no", "off"):
        return False if push is None or push is True else push
    if text:
        rule = "PROMPTLAYER_EXEC_PUSH must be 1 or 0"
        raise ConfigurationError(rule, setting="push", got=f"{text!r:.100}")
    return push


def find_proxy(settings: Settings, base_url: str) -> str | None:
    """Return the URL of the proxy that the environment names for the server, or None.

    Requests to a loopback host never use a proxy.
    """
    url = URL(base_url)
    if not settings.trust_env or _is_loopback(url.host or ""):
        return None

    proxy = getproxies().get(url.scheme)
    if not proxy or proxy_bypass(f"{url.host}:{url.port}"):
        return None
    if "://" not in proxy:
        proxy = f"http://{proxy}"

    try:
        parsed = URL(proxy)
        is_valid = parsed.scheme in ("http", "https") and bool(parsed.host)
        # aiohttp uses this encoding, and its errors would show the password.
        (parsed.password or "").encode("latin-1")
    except ValueError:
        is_valid = False
    if not is_valid:
        # The error does not show the URL, which may contain a password.
        raise ConfigurationError(
            f"{url.scheme.upper()}_PROXY must be a URL like http://user:password@host:port",
            advice="To use no proxy, set NO_PROXY=* or pass trust_env=False.",
            setting="trust_env",
        )

    return str(parsed)


def _refused(setting: str, meant: str, got: str) -> ConfigurationError:
    return ConfigurationError(f"{setting} must be {meant}", setting=setting, got=got)


Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _is(kind: type, meant: str, *, optional: bool = False) -> Validator:
    def check(_: Any, setting: attrs.Attribute[Any], value: Any) -> None:
        if not isinstance(value, kind) and not (optional and value is None):
            raise _refused(setting.name, meant, f"{value!r:.100}")

    return check


def _is_backplane(_: Any, __: Any, value: Any) -> None:
    if value is not None and (isinstance(value, type) or not hasattr(value, "connect")):
        meant = (
            "a promptlayer_exec.redis.RedisBackplane, such as RedisBackplane('redis://localhost')"
        )
        raise _refused("backplane", meant, type(value).__name__)


def _is_start_store(_: Any, __: Any, value: Any) -> None:
    if value is not None and (isinstance(value, type) or not hasattr(value, "claim")):
        meant = "a promptlayer_exec.starts.SQLStartStore, such as SQLStartStore()"
        raise _refused("starts", meant, type(value).__name__)


def _is_http(owner: Any, setting: attrs.Attribute[Any], value: Any) -> None:
    if value is None:
        return
    import aiohttp  # noqa: PLC0415 - slow: otherwise, the session imports it when it opens

    _is(aiohttp.ClientSession, "an aiohttp.ClientSession")(owner, setting, value)


def _seconds(_: Any, setting: attrs.Attribute[Any], value: Any) -> None:
    if value is not None or setting.name == "request_timeout":
        check_seconds(setting.name, value, zero=setting.name == "wait_timeout")


def _none_if_infinite(timeout: float | None) -> float | None:
    if timeout == math.inf:
        return None
    return timeout


def _count(_: Any, setting: attrs.Attribute[Any], value: Any) -> None:
    check_count(setting.name, value)


def _acquirable(_: Any, __: Any, value: Any) -> None:
    acquire = getattr(value, "acquire", None)
    is_sync = isroutine(acquire) and not iscoroutinefunction(acquire)
    if value is not None and (isinstance(value, type) or not callable(acquire) or is_sync):
        raise _refused("limiter", "an object with `async def acquire(self)`", f"{value!r:.100}")


def _callables(_: Any, __: Any, value: Any) -> None:
    if not isinstance(value, Sequence):
        raise _refused("observers", "a list of callables", f"{value!r:.100}")
    for observer in value:
        if not callable(observer) or iscoroutinefunction(observer):
            raise _refused("observers", "callables that are not async", f"{observer!r:.100}")


@attrs.frozen(kw_only=True)
class Settings:
    """The checked settings of a session. `Session` documents them."""

    # The session reads both again when it opens: a program may set its environment in between.
    api_key: str | None = attrs.field(repr=False)
    base_url: str | None
    poll: PollPolicy = attrs.field(
        validator=_is(PollPolicy, "a PollPolicy, such as PollPolicy.fixed(2.0)")
    )
    retry: RetryPolicy = attrs.field(
        validator=_is(RetryPolicy, "a RetryPolicy, such as RetryPolicy(outage=10.0)")
    )
    wait_timeout: float | None = attrs.field(validator=_seconds, converter=_none_if_infinite)
    request_timeout: float = attrs.field(validator=_seconds)
    max_connections: int = attrs.field(validator=_count)
    max_response_bytes: int = attrs.field(validator=_count)
    rate: float | None = attrs.field(validator=_seconds)
    limiter: Limiter | None = attrs.field(validator=_acquirable)
    http: aiohttp.ClientSession | None = attrs.field(validator=_is_http)
    converter: cattrs.Converter | None = attrs.field(
        validator=_is(cattrs.Converter, "a cattrs.Converter", optional=True)
    )
    observers: Sequence[Observer] = attrs.field(validator=_callables)
    push: bool | None = attrs.field(
        validator=_is(bool, "None, True or False", optional=True), converter=_find_push
    )
    check_inputs: bool = attrs.field(validator=_is(bool, "True or False"))
    trust_env: bool = attrs.field(validator=_is(bool, "True or False"))
    callbacks: Callbacks | None = attrs.field(
        validator=_is(Callbacks, "a promptlayer_exec.webhooks.Callbacks", optional=True)
    )
    backplane: Backplane | None = attrs.field(validator=_is_backplane, repr=False)
    starts: StartStore | None = attrs.field(validator=_is_start_store)

    def deadline(self, timeout: float | EllipsisType | None, *, now: float) -> Deadline:
        """Return the deadline of a wait that begins now. `...` means the default timeout."""
        if timeout is ...:
            timeout = self.wait_timeout
        return Deadline.after(timeout, now=now)

    def __attrs_post_init__(self) -> None:
        find_api_key(self.api_key)
        find_base_url(self.base_url)
