"""Measure batches on a PostgreSQL server that is a network away, and fail if a target is missed.

Between the batch and the server is a proxy that adds a delay to each round trip.

Usage: python tests/benchmarks/network.py [--help]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from promptlayer_exec import Session, StartRequest
from promptlayer_exec.dbos import Batch, StoredOutcome
from promptlayer_exec.dbos._location import check_url
from promptlayer_exec.dbos._requests import Row
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._tables import Ending

PORT = "5432"  # the name of the server's socket; it does not listen on the network
WORKERS = 3
IN_FLIGHT = 300
TIMEOUT = 600.0
_SIZE = "select pg_database_size(current_database())"

PROXY = """
import asyncio, sys

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


READER = """
import asyncio, resource, sys
from promptlayer_exec import Session
from promptlayer_exec.dbos import Batch

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

async def main():
    before, batch = peak(), Batch(sys.argv[2], database_url=sys.argv[1], session=Session)
    async for _ in batch.outcomes():
        pass
    print(peak() - before)

asyncio.run(main())
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


@contextmanager
def postgres() -> Iterator[Path]:
    """Run a PostgreSQL server, and yield the directory of its socket."""
    (*_, initdb) = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    directory = Path(tempfile.mkdtemp(prefix="pg"))
    user = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    if user is not None:
        shutil.chown(directory, user)

    def run(name: str, *arguments: object) -> None:
        command = [str(initdb.parent / name), "-D", str(directory / "data"), *map(str, arguments)]
        subprocess.run(command, user=user, cwd="/", check=True, stdout=subprocess.DEVNULL)

    run("initdb", "-A", "trust", "-U", "tester", "--no-sync")
    options = (
        f"-c listen_addresses='' -c unix_socket_directories='{directory}' -c max_connections=200"
        " -c shared_preload_libraries=pg_stat_statements -c pg_stat_statements.max=1000"
    )
    run("pg_ctl", "-w", "-l", directory / "log", "-o", options, "start")
    try:
        yield directory
    finally:
        run("pg_ctl", "-w", "-m", "immediate", "stop")
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
            print(f"| {name} | {value:.1f}{unit} | |", flush=True)  # noqa: T201
            return
        sign = "≤" if most else "≥"
        print(f"| {name} | {value:.1f}{unit} | {sign} {target:g}{unit} |", flush=True)  # noqa: T201
        if value > target if most else value < target:
            self.misses.append(name)

    def batch(self, name: str, *, direct: bool = False) -> Batch:
        """Return a batch."""
        return Batch(
            name,
            database_url=self.direct if direct else self.url,
            session=lambda: Session(self.key, base_url=self.base_url),
            max_in_flight=WORKERS * IN_FLIGHT,
        )

    def workers(self, name: str) -> list[subprocess.Popen[bytes]]:
        """Start the workers of a batch."""
        return [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", WORKER),
                    f"{self.url}?application_name=worker{number}",
                    *(name, self.base_url, self.key, str(WORKERS * IN_FLIGHT)),
                ]
            )
            for number in range(WORKERS)
        ]

    def connections(self) -> int:
        """Return the number of connections of the worker that has most."""
        return int(
            self.number(
                "select max(n) from (select count(*) as n from pg_stat_activity"
                " where application_name like 'worker%' group by application_name) as workers"
            )
        )

    def server_cpu(self) -> float:
        """Return the CPU time of all processes of the server until now, in seconds."""
        (postmaster,) = self.query("select setting from pg_settings where name = 'data_directory'")
        leader = int(Path(postmaster[0], "postmaster.pid").read_text(encoding="utf-8").split()[0])
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields = path.read_text(encoding="utf-8").rpartition(")")[2].split()
                if int(path.parent.name) == leader:  # also its children that have ended
                    ticks += sum(map(int, fields[11:15]))
                elif int(fields[1]) == leader:
                    ticks += sum(map(int, fields[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def finished(self, name: str) -> int:
        """Return how many items of a batch have an outcome."""
        text = "select count(*) from promptlayer_item where batch = :name and kind is not null"
        return int(self.number(text, name=name))


def requests(count: int, seconds: float) -> Iterator[StartRequest]:
    """Yield the requests of the items."""
    for number in range(count):
        key = f"item {number}"
        yield StartRequest("job", {"key": key, "seconds": seconds}, key=key)


def measure_add(bench: Bench, count: int) -> None:
    """Add items."""
    began = time.monotonic()
    asyncio.run(bench.batch("add").add(requests(count, 1.0)))
    bench.row(f"adding {count:,} items", time.monotonic() - began, " s", 60.0)
    assert asyncio.run(bench.batch("add", direct=True).status()).total == count


def measure_status(bench: Bench, count: int) -> None:
    """Ask for the status of a batch that has many items, without the proxy."""
    batch = bench.batch("many", direct=True)
    asyncio.run(batch.add(requests(1, 1.0)))
    numbers = f"generate_series(2, {count}) AS n"
    ended = "CASE WHEN n % 2 = 0 THEN 'succeeded' END"
    now = datetime.now(UTC)
    outcome = StoredOutcome("a key", 7, True, "x" * 200, None, now, now).to_json()
    bench.query(
        "INSERT INTO promptlayer_item (batch, key, attempt, kind, seq, outcome)"
        f" SELECT 'many', 'key ' || n, 1, {ended}, n, :outcome FROM {numbers}",
        outcome=outcome,
    )
    bench.query(
        "INSERT INTO dbos.workflow_status (workflow_uuid, status, name, queue_name)"
        " SELECT 'promptlayer-exec/many/1/key ' || n,"
        " CASE WHEN n % 2 = 0 THEN 'SUCCESS' WHEN n % 1000 = 1 THEN 'PENDING' ELSE 'ENQUEUED' END,"
        f" 'promptlayer_exec.item', 'promptlayer-exec/many' FROM {numbers}"
    )
    bench.query("UPDATE promptlayer_batch SET total = NULL WHERE name = 'many'")
    bench.query("VACUUM ANALYZE")

    async def ask() -> float:
        await batch.status()  # counts the items, as nothing has kept the numbers
        async with aclosing(batch.outcomes(until_done=False)) as outcomes:
            await anext(outcomes)  # the batch stays open, and so does its connection
            times = []
            for _ in range(20):
                began = time.monotonic()
                status = await batch.status()
                times.append(time.monotonic() - began)
        assert (status.total, status.succeeded) == (count, count // 2)
        return statistics.median(times)

    bench.row(f"`status()` of {count:,} items", asyncio.run(ask()) * 1000, " ms", 10.0)


def measure_outcomes(bench: Bench, count: int) -> None:
    """Read outcomes of 2 MiB each in a process of its own."""
    store = Store(check_url(bench.direct))
    store.prepare()
    store.add("large", [Row(str(number), "{}", "") for number in range(count)])
    now = datetime.now(UTC)
    for number in range(count):
        output = os.urandom(2**20).hex()
        outcome = StoredOutcome(str(number), 7, True, output, None, now, now)
        store.finish("large", [Ending.of(1, outcome)])
    store.close()
    command = [sys.executable, "-c", READER, bench.url, "large"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, timeout=TIMEOUT, check=True)
    growth = int(finished.stdout) / 1024
    bench.row(f"memory that reading {count} outcomes of 2 MiB takes", growth, " MiB", 64.0)


def measure_work(bench: Bench, count: int, *, show_statements: bool) -> None:
    """Work on items of half a second with three workers."""
    empty = bench.number(_SIZE)
    asyncio.run(bench.batch("work", direct=True).add(requests(count, 0.5)))
    bench.query("select pg_stat_statements_reset()")
    server_cpu = bench.server_cpu()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    workers = bench.workers("work")
    first, last = count // 10, count * 9 // 10
    times: dict[int, float] = {}
    connections = 0
    give_up = time.monotonic() + TIMEOUT
    while any(worker.poll() is None for worker in workers):
        assert time.monotonic() < give_up, "the work does not end"
        finished = bench.finished("work")
        for mark in (first, last):
            if finished >= mark and mark not in times:
                times[mark] = time.monotonic()
                connections = max(connections, bench.connections())
        time.sleep(0.1)
    assert [worker.returncode for worker in workers] == [0] * WORKERS
    condition = "from pg_stat_statements where query not like '%pg_stat%'"
    condition += " and query not like '%from promptlayer_item where batch = $1 and kind is not%'"
    statements = bench.number(f"select sum(calls) {condition}")
    rate = (last - first) / (times[last] - times[first])
    bench.row(f"items per second, {WORKERS} workers", rate, "", 150.0, most=False)
    bench.row("statements per item", statements / count, "", 12.0)
    bench.row("connections per worker", connections, "", 6.0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    bench.row("CPU of the workers per item", cpu / count * 1000, " ms")
    bench.row("CPU of PostgreSQL per item", (bench.server_cpu() - server_cpu) / count * 1000, " ms")
    bench.row("disk per item", (bench.number(_SIZE) - empty) / count / 1024, " KiB")
    if show_statements:
        for calls, query in bench.query(
            f"select calls, query {condition} order by calls desc limit 40"
        ):
            text = " ".join(query.split())
            print(f"{calls / count:6.2f} {text[:90]} ... {text[-60:]}", flush=True)  # noqa: T201


def measure_kill(bench: Bench) -> None:
    """Kill one of three workers that have 900 items each."""
    count = WORKERS * IN_FLIGHT
    asyncio.run(bench.batch("kill", direct=True).add(requests(count, 45.0)))
    workers = bench.workers("kill")
    held = (
        "select executor_id, count(*) from dbos.workflow_status"
        " where queue_name = 'promptlayer-exec/kill' and status = 'PENDING' group by 1"
    )
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
        bench.row(f"moving {before[victim]} items", time.monotonic() - began, " s", 15.0)
        while bench.finished("kill") < count:
            assert time.monotonic() < give_up, "the items do not end"
            time.sleep(0.5)
        (unknown,) = bench.query(
            "select count(*) from promptlayer_item where batch = 'kill' and kind = 'unknown'"
        )
        bench.row("lost starts of live workers", unknown[0], "", 0.0)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def main() -> int:
    """Print the table, and return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delay", type=float, default=10.0, help="milliseconds per round trip")
    parser.add_argument("--add", type=int, default=100_000, help="how many items to add")
    parser.add_argument("--run", type=int, default=6_000, help="how many items to work on")
    parser.add_argument("--status", type=int, default=1_000_000, help="of how many items")
    parser.add_argument("--outcomes", type=int, default=300, help="how many of 2 MiB to read")
    parser.add_argument("--no-kill", action="store_true", help="do not kill a worker")
    parser.add_argument("--statements", action="store_true", help="print the statements, too")
    options = parser.parse_args()
    with (
        postgres() as directory,
        program(PROXY, directory / f".s.PGSQL.{PORT}", options.delay / 1000) as (port,),
        program(SIMULATOR) as (base_url, key),
    ):
        url = f"postgresql://tester@127.0.0.1:{port}/batches"
        direct = f"postgresql://tester@/batches?host={directory}"
        admin = sa.create_engine(
            f"postgresql+psycopg://tester@/postgres?host={directory}", isolation_level="AUTOCOMMIT"
        )
        with admin.connect() as connection:
            connection.execute(sa.text("create database batches"))
        admin.dispose()
        bench = Bench(direct.replace("postgresql:", "postgresql+psycopg:"), url, base_url, key)
        bench.query("create extension pg_stat_statements")
        print(f"| {options.delay:g} ms per round trip | measured | target |")  # noqa: T201
        print("|---|---|---|")  # noqa: T201
        if options.add:
            measure_add(bench, options.add)
        if options.status:
            measure_status(bench, options.status)
        if options.outcomes:
            measure_outcomes(bench, options.outcomes)
        if options.run:
            measure_work(bench, options.run, show_statements=options.statements)
        if not options.no_kill:
            measure_kill(bench)
        bench.engine.dispose()
    for miss in bench.misses:
        print(f"missed: {miss}")  # noqa: T201
    return bool(bench.misses)


if __name__ == "__main__":
    sys.exit(main())
