"""The setup of the kill tests: worker processes, a real database, and checks of the outcomes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from promptlayer_exec import Session, StartRequest
from promptlayer_exec._database.location import check_url
from promptlayer_exec.dbos import Batch, StoredOutcome
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._tables import items
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

NAME = "nightly"
TIMEOUT = 120.0
WORKER = """
import asyncio, sys
from promptlayer_exec import PollPolicy, RetryPolicy, Session, Throttled
from promptlayer_exec.dbos import Batch

refused = []

def observe(event):
    if isinstance(event, Throttled):
        refused.append(event)

def session():
    retry = RetryPolicy(outage=60.0, ceiling=2.0)
    poll = PollPolicy(floor=0.05, ceiling=0.5)
    bare = {"push": False, "check_inputs": False}
    return Session(poll=poll, retry=retry, rate=None, observers=[observe], **bare)

url, name, in_flight, rate = sys.argv[1:]
batch = Batch(
    name,
    database_url=url,
    session=session,
    max_in_flight=int(in_flight),
    rate=float(rate) or None,
)
print("ready", flush=True)
asyncio.run(batch.work())
print(len(refused))
"""


class Worker:
    """A process that works on the batch, and prints how many 429s it got."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", end(process)

    def kill(self) -> None:
        """Send SIGKILL, and wait until the process has ended."""
        end(self.process)

    def suspend(self) -> None:
        """Stop the process with SIGSTOP: to the others it seems to be a lost machine."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let the stopped process go on."""
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> int:
        """Wait until the process has done its work, and return how many 429s it got."""
        refused, errors = self.process.communicate(timeout=TIMEOUT)
        assert self.process.returncode == 0, errors
        return int(refused)


def end(process: subprocess.Popen[Any]) -> Any:
    """Kill a process, even one that is stopped, and return what it wrote to standard error."""
    process.kill()
    _, errors = process.communicate(timeout=TIMEOUT)
    return errors


class Scene:
    """One batch, its database, the simulator, and the workers.

    Args:
        url: the URL of the database.
        sim: the simulator, in a thread of the test's process, which is never killed.
    """

    def __init__(self, url: str, sim: Simulator) -> None:
        self.url = url
        self.sim = sim
        self.random = random.Random(8)
        bare: dict[str, Any] = {"push": False, "check_inputs": False}
        session = partial(Session, sim.api_key, base_url=sim.base_url, **bare)
        self.batch = Batch(NAME, database_url=url, session=session)
        self._processes: list[subprocess.Popen[Any]] = []
        self._keys: set[str] = set()
        self._durations: dict[str, float] = {}
        sim.add_workflow("job", self._scenario)

    def _scenario(self, inputs: Mapping[str, Any]) -> Scenario:
        duration = self._durations[inputs["key"]]
        return Scenario([SimNode("Answer", inputs["key"], duration, is_output_node=True)])

    def interrupt_server(self, seconds: float) -> None:
        """Stop the simulator for some seconds, and start it again at the same address."""
        port = int(self.sim.base_url.rpartition(":")[2])
        self.sim.__exit__(None, None, None)
        time.sleep(seconds)
        self.sim._port = port
        self.sim.__enter__()

    def add(self, count: int, *, seconds: float = 1.0, workflow: str = "job") -> None:
        """Add items whose executions take up to `seconds` each."""
        self._keys = {f"item {number}" for number in range(count)}
        self._durations = {key: self.random.uniform(0.0, seconds) for key in sorted(self._keys)}
        requests = [StartRequest(workflow, {"key": key}, key=key) for key in sorted(self._keys)]
        assert asyncio.run(self.batch.add(requests)) == count

    @property
    def environment(self) -> dict[str, str]:
        """The environment of processes that use the simulator."""
        here = {
            "PROMPTLAYER_API_KEY": self.sim.api_key,
            "PROMPTLAYER_BASE_URL": self.sim.base_url,
        }
        return {**os.environ, **here}

    def start(self, program: str, *arguments: object, **options: Any) -> subprocess.Popen[Any]:
        """Start a program with the URL of the database, the name of the batch, and arguments."""
        process = subprocess.Popen(
            [sys.executable, "-c", program, self.url, NAME, *map(str, arguments)],
            env=self.environment,
            **options,
        )
        self._processes.append(process)
        return process

    def worker(self, *, in_flight: int = 20, rate: float = 0.0) -> Worker:
        """Start a worker."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return Worker(self.start(WORKER, in_flight, rate, **pipes))

    def wait_for(self, finished: int) -> None:
        """Wait until this many items have an outcome."""
        self.wait_until(lambda: asyncio.run(self.batch.status()).finished >= finished)

    def wait_until(self, reached: Callable[[], bool], *, seconds: float = TIMEOUT) -> None:
        """Wait until a condition holds, for at most `seconds`."""
        give_up = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < give_up, asyncio.run(self.batch.status())
            time.sleep(0.1)

    def recorded_ids(self) -> dict[str, int]:
        """Return the ids of the executions whose starts are recorded, by key."""
        with closing(Store(check_url(self.url))) as store:
            rows = store.rows(sa.select(items.c.key, items.c.started))
        return {key: json.loads(started)["execution_id"] for key, started in rows if started}

    def executors(self) -> set[str]:
        """Return the executors that have running items."""
        with closing(Store(check_url(self.url))) as store:
            return {*store.taken(NAME).values()}

    def outcomes(self) -> dict[str, StoredOutcome]:
        """Return every outcome by key, after the checks that hold for every batch.

        Each item has one outcome and was started once at most; an outcome that is not unknown has
        the id and the output of its run.
        """

        async def collect() -> list[StoredOutcome]:
            return [outcome async for outcome in self.batch.outcomes()]

        outcomes = asyncio.run(collect())
        status = asyncio.run(self.batch.status())
        assert (status.total, status.finished) == (len(self._keys), len(self._keys))
        assert Counter(outcome.key for outcome in outcomes) == Counter(self._keys)
        posts = Counter(run.inputs["key"] for run in self.sim.runs)
        assert set(posts.values()) <= {1}, "some key was started twice"
        ids = {run.inputs["key"]: run.execution_id for run in self.sim.runs}
        for outcome in outcomes:
            if outcome.kind == "unknown":
                assert outcome.execution_id is None
            else:
                assert (outcome.succeeded, outcome.output) == (True, outcome.key), outcome
                assert outcome.execution_id == ids[outcome.key]
        return {outcome.key: outcome for outcome in outcomes}

    def close(self) -> None:
        """End the processes that still run."""
        for process in self._processes:
            if process.returncode is None:
                end(process)


@pytest.fixture
def sim() -> Iterator[Simulator]:
    """Run a simulator that answers after 30 ms, so that a worker can be killed while it waits."""
    with Simulator(log_requests=False) as simulator:
        simulator.inject(Fault.delay(0.03, times=None))
        yield simulator


@pytest.fixture
def sqlite_scene(sim: Simulator, batches_file: Path) -> Iterator[Scene]:
    """Return a scene on a SQLite file."""
    with closing(Scene(f"sqlite:///{batches_file}", sim)) as scene:
        yield scene


class Postgres:
    """A PostgreSQL server that listens on a Unix socket in its directory, and not on the network.

    Args:
        directory: for the data, the log and the socket.
        binaries: where PostgreSQL's programs are.
    """

    def __init__(self, directory: Path, binaries: Path) -> None:
        self.data = directory / "data"
        self._directory = directory
        self._binaries = binaries
        # PostgreSQL refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(directory, self._user)
        self._run("initdb", "-D", self.data, "-A", "trust", "-U", "tester", "--no-sync")
        self.url = f"postgresql://tester@/batches?host={directory}"

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self._binaries / program), *map(str, arguments)]
        subprocess.run(
            command, user=self._user, cwd="/", check=True, capture_output=True, timeout=TIMEOUT
        )

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        options = f"-c listen_addresses='' -c unix_socket_directories='{self._directory}'"
        log = self._directory / "log"
        self._run("pg_ctl", "-D", self.data, "-w", "-l", log, "-o", options, "start")

    def stop(self) -> None:
        """Stop the server, and disconnect its clients."""
        self._run("pg_ctl", "-D", self.data, "-w", "-m", "fast", "stop")


def _postgres_binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return None if on_path is None else Path(on_path).resolve().parent


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Run a PostgreSQL server."""
    binaries = _postgres_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    # Not `tmp_path`: the path of a socket has 107 bytes at most, and pytest's directories are
    # private to this user.
    with tempfile.TemporaryDirectory(prefix="pg") as directory:
        server = Postgres(Path(directory), binaries)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """Run a PostgreSQL server."""
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="module")
def postgres_of_module() -> Iterator[Postgres]:
    """Run a PostgreSQL server for all tests of a module."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def postgres_scene(sim: Simulator, postgres: Postgres) -> Iterator[Scene]:
    """Return a scene on a PostgreSQL server."""
    with closing(Scene(postgres.url, sim)) as scene:
        yield scene


@pytest.fixture
def scene_on(sim: Simulator) -> Callable[[str], Scene]:
    """Return a function that makes a scene on a database."""
    return lambda url: Scene(url, sim)
