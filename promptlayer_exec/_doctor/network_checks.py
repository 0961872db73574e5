"""From the base URL to the first response."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import os
import socket
import ssl
from datetime import UTC, datetime

from yarl import URL

from promptlayer_exec._advice import TLS_ADVICE
from promptlayer_exec._doctor.examination import Examination
from promptlayer_exec._doctor.exchanges import Exchange, NoResponse, Wire
from promptlayer_exec._doctor.report import Finding, broken_rule, differs, failed, ok, skipped
from promptlayer_exec._engine.settings import (
    DEFAULT_BASE_URL,
    find_base_url,
    find_proxy,
    sends_in_the_clear,
)
from promptlayer_exec._values.errors import ConfigurationError

REQUEST_TIMEOUT = 10.0
_LIST = "/workflows?page=1&per_page=1"
_FEW_DAYS = 7


async def check_base_url(examination: Examination) -> Finding:
    try:
        base_url = find_base_url(examination.scope.base_url)
    except ConfigurationError as error:
        return failed(broken_rule(error), "Correct --base-url or PROMPTLAYER_BASE_URL.")
    examination.base_url = base_url

    if base_url == DEFAULT_BASE_URL:
        return ok("PromptLayer's own", place=base_url)
    if host := URL(base_url).host:
        examination.hosts.append(host)
    if sends_in_the_clear(base_url):
        return differs(
            "https, or a host on this machine",
            "http: anyone on the network path can read the API key and every output",
            "Use https.",
        )
    return ok("not PromptLayer's own", place=base_url)


async def check_proxy(examination: Examination) -> Finding:
    """Find the proxy as a session does, and try to reach it."""
    try:
        proxy = find_proxy(examination.settings, examination.base_url)
    except ConfigurationError as error:
        return failed(broken_rule(error), "Correct the variable, or set NO_PROXY=*.")
    if proxy is None:
        return ok("none, the connection is direct")

    url = URL(proxy)
    examination.proxy = proxy
    examination.hosts.append(url.host or "")
    if url.password:
        # A connection error may show it in either form.
        examination.private += [url.password, url.raw_password or ""]

    place = f"{url.host}:{url.port}"
    try:
        await _connect(url.host or "", url.port or 0)
    except OSError as error:
        return failed(
            f"could not reach the proxy: {_reason(error)}",
            "Correct HTTPS_PROXY or HTTP_PROXY, or name the server's host in NO_PROXY.",
            place=place,
        )
    return ok("in use and reachable", place=place)


async def _connect(host: str, port: int) -> None:
    async with asyncio.timeout(REQUEST_TIMEOUT):
        _, writer = await asyncio.open_connection(host, port)
    writer.close()


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError) and error.errno is None:
        return f"no response within {REQUEST_TIMEOUT:g} s"
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or "every address of it refused"


async def check_name(examination: Examination) -> Finding:
    """Resolve the host's name."""
    url = URL(examination.base_url)
    if examination.proxy is not None:
        return ok("done by the proxy")
    if _is_address(url.host or ""):
        return ok("not needed: the base URL contains an IP address")

    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT):
            found = await loop.getaddrinfo(
                url.raw_host or "", url.port or 0, type=socket.SOCK_STREAM
            )
    except OSError as error:
        return failed(
            f"cannot resolve the host's name: {_reason(error)}",
            "Check --base-url, the network and its DNS. Behind a proxy, set HTTPS_PROXY.",
            place=url.host or "",
        )

    kinds = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}
    families = sorted({kinds.get(family, "other") for family, *_ in found})
    return ok(f"{', '.join(families)} in {brief(loop.time() - began)}")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def check_tls(examination: Examination) -> Finding:
    """Make the first request, and look at the certificate of its connection."""
    wire = examination.wire = Wire(
        examination.base_url, examination.proxy, REQUEST_TIMEOUT, examination.recorder
    )
    examination.resources.push_async_callback(wire.aclose)
    try:
        examination.first_contact = await wire.ask("GET", _LIST, with_key=False)
    except NoResponse as error:
        examination.first_contact = error

    if not examination.base_url.startswith("https:"):
        return skipped("the base URL is http")
    if isinstance(examination.first_contact, NoResponse):
        if (problem := examination.first_contact.tls) is not None:
            return failed(f"no TLS connection: {examination.first_contact}", TLS_ADVICE[problem])
        return skipped("no connection was made")
    return _describe_tls(wire.tls)


def _describe_tls(connection: ssl.SSLObject | None) -> Finding:
    certificate = None if connection is None else connection.getpeercert()
    if connection is None or not certificate:
        return ok("in use")

    until = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    days = math.floor((until - datetime.now(UTC).timestamp()) / 86400)
    if days < _FEW_DAYS:
        return differs(
            f"a certificate that is valid for another {_FEW_DAYS} days",
            f"one that expires in {days} days",
            "Tell the server's operator: connections fail once it has expired.",
        )
    return ok(f"{connection.version()}, the certificate is valid for another {days} days")


async def check_response(examination: Examination) -> Finding:
    """Judge the first response, and measure the latency of two more requests."""
    first = examination.first_contact
    if isinstance(first, NoResponse):
        if first.tls is not None:
            return skipped("the check 'TLS' did not pass")
        return failed(
            f"could not reach the server: {first}", _advice(str(first)), place=examination.base_url
        )

    if first.status == 407:
        return failed(f"the proxy refused the request: {first.status_name}", _PROXY_ADVICE)
    if 300 <= first.status < 400:
        return failed(
            f"the server redirects: {first.status_name}",
            "Use the URL that it redirects to as --base-url: sessions follow no redirect.",
        )
    if first.status >= 500:
        return failed(f"the server responded {first.status_name}", "Try again later.")

    later: list[Exchange] = [
        await examination.wire.ask("GET", _LIST, with_key=False) for _ in range(2)
    ]
    latency = min(exchange.duration for exchange in later)
    return ok(
        f"{first.status_name} to a request without the key, after {brief(first.duration)} with a"
        f" new connection and {brief(latency)} with an open one"
    )


_PROXY_ADVICE = "Check the user and the password in HTTPS_PROXY, and what the proxy allows."


def _advice(found: str) -> str:
    if "proxy refused" in found:
        return _PROXY_ADVICE
    return "Check the network and --base-url. If you need a proxy, set HTTPS_PROXY."


def brief(seconds: float) -> str:
    """Return a duration in milliseconds or seconds."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    if seconds < 0.001:
        return "under 1 ms"
    return f"{seconds * 1000:.0f} ms"
