"""The recipes of `docs/frameworks.md`, each with its framework: `nox -s frameworks`."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from promptlayer_exec.simulator import Scenario, SimNode, Simulator

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"


def blocks_of(heading: str) -> list[str]:
    """Return the code blocks of a section."""
    _, _, section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    section = section.partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


@pytest.fixture
def recipe() -> Callable[[str], list[str]]:
    """Return a function that returns the code blocks of a section."""
    return blocks_of


def write_report(inputs: Any) -> Scenario:
    """Take a moment, and fail for unicorns."""
    status = "FAILED" if inputs["topic"] == "unicorns" else "SUCCESS"
    report = SimNode("Report", "Otters are fine.", 0.2, ["Plan"], status, is_output_node=True)
    return Scenario([SimNode("Plan", "a plan", 0.2), report])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    """Return a simulator that sessions find in the environment."""
    with Simulator() as sim:
        monkeypatch.setenv("PROMPTLAYER_API_KEY", sim.api_key)
        monkeypatch.setenv("PROMPTLAYER_BASE_URL", sim.base_url)
        definition = write_report({"topic": "otters"})
        sim.add_workflow("write-report", write_report, definition=definition)
        yield sim


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """Return a function that imports the code of a section as a module."""
    names = []

    def load(heading: str, name: str, *, blocks: int | None = None) -> ModuleType:
        (tmp_path / f"{name}.py").write_text("\n\n".join(blocks_of(heading)[:blocks]))
        monkeypatch.syspath_prepend(str(tmp_path))
        names.append(name)
        return importlib.import_module(name)

    yield load
    for name in names:
        del sys.modules[name]
