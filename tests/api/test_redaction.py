"""The key is not shown by what the library keeps of it, nor by what it says."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from promptlayer_exec import ConnectionFailed, RetryPolicy, Session


@pytest.mark.parametrize("borrowed", [False, True])
async def test_the_key_is_not_in_the_variables_of_a_traceback(
    raw_server: Any, *, borrowed: bool
) -> None:
    """Error trackers and test runners show the repr of each."""
    await raw_server.refuse()
    async with aiohttp.ClientSession() as theirs:
        settings: Any = {"http": theirs if borrowed else None, "retry": RetryPolicy(outage=0.0)}
        async with Session("secret-key", base_url=raw_server.url, **settings) as session:
            for call in (session.get_results(1), session.start("name")):
                with pytest.raises(ConnectionFailed) as caught:
                    await call
                frames = [entry for entry in caught.traceback if "/tests/" not in str(entry.path)]
                shown = repr([list(entry.frame.f_locals.values()) for entry in frames])
                assert len(frames) > 3
                assert "secret-key" not in shown
