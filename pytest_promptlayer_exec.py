"""The pytest plugin: a fixture that serves PromptLayer from the test's own machine.

It stands beside the package, since pytest imports it in every run: what is in a package brings the
whole package along.
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

    It serves in a thread of its own, so it goes with synchronous tests and every event loop.
    """
    from promptlayer_exec.simulator import Simulator  # noqa: PLC0415 - costs nothing unless used

    with Simulator() as simulator:
        yield simulator
