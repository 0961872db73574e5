"""Workflows and their versions, and how the server describes them."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeAlias

import attrs

from promptlayer_exec.simulator._scenario import Scenario, SimNode
from promptlayer_exec.simulator._wire import RequestValidationError, parse_integer

ScenarioSource: TypeAlias = Scenario | Callable[[Mapping[str, Any]], Scenario]


@attrs.frozen(kw_only=True)
class SimulatedVersion:
    """One version of a workflow: its scenario and its description.

    Later versions have higher ids.
    """

    number: int
    id: int
    source: ScenarioSource
    definition: Scenario | None
    inputs: Mapping[str, str] | None
    warning: str | None
    created_at: datetime = attrs.field(factory=lambda: datetime.now(UTC))

    @property
    def nodes(self) -> tuple[SimNode, ...]:
        described = self.definition or self.source
        return described.nodes if isinstance(described, Scenario) else ()

    def warning_for(self, given: Mapping[str, Any]) -> str | None:
        if self.warning is not None or self.inputs is None:
            return self.warning
        missing = [name for name in self.inputs if name not in given]
        unused = [name for name in given if name not in self.inputs]
        warnings = []
        if missing:
            warnings.append(f"Missing input variables: {', '.join(missing)}")
        if unused:
            warnings.append(f"Unused input variables: {', '.join(unused)}")
        return ". ".join(warnings) or None


@attrs.define(kw_only=True)
class SimulatedWorkflow:
    """A workflow to run. `labels` maps each release label to its version's number."""

    id: int
    name: str
    external_ids: Mapping[str, str]
    versions: list[SimulatedVersion] = attrs.field(factory=list)
    labels: dict[str, int] = attrs.field(factory=dict)

    def add(self, labels: Iterable[str], **version: Any) -> int:
        """Add a version, and return its number."""
        if isinstance(labels, str):
            raise TypeError(f"labels takes several labels: write labels=[{labels!r}]")
        number = len(self.versions) + 1
        self.versions.append(SimulatedVersion(number=number, **version))
        self.labels.update(dict.fromkeys(labels, number))
        return number

    def select(self, label: str | None, number: int | None) -> SimulatedVersion | None:
        """Return a version by its label or number, and else the latest one."""
        if len(self.versions) == 1 and not self.labels:
            return self.versions[0]  # nothing was declared that could be wrong
        if label is not None:
            number = self.labels.get(label)
        elif number is None:
            return self.versions[-1]
        return next((version for version in self.versions if version.number == number), None)

    def describe(self, version: SimulatedVersion) -> dict[str, Any]:
        """Return the definition of a version, in the documented shape."""
        labels = [label for label, number in self.labels.items() if number == version.number]
        description = {
            "success": True,
            "workflow_id": self.id,
            "workflow_name": self.name,
            "version": version.number,
            "workflow_version_id": version.id,
            "release_labels": labels,
            "created_at": version.created_at.isoformat(),
            "nodes": [_describe_node(node, version.id) for node in version.nodes],
            "edges": [
                _describe_edge(before, node) for node in version.nodes for before in node.after
            ],
            # The object of development servers. Reportedly, production sends it as well.
            "workflow": {
                "id": self.id,
                "workspace_id": 1,
                "user_id": None,
                "name": self.name,
                "is_draft": False,
                "is_deleted": False,
            },
        }

        if version.inputs is not None:
            description["required_input_variables"] = dict(version.inputs)
        return description

    def summarize(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "workspace_id": 1,
            "name": self.name,
            "is_deleted": False,
            "latest_version_number": self.versions[-1].number,
            "release_labels": list(self.labels),
            "external_ids": [
                {"source": source, "external_id": external_id}
                for source, external_id in self.external_ids.items()
            ],
        }


def _describe_node(node: SimNode, version_id: int) -> dict[str, Any]:
    return {
        "id": str(uuid.uuid4()),
        "workflow_version_id": version_id,
        "name": node.name,
        "node_type": node.node_type,
        "is_output_node": bool(node.is_output_node),
        "configuration": {},
        "dependencies": list(node.after),
    }


def _describe_edge(source: str, target: SimNode) -> dict[str, Any]:
    return {
        "id": str(uuid.uuid4()),
        "source_node_name": source,
        "target_node_name": target.name,
        "is_and": True,
        "conditionals": [] if target.when is None else [{"type": "predicate"}],
    }


_SORT_KEYS: Mapping[str, Callable[[SimulatedWorkflow], Any]] = {
    "created_at": lambda workflow: workflow.id,
    "updated_at": lambda workflow: workflow.versions[-1].id,
    "name": lambda workflow: workflow.name,
    "id": lambda workflow: workflow.id,
}


def list_workflows(
    workflows: Iterable[SimulatedWorkflow], query: Mapping[str, str]
) -> dict[str, Any]:
    """Return one page of the workflows that a query asks for."""
    number = parse_integer(query, "page", range(1, 2**63), default=1)
    size = parse_integer(query, "per_page", range(1, 101), default=30)
    sort_by = _one_of(query, "sort_by", _SORT_KEYS, "created_at")
    descending = _one_of(query, "sort_order", ("asc", "desc"), "desc") == "desc"

    source, external_id = query.get("external_source"), query.get("external_id")
    if (source is None) != (external_id is None):
        missing = "external_source" if source is None else "external_id"
        raise RequestValidationError("Field required", "missing", "query", missing)

    if source is not None:
        workflows = [
            workflow for workflow in workflows if workflow.external_ids.get(source) == external_id
        ]
    found = sorted(workflows, key=_SORT_KEYS[sort_by], reverse=descending)
    pages = math.ceil(len(found) / size)
    return {
        "items": [workflow.summarize() for workflow in found[(number - 1) * size : number * size]],
        "page": number,
        "per_page": size,
        "total": len(found),
        "pages": pages,
        "has_next": number < pages,
        "has_prev": number > 1,
        "next_num": number + 1 if number < pages else None,
        "prev_num": number - 1 if number > 1 else None,
    }


def _one_of(query: Mapping[str, str], name: str, known: Iterable[str], default: str) -> str:
    value = query.get(name, default)
    if value not in known:
        expected = ", ".join(map(repr, known))
        raise RequestValidationError(f"Input should be {expected}", "enum", "query", name)
    return value
