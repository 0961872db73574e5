"""Play the night of docs/operating.md with the command line, and print what the page shows.

Three workers of a batch on PostgreSQL run 2,000 items. One is killed, the gateway responds with 503
for a minute, and the database is away for six seconds. Then what failed is run again. Fails if the
simulator accepted two starts for one item, or if an item has another one's run or output.

Usage: python benchmarks/night.py

It needs the extras `cli` and `dbos`, and PostgreSQL, and takes three minutes, because that is how
long the night takes.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from needs import need  # type: ignore[import-not-found]

need(extras="cli dbos", debian="postgresql")
from network import Postgres, postgres  # type: ignore[import-not-found]

from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

ITEMS = 2_000
OUTAGE = 60.0
TIMEOUT = 900.0
RUN = "batch run night.jsonl --workflow grade --out results.jsonl --name tonight --outage 300"
GRADED: set[str] = set()  # the essays whose first run failed


def grade(inputs: Mapping[str, Any]) -> Scenario:
    """Return a run of two seconds; one in a hundred fails, until it is run again."""
    essay = str(inputs["essay"])
    if essay.endswith("07") and essay not in GRADED:
        GRADED.add(essay)
        return Scenario([SimNode("Grade", None, 2.0, status="FAILED", error_message="no grade")])
    return Scenario([SimNode("Grade", f"grade of {essay}", 2.0, is_output_node=True)])


def tell(what: str) -> None:
    """Tell what happens now, because the night takes three minutes."""
    sys.stderr.write(f"{time.strftime('%T')} {what}\n")


class Night:
    """The simulator, the database, and the machines that work on the batch.

    Args:
        sim: the simulator, in place of PromptLayer.
        database: the server of the batch.
        directory: where the commands run, and write what they print.
    """

    def __init__(self, sim: Simulator, database: Postgres, directory: Path) -> None:
        self.sim, self.database, self.directory = sim, database, directory
        self.settings = os.environ | {
            "PROMPTLAYER_API_KEY": sim.api_key,
            "PROMPTLAYER_BASE_URL": sim.base_url,
            "PROMPTLAYER_EXEC_DB": database.url,
        }

    def begin(self, name: str, command: str) -> subprocess.Popen[bytes]:
        """Start a command that writes its standard error to a file of that name."""
        with (self.directory / name).open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "promptlayer_exec", *command.split()],
                cwd=self.directory,
                env=self.settings,
                stdout=subprocess.DEVNULL,
                stderr=file,
            )

    def run(self, command: str) -> str:
        """Run a command, and return what it prints on standard error."""
        process = self.begin("command", command)
        process.wait(TIMEOUT)
        return (self.directory / "command").read_text()

    def wait_for(self, finished: int) -> None:
        """Wait until so many items are finished."""
        give_up = time.monotonic() + TIMEOUT
        while True:
            command = (sys.executable, "-m", "promptlayer_exec", "batch", "status", "--json")
            printed = subprocess.run(command, env=self.settings, capture_output=True, check=False)
            status = json.loads(printed.stdout or "{}")
            if sum(status.get(kind, 0) for kind in ("succeeded", "failed", "unknown")) >= finished:
                return
            assert time.monotonic() < give_up, "the work does not advance"
            time.sleep(0.5)

    def play(self) -> None:
        """Let the evening, the night and the morning pass."""
        keys = (f"k{number}" for number in range(ITEMS))
        lines = (json.dumps({"key": key, "inputs": {"essay": key}}) for key in keys)
        (self.directory / "night.jsonl").write_text("\n".join(lines))
        tell(f"the evening: three machines begin with {ITEMS:,} items")
        evening = self.begin("run", RUN)
        work = "batch work --name tonight --outage 300"
        others = [self.begin(f"work{number}", work) for number in (1, 2)]

        self.wait_for(300)
        tell("one machine dies")
        others[0].kill()
        self.wait_for(350)
        tell("the gateway responds with 503, for a minute")
        self.sim.inject(Fault.status(503, times=None))
        time.sleep(OUTAGE)
        self.sim.clear_faults()

        self.wait_for(800)
        tell("the database restarts")
        self.database.stop()
        time.sleep(6.0)
        self.database.start()
        evening.wait(TIMEOUT)
        for worker in others:
            worker.wait(TIMEOUT)
        self.show("The evening's command", (self.directory / "run").read_text())
        self.show("Another machine", (self.directory / "work2").read_text())

    def check(self) -> list[str]:
        """Return what is wrong."""
        with (self.directory / "results.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        runs = {run.execution_id: str(run.inputs["essay"]) for run in self.sim.runs}
        wrong = [
            row["key"]
            for row in rows
            if runs.get(int(row["execution_id"])) != row["key"]
            or row["output"] != f"grade of {row['key']}"
        ]
        twice = Counter(runs.values())
        twice.subtract(GRADED)
        return [
            *(f"{key} has another one's run or output" for key in wrong),
            *(f"{key} was started {count} times" for key, count in twice.items() if count != 1),
            *([] if len(rows) == ITEMS else [f"{len(rows)} rows"]),
        ]

    @staticmethod
    def show(title: str, text: str) -> None:
        """Print a part of the night."""
        sys.stdout.write(f"\n{title}\n{text}")
        sys.stdout.flush()


def main() -> int:
    """Play the night, and return 1 if something is wrong."""
    with (
        Simulator(log_requests=False) as sim,
        postgres() as database,
        tempfile.TemporaryDirectory() as directory,
    ):
        sim.add_workflow("grade", grade)
        night = Night(sim, database, Path(directory))
        night.play()
        night.show("Accepted by the simulator", f"{len(sim.runs)} starts\n")

        night.show("Failed again", night.run("batch retry --failed --name tonight"))
        night.show("", night.run(RUN))
        night.show("Unknown again", night.run("batch retry --unknown --name tonight"))
        night.show("", night.run(RUN))
        night.show("The results", night.run("batch export --out results.csv"))
        problems = night.check()
        night.show("", night.run("batch delete --yes --name tonight"))

    for problem in problems:
        sys.stdout.write(f"wrong: {problem}\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
