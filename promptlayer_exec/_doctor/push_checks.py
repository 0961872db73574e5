"""Push: a token, a WebSocket and a subscription, as a session would use them."""

from __future__ import annotations

import asyncio

from promptlayer_exec._api.messages import decode
from promptlayer_exec._doctor.examination import Examination
from promptlayer_exec._doctor.exchanges import NoResponse
from promptlayer_exec._doctor.listener import Listener, NotSubscribed
from promptlayer_exec._doctor.network_checks import REQUEST_TIMEOUT, brief
from promptlayer_exec._doctor.report import Finding, differs, failed, ok, skipped
from promptlayer_exec._doctor.workflow_checks import REPORT_IT
from promptlayer_exec._push.channels import read_token, token_request
from promptlayer_exec._values.errors import InvalidResponse, RequestError

_POLLED = "Sessions poll instead. `push=False` or PROMPTLAYER_EXEC_PUSH=0 saves the attempts."


async def check_token(examination: Examination) -> Finding:  # noqa: PLR0911 - a table
    if examination.settings.push is False:
        return skipped("PROMPTLAYER_EXEC_PUSH turns push off")
    if examination.workflow_id is None:
        return skipped("the id of a workflow is not known")

    channel = f"workflows:{examination.workflow_id}:run:{examination.suffix}"
    exchange = await examination.wire.ask("POST", token_request(channel).target)
    if exchange.status >= 300:
        return failed(f"push unavailable ({exchange.status_name})", _POLLED)
    try:
        examination.token = read_token(exchange.response)
    except InvalidResponse:
        return failed(f"push unavailable ({exchange.status_name} without a token)", _POLLED)
    examination.channel = channel

    if exchange.status != 201:
        return differs("201 Created", exchange.status_name, f"This package accepts it. {REPORT_IT}")
    backend = decode(exchange.response).get("messaging_backend")
    if backend != "centrifugo":
        named = "another one" if backend else "none"
        return differs(
            "'centrifugo' as messaging_backend", named, f"Push may not work. {REPORT_IT}"
        )
    return ok(f"issued in {brief(exchange.duration)}")


async def check_websocket(examination: Examination) -> Finding:
    try:
        socket = await examination.wire.open_websocket("/connection/websocket")
    except NoResponse as error:
        return failed(
            f"push unavailable: could not open the WebSocket: {error}",
            f"A proxy or a firewall may block WebSockets. {_POLLED}",
        )
    examination.socket = socket
    examination.resources.push_async_callback(socket.close)
    return ok("opened")


async def check_subscription(examination: Examination) -> Finding:
    """Subscribe to the channel of a run that may follow."""
    listener = Listener(examination.channel)
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        await listener.subscribe(examination.socket, examination.token, REQUEST_TIMEOUT)
    except NotSubscribed as error:
        return failed(f"push unavailable: could not subscribe: {error}", _POLLED)

    examination.listener = listener
    examination.resources.push_async_callback(listener.aclose)
    return ok(f"accepted in {brief(loop.time() - began)}")


async def listen_to_updates(examination: Examination, execution_id: int) -> Listener | None:
    """Return a subscription to the channel that only the execution's id names, None if it fails."""
    listener = Listener(f"workflow_updates:{execution_id}")
    try:
        exchange = await examination.wire.ask("POST", token_request(listener.channel).target)
        token = read_token(exchange.response)
        socket = await examination.wire.open_websocket("/connection/websocket")
        examination.resources.push_async_callback(socket.close)
        await listener.subscribe(socket, token, REQUEST_TIMEOUT)
    except (NoResponse, NotSubscribed, RequestError):
        return None
    examination.resources.push_async_callback(listener.aclose)
    return listener
