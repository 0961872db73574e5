"""The seam for the package's own integrations; most of it is tested through them."""

from __future__ import annotations

import pytest

from promptlayer_exec import (
    ConfigurationError,
    InvalidOutput,
    InvalidResponse,
    Session,
    SessionClosed,
    StartRequest,
    _integration,
)
from promptlayer_exec._integration import check_inputs, log_text
from promptlayer_exec.simulator import Fault, Scenario, Simulator


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConfigurationError("no\nkey"), r"ConfigurationError: no\nkey"),
        (
            InvalidResponse("not JSON", status=200, excerpt="secret", execution_id=7),
            "InvalidResponse: execution 7: not JSON",
        ),
        (
            InvalidOutput("got 'secret'", path="$.a", value="secret", reason="secret"),
            "InvalidOutput: at $.a",
        ),
        (ValueError("secret"), "ValueError"),
    ],
)
def test_a_log_quotes_no_value(error: Exception, text: str) -> None:
    """Outputs stay in the error's attributes."""
    assert log_text(error) == text


async def test_inputs_are_checked_for_the_version_that_would_run(
    sim: Simulator, session: Session
) -> None:
    """A label or a number selects it; nothing is started."""
    sim.add_workflow("w", Scenario([]), inputs={"topic": "string"}, labels=["prod"])
    sim.add_version("w", Scenario([]), inputs={"text": "string"})
    for request, name in (
        (StartRequest("w", {"topik": 1}, label="prod"), "'topic'"),
        (StartRequest("w", {"topik": 1}, version=1), "'topic'"),
        (StartRequest("w", {"topik": 1}), "'text'"),
    ):
        with pytest.raises(ValueError, match=f"needs the input {name}"):
            await check_inputs(session, request)
    checked = await check_inputs(session, StartRequest("w", {"topic": 1}, label="prod"))
    assert checked is not None
    assert checked.version == 1
    assert sim.runs == []


async def test_what_cannot_be_sent_is_found_before_any_request(
    sim: Simulator, session: Session
) -> None:
    """It is what `start` would refuse."""
    with pytest.raises(TypeError, match=r"inputs\.x"):
        await check_inputs(session, StartRequest("w", {"x": {1}}))
    with pytest.raises(ValueError, match="either label or version"):
        await check_inputs(session, StartRequest("w", label="a", version=1))
    assert sim.request_count == 0


async def test_a_start_goes_on_without_a_definition(
    sim: Simulator, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the server refuses it, answers something else, or takes too long."""
    monkeypatch.setattr(_integration, "DEFINITION_TIMEOUT", 0.05)
    sim.add_workflow("w", Scenario([]), inputs={"topic": "string"})
    for fault in (Fault.status(403), Fault.status(200, body=b"[]"), Fault.stall()):
        sim.inject(fault)
        assert await check_inputs(session, StartRequest("w")) is None
    await session.aclose()
    with pytest.raises(SessionClosed):
        await check_inputs(session, StartRequest("w"))
