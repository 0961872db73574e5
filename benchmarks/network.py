"""Measure batches on SQLite and PostgreSQL, and fail if a target is missed.

PostgreSQL is also measured behind a proxy that adds a delay to each round trip.

Usage: python benchmarks/network.py [--run ITEMS] [--no-kill]

It needs the extra `dbos` and PostgreSQL, and takes a few minutes. `--run 300 --no-kill` shortens
it, but so few items say little about a batch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from needs import find_program, need

if __name__ == "__main__":
    need(extras="dbos", debian="postgresql")
import sqlalchemy as sa

from promptlayer_exec import Session, StartRequest
from promptlayer_exec.dbos import Batch

PORT = "5432"  # the name of the server's socket; it does not listen on the network
WORKERS = 3
IN_FLIGHT = 300
TIMEOUT = 600.0
_SIZE = "select pg_database_size(current_database())"

PROXY = """
import asyncio, sys
from contextlib import suppress

path, delay = sys.argv[1], float(sys.argv[2]) / 2

async def pump(reader, writer):
    loop = asyncio.get_running_loop()
    chunks = asyncio.Queue()

    async def forward():
        while (item := await chunks.get()) is not None:
            due, data = item
            await asyncio.sleep(due - loop.time())
            writer.write(data)
        writer.close()

    forwarding = asyncio.create_task(forward())
    try:
        while data := await reader.read(65536):
            chunks.put_nowait((loop.time() + delay, data))
    except OSError:
        pass
    chunks.put_nowait(None)
    await forwarding

async def serve(reader, writer):
    server_reader, server_writer = await asyncio.open_unix_connection(path)
    with suppress(asyncio.CancelledError):  # the proxy is over
        await asyncio.gather(pump(reader, server_writer), pump(server_reader, writer))

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""
SIMULATOR = """
import sys
from promptlayer_exec.simulator import Scenario, SimNode, Simulator

def scenario(inputs):
    seconds = inputs["seconds"]
    return Scenario([SimNode("Answer", inputs["key"], seconds, is_output_node=True)])

with Simulator(log_requests=False) as sim:
    sim.add_workflow("job", scenario)
    print(sim.base_url, sim.api_key, flush=True)
    sys.stdin.read()
"""
WORKER = """
import asyncio, sys
from promptlayer_exec import PollPolicy, Session
from promptlayer_exec.dbos import Batch

url, name, base_url, key, in_flight = sys.argv[1:]

def session():
    return Session(
        key, base_url=base_url, poll=PollPolicy.fixed(2.0), rate=None, max_connections=1000
    )

batch = Batch(name, database_url=url, session=session, max_in_flight=int(in_flight))
asyncio.run(batch.work())
"""


@contextmanager
def program(text: str, *arguments: object) -> Iterator[list[str]]:
    """Run a program until the context ends, and yield the words of the first line it prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", text, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()
    finally:
        process.communicate("")


class Postgres:
    """A PostgreSQL server with a database `batches`, which listens on a socket only.

    Args:
        directory: of its socket and its files; `stop` leaves them.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = f"postgresql://tester@/batches?host={directory}"
        self._programs = Path(find_program("initdb") or "initdb").parent
        # PostgreSQL refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(directory, self._user)

    def create(self) -> None:
        """Create the server's files, start it, and create the database."""
        self._run("initdb", "-A", "trust", "-U", "tester", "--no-sync")
        self.start()
        url = self.url.replace("postgresql:", "postgresql+psycopg:").replace(
            "/batches", "/postgres"
        )
        admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(sa.text("create database batches"))
        admin.dispose()

    def start(self) -> None:
        """Start the server, and wait until it accepts connections."""
        options = (
            f"-c listen_addresses='' -c unix_socket_directories='{self.directory}'"
            " -c max_connections=200 -c shared_preload_libraries=pg_stat_statements"
            " -c pg_stat_statements.max=1000"
        )
        self._run("pg_ctl", "-w", "-l", self.directory / "log", "-o", options, "start")

    def stop(self) -> None:
        """End all connections, and stop the server."""
        self._run("pg_ctl", "-w", "-m", "fast", "stop")

    def _run(self, name: str, *arguments: object) -> None:
        command = [self._programs / name, "-D", self.directory / "data", *map(str, arguments)]
        subprocess.run(command, user=self._user, cwd="/", check=True, stdout=subprocess.DEVNULL)


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Run a PostgreSQL server until the context ends."""
    directory = Path(tempfile.mkdtemp(prefix="pg"))
    server = Postgres(directory)
    server.create()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory)


class Bench:
    """The server, the proxy before it, and the simulator.

    Args:
        direct: the URL of the database without the proxy, for observing.
        url: the URL of the database through the proxy.
        base_url: of the simulator.
        key: of the simulator.
    """

    def __init__(self, direct: str, url: str, base_url: str, key: str) -> None:
        self.direct, self.url, self.base_url, self.key = direct, url, base_url, key
        self.engine = sa.create_engine(direct, isolation_level="AUTOCOMMIT")
        self.misses: list[str] = []

    def query(self, text: str, **values: object) -> Any:
        """Return the rows of a query that the proxy does not delay."""
        with self.engine.connect() as connection:
            result = connection.execute(sa.text(text), values)
            return result.all() if result.returns_rows else []

    def number(self, text: str, **values: object) -> float:
        """Return the single number that a query gives."""
        return float(self.query(text, **values)[0][0] or 0)

    def row(
        self,
        name: str,
        value: float,
        unit: str,
        target: float | None = None,
        *,
        most: bool = True,
    ) -> None:
        """Print a line of the table, and record whether the target is missed."""
        if target is None:
            print(f"| {name} | {value:.1f}{unit} | |", flush=True)
            return
        sign = "≤" if most else "≥"
        print(f"| {name} | {value:.1f}{unit} | {sign} {target:g}{unit} |", flush=True)
        if value > target if most else value < target:
            self.misses.append(name)

    def add(self, name: str, url: str, count: int, seconds: float) -> float:
        """Add items to a batch; return how many were added per second."""
        batch = Batch(
            name,
            database_url=url,
            session=lambda: Session(self.key, base_url=self.base_url),
            max_in_flight=WORKERS * IN_FLIGHT,
        )

        async def add() -> float:
            await batch.status()  # creates the tables
            began = time.monotonic()
            assert await batch.add(requests(count, seconds)) == count
            return count / (time.monotonic() - began)

        return asyncio.run(add())

    def workers(self, name: str, url: str, count: int) -> list[subprocess.Popen[bytes]]:
        """Start the workers of a batch."""
        named = "" if url.startswith("sqlite") else "&application_name=worker{}"
        return [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", WORKER, url + named.format(number)),
                    *(name, self.base_url, self.key, str(WORKERS * IN_FLIGHT)),
                ]
            )
            for number in range(count)
        ]

    def connections(self) -> int:
        """Return the number of connections of the worker that has most."""
        return int(
            self.number(
                "select max(n) from (select count(*) as n from pg_stat_activity"
                " where application_name like 'worker%' group by application_name) as workers"
            )
        )


def requests(count: int, seconds: float) -> Iterator[StartRequest]:
    """Yield the requests of the items."""
    for number in range(count):
        key = f"item {number}"
        yield StartRequest("job", {"key": key, "seconds": seconds}, key=key)


def measure_work(
    bench: Bench, name: str, url: str, workers: int, *, count: int, target: float
) -> None:
    """Add items, and work on them: their runs take half a second each."""
    where = name.partition(",")[0]
    is_away = url == bench.url
    added = bench.add(where, url, count, 0.5)
    bench.row(f"{where}: added per second", added, "", None if is_away else 500.0, most=False)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    bench.query("select pg_stat_statements_reset()")
    processes = bench.workers(where, url, workers)
    database = Batch(where, database_url=url, session=lambda: Session(bench.key))
    times, connections = asyncio.run(watch(bench, database, processes, count))
    statements = bench.number("select sum(calls) from pg_stat_statements")
    assert [process.returncode for process in processes] == [0] * workers
    rate = count * 0.8 / (times[1] - times[0])
    bench.row(f"{name}: items per second", rate, "", target, most=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    bench.row(f"{where}: CPU of the workers per item", cpu / count * 1000, " ms")
    if not url.startswith("sqlite"):
        bench.row(f"{where}: statements per item", statements / count, "")
        bench.row(f"{where}: connections per worker", connections, "")


async def watch(
    bench: Bench, batch: Batch, workers: list[subprocess.Popen[bytes]], count: int
) -> tuple[list[float], int]:
    """Return when a tenth and nine tenths of the items had ended, and the most connections."""
    times: list[float] = []
    connections = 0
    give_up = time.monotonic() + TIMEOUT
    while any(worker.poll() is None for worker in workers):
        assert time.monotonic() < give_up, "the work does not end"
        finished = (await batch.status()).finished
        if len(times) < 2 and finished >= count * (0.1, 0.9)[len(times)]:
            times.append(time.monotonic())
            connections = max(connections, bench.connections())
        await asyncio.sleep(0.1)
    return times, connections


def measure_kill(bench: Bench) -> None:
    """Kill one of three workers that have 900 items each."""
    count = WORKERS * IN_FLIGHT
    bench.add("kill", bench.url, count, 45.0)
    workers = bench.workers("kill", bench.url, WORKERS)
    held = (
        "select executor_id, count(*) from dbos.workflow_status"
        " where queue_name = 'promptlayer-exec/kill' and status = 'PENDING' group by 1"
    )
    ended = "select count(*) from promptlayer_item where batch = 'kill' and kind"
    try:
        give_up = time.monotonic() + TIMEOUT
        started = "select count(started) from promptlayer_item where batch = 'kill'"
        while bench.number(started) < count:
            assert time.monotonic() < give_up, "the items do not start"
            time.sleep(0.2)
        before = dict(bench.query(held))
        victim = max(before, key=before.__getitem__)
        text = "select process from promptlayer_worker where executor = :victim"
        pid = json.loads(bench.query(text, victim=victim)[0][0])[2]
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        while victim in (now := dict(bench.query(held))):
            assert time.monotonic() < began + TIMEOUT, now
            time.sleep(0.1)
        bench.row(f"moving {before[victim]} items", time.monotonic() - began, " s", 60.0)
        while bench.number(f"{ended} is not null") < count:
            assert time.monotonic() < give_up, "the items do not end"
            time.sleep(0.5)
        bench.row("lost starts of live workers", bench.number(f"{ended} = 'unknown'"), "", 0.0)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def main() -> int:
    """Print the table, and return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delay", type=float, default=10.0, help="milliseconds per round trip")
    parser.add_argument("--run", type=int, default=3_000, help="how many items to work on")
    parser.add_argument("--no-kill", action="store_true", help="do not kill a worker")
    options = parser.parse_args()
    with (
        postgres() as server,
        program(PROXY, server.directory / f".s.PGSQL.{PORT}", options.delay / 1000) as (port,),
        program(SIMULATOR) as (base_url, key),
    ):
        url = f"postgresql://tester@127.0.0.1:{port}/batches?connect_timeout=5"
        direct = server.url
        bench = Bench(direct.replace("postgresql:", "postgresql+psycopg:"), url, base_url, key)
        bench.query("create extension pg_stat_statements")
        print("| | measured | target |\n|---|---|---|")
        if options.run:
            count = options.run
            sqlite = f"sqlite:///{server.directory}/batches.sqlite"
            away = f"PostgreSQL {options.delay:g} ms away"
            measure_work(bench, "SQLite, 1 worker", sqlite, 1, count=count, target=80.0)
            measure_work(bench, "PostgreSQL, 2 workers", direct, 2, count=count, target=80.0)
            measure_work(
                bench, f"{away}, {WORKERS} workers", url, WORKERS, count=count, target=25.0
            )
        if not options.no_kill:
            measure_kill(bench)
        bench.engine.dispose()
    for miss in bench.misses:
        print(f"missed: {miss}")
    return bool(bench.misses)


if __name__ == "__main__":
    sys.exit(main())
