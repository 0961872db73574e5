"""The seam for the package's own integrations; most of it is tested through them."""

from __future__ import annotations

import pytest

from promptlayer_exec import ConfigurationError, InvalidOutput, InvalidResponse
from promptlayer_exec._integration import log_text


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
            "InvalidOutput: the output does not match at $.a",
        ),
        (ValueError("secret"), "ValueError"),
    ],
)
def test_a_log_quotes_no_value(error: Exception, text: str) -> None:
    """Outputs stay in the error's attributes."""
    assert log_text(error) == text
