"""The pytest plugin: a fixture with a PromptLayer simulator.

It is outside of the package because pytest imports it in every run, and importing a module of a
package imports the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from promptlayer_exec.simulator import Simulator


@pytest.fixture
def promptlayer_simulator() -> Iterator[Simulator]:
    """Return a running `promptlayer_exec.simulator.Simulator`, for any kind of test.

    It serves in a thread of its own, so it works with synchronous tests and any event loop. Once
    your app listens on a socket, set `webhook_url` to have signed webhooks posted to it.
    """
    from promptlayer_exec.simulator import Simulator  # noqa: PLC0415 - imported only if used

    with Simulator() as simulator:
        yield simulator
