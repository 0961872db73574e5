"""One run per key over the workers of a web app and over programs that are killed, for minutes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import pytest

from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.starts import SQLStartStore, StoredStart

TIMEOUT = 60.0
# Shorter than the default, so that a worker that was killed is taken for lost soon.
REQUEST_TIMEOUT = 4.0
APP = """
import os, sys
import uvicorn
from contextlib import asynccontextmanager
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from promptlayer_exec import StoreUnavailable, PollPolicy, Session, StartUnknown
from promptlayer_exec.fastapi import create_callback_router
from promptlayer_exec.starts import SQLStartStore
from promptlayer_exec.webhooks import Callbacks

database_url, callbacks_url, port, request_timeout, restart = sys.argv[1:]
callbacks = Callbacks(callbacks_url, secret="of the workers")
store = SQLStartStore(database_url, restart_unknown_after=float(restart) or None)
session = Session(
    starts=store,
    callbacks=callbacks,
    request_timeout=float(request_timeout),
    poll=PollPolicy(floor=0.1, ceiling=0.5),
    push=False,
    check_inputs=False,
)

@asynccontextmanager
async def lifespan(app):
    async with session:
        yield

app = FastAPI(lifespan=lifespan)
app.include_router(create_callback_router(session, callbacks=callbacks))

@app.post("/orders/{order}")
async def place(order: str):
    try:
        execution = await session.start("order", {"order": order}, key=order)
        output = await execution.output()
    except StartUnknown as error:
        return JSONResponse({"unknown": error.key}, 409)
    except StoreUnavailable as error:
        return JSONResponse({"error": str(error)}, 503)
    return {"id": execution.id, "output": output}

uvicorn.run(app, port=int(port), log_level="warning")
"""


def free_port() -> int:
    """Return a port that nobody uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Workers:
    """Two workers of the app on one database, and the simulator.

    Args:
        url: the URL of the database.
        sim: the simulator, in a thread of the test's process, which is never killed.
        restart_after: seconds after which the workers repeat an unknown start; 0: never.
    """

    def __init__(self, url: str, sim: Simulator, restart_after: float = 0.0) -> None:
        self.url, self.sim = url, sim
        self.ports = [free_port(), free_port()]
        self._restart_after = restart_after
        self._processes: list[subprocess.Popen[bytes]] = []
        # All callbacks come to the second worker.
        self._callbacks_url = f"http://127.0.0.1:{self.ports[1]}/callbacks"

    def start(self) -> None:
        """Start both workers, and wait until they listen."""
        for port in self.ports:
            arguments = [self.url, self._callbacks_url, port, REQUEST_TIMEOUT, self._restart_after]
            self._processes.append(run(APP, self.sim, *arguments))
        wait_until(lambda: all(map(is_listening, self.ports)))

    def kill(self) -> None:
        """Kill both with SIGKILL."""
        for process in self._processes:
            process.kill()
            process.wait(TIMEOUT)
        self._processes.clear()

    async def place(self, order: str, worker: int) -> tuple[int, Any]:
        """Place an order, and return the status and the body of the response; 0 without one."""
        url = f"http://127.0.0.1:{self.ports[worker % 2]}/orders/{order}"
        with suppress(aiohttp.ClientError, OSError):
            async with aiohttp.ClientSession() as http, http.post(url) as response:
                return response.status, await response.json()
        return 0, None

    def place_many(self, orders: list[str]) -> list[tuple[int, Any]]:
        """Place orders at the same time, over both workers in turn."""

        async def place() -> Any:
            return await asyncio.gather(
                *(self.place(order, number) for number, order in enumerate(orders))
            )

        return list(asyncio.run(place()))

    def retry(self, order: str, until: Callable[[int], bool], every: float = 0.5) -> Any:
        """Place an order again and again, and return the first body whose status is wanted."""
        deadline = time.monotonic() + TIMEOUT
        worker = 0
        while time.monotonic() < deadline:
            status, body = asyncio.run(self.place(order, worker))
            if until(status):
                return body
            worker += 1
            time.sleep(every)
        raise AssertionError("it was never placed")

    def row(self, order: str) -> StoredStart | None:
        """Return what is recorded for an order."""

        async def find() -> StoredStart | None:
            async with SQLStartStore(self.url) as store:
                return await store.find(order)

        return asyncio.run(find())

    def runs(self, order: str) -> list[int]:
        """Return the ids of the runs of an order."""
        return [run.execution_id for run in self.sim.runs if run.inputs["order"] == order]


def run(program: str, sim: Simulator, *arguments: object, **options: Any) -> Any:
    """Run a program that uses the simulator."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = {
        "PATH": "/usr/bin:/bin",
        "PROMPTLAYER_API_KEY": sim.api_key,
        "PROMPTLAYER_BASE_URL": sim.base_url,
    }
    return subprocess.Popen(command, env=environment, **options)


def is_listening(port: int) -> bool:
    """Return True if somebody listens on a port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until something is the case."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def sim() -> Iterator[Simulator]:
    """Run a simulator with a workflow of 2.5 s."""

    def scenario(inputs: Any) -> Scenario:
        return Scenario([SimNode("Answer", inputs["order"], 2.5, is_output_node=True)])

    with Simulator() as simulator:
        simulator.add_workflow("order", scenario)
        yield simulator


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a database that does not exist yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'starts.sqlite'}"
    server = request.getfixturevalue("postgres_of_module")
    name = f"keys{time.monotonic_ns()}"
    maintenance = server.url.replace("/batches", "/postgres")
    with psycopg.connect(maintenance, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return str(server.url.replace("/batches", f"/{name}"))


@pytest.fixture
def workers_of(url: str, sim: Simulator) -> Iterator[Callable[..., Workers]]:
    """Return a function that starts two workers; they are killed at the end."""
    with ExitStack() as stack:

        def make(**settings: Any) -> Workers:
            workers = Workers(url, sim, **settings)
            stack.callback(workers.kill)
            workers.start()
            return workers

        yield make


@pytest.fixture
def workers(workers_of: Callable[..., Workers]) -> Workers:
    """Return two workers that repeat no unknown start."""
    return workers_of()


def test_eight_posts_at_once_start_one_run(workers: Workers) -> None:
    """Over both workers; all get its output."""
    responses = workers.place_many(["7"] * 8)
    (execution_id,) = workers.runs("7")
    assert responses == [(200, {"id": execution_id, "output": "7"})] * 8


def test_a_client_that_retries_every_second_gets_one_run(workers: Workers) -> None:
    """It gives up each request after a second, and sends it to the other worker."""

    async def impatient() -> Any:
        for number in range(10):
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    return await workers.place("7", number)
        raise AssertionError

    status, body = asyncio.run(impatient())
    assert (status, [body["id"]]) == (200, workers.runs("7"))


def test_workers_that_are_killed_between_start_and_result(workers: Workers) -> None:
    """The next ones attach to the run."""
    with ThreadPoolExecutor() as threads:
        placing = threads.submit(workers.place_many, ["7"] * 2)
        wait_until(lambda: getattr(workers.row("7"), "state", None) == "started")
        workers.kill()
        assert {status for status, _ in placing.result()} == {0}
    workers.start()
    (execution_id,) = workers.runs("7")
    responses = workers.place_many(["7"] * 2)
    assert responses == [(200, {"id": execution_id, "output": "7"})] * 2
    assert workers.runs("7") == [execution_id]


@pytest.mark.parametrize("is_lost", [False, True], ids=["callback", "lost callback"])
def test_workers_that_are_killed_before_the_response(
    workers: Workers, sim: Simulator, *, is_lost: bool
) -> None:
    """Nobody starts it again, and its callback identifies the run, unless that is lost."""
    sim.inject(Fault.delay_response(3.0), path="/run")
    if is_lost:
        sim.inject(Fault.drop_post("callback"))

    def held(inputs: Any) -> Scenario:
        return Scenario([SimNode("Answer", inputs["order"], None, is_output_node=True)])

    sim.add_version("order", held)
    with ThreadPoolExecutor() as threads:
        placing = threads.submit(workers.place_many, ["7"] * 2)
        wait_until(lambda: getattr(workers.row("7"), "state", None) == "sending")
        wait_until(lambda: any(request.method == "POST" for request in sim.requests))
        workers.kill()
        placing.result()
    workers.start()
    sim.finish(sim.runs[0].execution_id, "Answer")

    wanted = 409 if is_lost else 200
    body = workers.retry("7", lambda status: status == wanted)
    (execution_id,) = workers.runs("7")
    if is_lost:
        assert body == {"unknown": "7"}
    else:
        assert body["id"] == execution_id
    assert [request.method for request in sim.requests].count("POST") == 1


@pytest.mark.parametrize("restart_after", [0.0, 20.0], ids="restart_after={}".format)
def test_promptlayer_answers_503_for_30_seconds(
    workers_of: Any, sim: Simulator, restart_after: float
) -> None:
    """It proves nothing: the start is unknown, or is repeated when PromptLayer is back."""
    workers = workers_of(restart_after=restart_after)
    sim.inject(Fault.status(503, times=None))
    back = threading.Timer(30.0, sim.clear_faults)
    back.start()
    responses = workers.place_many(["7"] * 4)
    assert responses == [(409, {"unknown": "7"})] * 4

    if restart_after:
        body = workers.retry("7", lambda status: status == 200, every=1.0)
        assert [body["id"]] == workers.runs("7")
        assert body["output"] == "7"
    else:
        back.join()
        assert workers.place_many(["7"] * 4) == responses
        assert [request.method for request in sim.requests].count("POST") == 1


def test_a_lost_response_and_a_callback_to_the_other_worker(
    workers: Workers, sim: Simulator
) -> None:
    """The first one then returns the run, which it has not heard of."""
    sim.inject(Fault.disconnect(), path="/run")
    assert asyncio.run(workers.place("7", 0)) == (409, {"unknown": "7"})
    body = workers.retry("7", lambda status: status == 200)
    assert [body["id"]] == workers.runs("7")
    assert body["output"] == "7"


def test_a_lost_response_and_no_callback(workers: Workers, sim: Simulator) -> None:
    """Everybody hears that nobody knows, whenever they ask; nothing is sent."""
    sim.inject(Fault.disconnect(), path="/run")
    sim.inject(Fault.delay_post("callback", 1000.0))
    for _ in range(3):
        assert workers.place_many(["7"] * 4) == [(409, {"unknown": "7"})] * 4
        time.sleep(1.0)
    assert len(workers.runs("7")) == 1
    assert [request.method for request in sim.requests].count("POST") == 1


SCRIPT = """
import asyncio, sys
from contextlib import aclosing
from promptlayer_exec import PollPolicy, Session, StartRequest
from promptlayer_exec.starts import SQLStartStore

url, how = sys.argv[1:]
requests = [StartRequest("order", {"order": f"{n}"}, key=f"row {n}") for n in range(60)]

async def main():
    poll = PollPolicy(floor=0.1, ceiling=0.5)
    async with Session(starts=SQLStartStore(url), poll=poll, push=False) as session:
        if how == "collect":
            outcomes = await session.collect(requests, max_in_flight=20)
            outputs = [outcome.result() for outcome in outcomes]
        else:
            async with aclosing(session.as_completed(requests, max_in_flight=20)) as outcomes:
                outputs = [outcome.result() async for outcome in outcomes]
    print(len(set(outputs)))

asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["collect", "as_completed"])
def test_a_script_that_is_interrupted_and_run_again(url: str, sim: Simulator, how: str) -> None:
    """Ctrl-C half way; then there are as many starts as rows."""
    first = run(SCRIPT, sim, url, how, stderr=subprocess.PIPE)
    wait_until(lambda: len(sim.runs) >= 30)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=TIMEOUT)
    assert b"KeyboardInterrupt" in errors
    assert 30 <= len(sim.runs) < 60

    again = run(SCRIPT, sim, url, how, stdout=subprocess.PIPE)
    output, _ = again.communicate(timeout=TIMEOUT)
    assert output == b"60\n"
    assert set(Counter(run.inputs["order"] for run in sim.runs).values()) == {1}
    assert len(sim.runs) == [request.method for request in sim.requests].count("POST") == 60


COMMAND = """
seq 1 20 | xargs -P 4 -I ROW {python} -m promptlayer_exec run order -i order=ROW \\
    --key "row ROW" --db {url}
"""


def test_a_shell_loop_that_is_interrupted_and_run_again(url: str, sim: Simulator) -> None:
    """Ctrl-C half way over rows; then there are as many starts as rows."""
    command = COMMAND.format(python=sys.executable, url=url)
    environment = {
        "PATH": "/usr/bin:/bin",
        "PROMPTLAYER_API_KEY": sim.api_key,
        "PROMPTLAYER_BASE_URL": sim.base_url,
    }
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen(
        ["sh", "-c", command], env=environment, start_new_session=True, **silent
    )
    wait_until(lambda: len(sim.runs) >= 10)
    os.killpg(first.pid, signal.SIGINT)
    first.wait(TIMEOUT)
    assert 10 <= len(sim.runs) < 20

    subprocess.run(["sh", "-c", command], env=environment, timeout=TIMEOUT, check=True, **silent)
    assert Counter(run.inputs["order"] for run in sim.runs) == dict.fromkeys(range(1, 21), 1)
