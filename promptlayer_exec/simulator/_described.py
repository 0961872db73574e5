"""What the `Workflow` of a program under test says about the simulated workflow.

Its types belong to that program. So they are read, and outputs checked, as a session does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from promptlayer_exec import InvalidOutput, Workflow
from promptlayer_exec._integration import check_output
from promptlayer_exec._integration import required_inputs as required_inputs  # noqa: PLC0414
from promptlayer_exec.simulator._scenario import Scenario, SimNode
from promptlayer_exec.simulator._workflow_bodies import ScenarioSource

if TYPE_CHECKING:
    import cattrs


def checked(
    workflow: Workflow[Any, Any], source: ScenarioSource, converter: cattrs.Converter | None
) -> ScenarioSource:
    """Return a scenario, or a function that returns one, if its output is one of a workflow.

    The output of a function's scenario is checked when it is called.

    Raises:
        ValueError: the output does not match the workflow's type.
    """
    if isinstance(source, Scenario):
        _check(workflow, source, converter)
        return source

    def scenario_of(inputs: Mapping[str, Any]) -> Scenario:
        scenario = source(inputs)
        _check(workflow, scenario, converter)
        return scenario

    return scenario_of


def _check(
    workflow: Workflow[Any, Any], scenario: Scenario, converter: cattrs.Converter | None
) -> None:
    """Raise `ValueError` if no output node can be the workflow's main output."""
    outputs = [node for node in scenario.nodes if node.is_output_node]
    if not outputs or not all(map(_has_known_value, outputs)):
        return

    misfit: InvalidOutput | None = None
    for node in outputs:
        try:
            check_output(workflow, node.value, converter)
        except InvalidOutput as error:
            misfit = misfit or error
        else:
            return

    if misfit is not None:
        name = f"workflow {workflow.name!r:.100}"
        raise ValueError(
            f"no output of the scenario matches {name} at {misfit.path}: {misfit.reason}"
        ) from None


def _has_known_value(node: SimNode) -> bool:
    """Return whether a node certainly succeeds with its own value."""
    return node.status == "SUCCESS" and node.duration is not None and not callable(node.value)
