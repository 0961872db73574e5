"""A faithful PromptLayer server on a real socket, for tests, demonstrations and benchmarks."""

from promptlayer_exec.simulator._backend import SimRun
from promptlayer_exec.simulator._faults import Fault
from promptlayer_exec.simulator._log import SimRequest
from promptlayer_exec.simulator._notifications import SimPost
from promptlayer_exec.simulator._scenario import Scenario, SimNode
from promptlayer_exec.simulator._simulator import Simulator

__all__ = ["Fault", "Scenario", "SimNode", "SimPost", "SimRequest", "SimRun", "Simulator"]
