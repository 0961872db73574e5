"""A truthful PromptLayer server on a real socket, for tests, demonstrations and benchmarks."""

from ._backend import SimRun
from ._faults import Fault
from ._log import SimRequest
from ._scenario import Scenario, SimNode
from ._simulator import Simulator

__all__ = ["Fault", "Scenario", "SimNode", "SimRequest", "SimRun", "Simulator"]
