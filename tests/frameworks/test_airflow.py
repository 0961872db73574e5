"""The recipe for Airflow: its tasks, its triggers and its state store, in one process."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import select

os.environ["AIRFLOW_HOME"] = tempfile.mkdtemp(prefix="airflow-")
os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"
os.environ["AIRFLOW__LOGGING__LOGGING_LEVEL"] = "WARNING"

from airflow.dag_processing.bundles.manager import DagBundlesManager
from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
from airflow.models.xcom import XComModel
from airflow.utils.db import initdb
from airflow.utils.session import create_session

from promptlayer_exec.simulator import Fault, Simulator

pytestmark = pytest.mark.filterwarnings("default")  # Airflow's own imports warn


@pytest.fixture(scope="module", autouse=True)
def _database() -> None:
    initdb()
    DagBundlesManager().sync_bundles_to_db()


@pytest.fixture
def run(
    recipe: Callable[[str], list[str]],
    load: Callable[..., ModuleType],
    server: Simulator,
    tmp_path: Path,
) -> Callable[[], Any]:
    """Return a function that runs the recipe's Dag once, with one retry."""
    _, dag = recipe("Airflow")
    dag = dag.replace('task_id="report"', 'task_id="report", retries=1, retry_delay=0')
    dags = tmp_path / "dags"
    dags.mkdir()
    (dags / "reports.py").write_text(f"from promptlayer_operator import *\n{dag}")
    load("Airflow", "promptlayer_operator", blocks=1)

    def run() -> Any:
        bag = DagBag(dags, bundle_path=dags, bundle_name="dags-folder")
        assert bag.import_errors == {}
        sync_bag_to_db(bag, "dags-folder", None)
        return bag.dags["reports"].test()

    return run


def test_the_task_returns_the_output(server: Simulator, run: Callable[[], Any]) -> None:
    """It deferred, and the trigger waited."""
    finished = run()
    assert finished.state == "success"
    (only,) = server.runs
    assert only.inputs == {"topic": "otters"}
    assert only.body["metadata"] == {
        "airflow_run": finished.run_id,
        "airflow_task": "report",
        "promptlayer_exec.key": f"airflow/reports/{finished.run_id}/report/-1",
    }
    with create_session() as session:
        stored = session.scalars(select(XComModel.value).where(XComModel.key == "return_value"))
        assert list(stored) == ["Otters are fine."]


def test_a_retry_follows_the_same_execution(
    server: Simulator, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first try fails before it defers, and the second try starts no run."""
    module = sys.modules["promptlayer_operator"]
    trigger = module.ExecutionTrigger

    def fail_once(execution_id: int) -> Any:
        monkeypatch.setattr(module, "ExecutionTrigger", trigger)
        raise RuntimeError("the worker died")

    monkeypatch.setattr(module, "ExecutionTrigger", fail_once)
    assert run().state == "success"
    assert len(server.runs) == 1


def test_a_lost_start_is_not_retried(server: Simulator, run: Callable[[], Any]) -> None:
    """The task fails at once, in spite of its retries."""
    server.inject(Fault.disconnect(), path="/run")
    assert run().state == "failed"
    assert len(server.runs) == 1
