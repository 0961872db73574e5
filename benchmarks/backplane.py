"""Measure how often processes that share Redis poll, and fail if a target is missed.

Eight sessions in four processes follow executions; the followers of each execution are in sessions
at random. Their polls are compared with those of a single process. In a third run one of the
processes is killed.

Usage: python benchmarks/backplane.py [EXECUTIONS]

It needs the extra `redis` and a Redis server, and takes two and a half minutes, however
few executions.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

from needs import need

need(extras="redis", debian="redis-server")
from promptlayer_exec.simulator import Scenario, SimNode, Simulator

PROCESSES = 4
SESSIONS = 2  # in each process
FOLLOWERS = 10  # of each execution
MOST_POLLS = 1.2  # times those of one process
KILL_AFTER = 5.0  # seconds

WORKER = """
import asyncio, json, sys, time
from contextlib import AsyncExitStack, aclosing
from promptlayer_exec import Session
from promptlayer_exec.redis import RedisBackplane

key, base_url, redis, sessions = sys.argv[1:]
longest = 0.0

async def follow(session, execution_id):
    global longest
    async with aclosing(session.execution(execution_id).stream()) as snapshots:
        at = time.monotonic()
        async for snapshot in snapshots:
            longest, at = max(longest, time.monotonic() - at), time.monotonic()
    return snapshot.complete

async def main():
    async with AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(
                Session(
                    key,
                    base_url=base_url,
                    rate=None,
                    backplane=RedisBackplane(redis) if redis else None,
                )
            )
            for _ in range(int(sessions))
        ]
        print("ready", flush=True)
        lists = json.loads(await asyncio.to_thread(sys.stdin.readline))
        follows = [
            follow(session, execution_id)
            for session, ids in zip(opened, lists, strict=True)
            for execution_id in ids
        ]
        complete = sum(await asyncio.gather(*follows))
        print(complete, longest, time.process_time())

asyncio.run(main())
"""


@contextmanager
def redis_server() -> Iterator[str]:
    """Run a Redis server, and yield its URL."""
    binary = shutil.which("redis-server") or shutil.which("valkey-server") or "redis-server"
    with tempfile.TemporaryDirectory(prefix="redis") as directory:
        path = Path(directory, "redis.sock")
        command = [binary, "--port", "0", "--unixsocket", path, "--save", "", "--dir", directory]
        with subprocess.Popen(command, stdout=PIPE) as process:
            assert process.stdout is not None
            while b"eady to accept" not in process.stdout.readline():
                assert process.poll() is None, "the Redis server did not start"
            yield f"unix://{path}"
            process.kill()


def scenario(dice: random.Random) -> Scenario:
    """Return a chain of five nodes that takes from 5 to 30 s."""
    names = [f"node {number}" for number in range(5)]
    return Scenario(
        [
            SimNode(name, name, dice.uniform(1.0, 6.0), after=names[number - 1 : number])
            for number, name in enumerate(names)
        ]
    )


def run(redis: str, *, processes: int, sessions: int, count: int, kills: bool) -> dict[str, float]:
    """Follow executions to their end, and return what was measured."""
    dice = random.Random(7)  # the same executions in each run
    with Simulator(log_requests=False) as sim:
        command = [sys.executable, "-c", WORKER, sim.api_key, sim.base_url, redis, str(sessions)]
        workers = [
            subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) for _ in range(processes)
        ]
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        ids = [sim.add_execution(scenario(dice)) for _ in range(count)]
        followed: list[list[list[int]]] = [[[] for _ in range(sessions)] for _ in workers]
        for execution_id in ids * FOLLOWERS:
            dice.choice(dice.choice(followed)).append(execution_id)
        for worker, lists in zip(workers, followed, strict=True):
            assert worker.stdin is not None
            worker.stdin.write(f"{json.dumps(lists)}\n")
            worker.stdin.flush()
        if kills:
            time.sleep(KILL_AFTER)
            workers[0].kill()
            workers[0].communicate()
        alive = workers[kills:]
        printed = [worker.communicate(timeout=120)[0].split() for worker in alive]
        expected = sum(len(ids) for lists in followed[kills:] for ids in lists)
        return {
            "polls": sim.request_count,
            "missing": expected - sum(int(words[0]) for words in printed),
            "gap": max(float(words[1]) for words in printed),
            "cpu": sum(float(words[2]) for words in printed),
        }


def main() -> int:
    """Print the table, and return 1 if a target is missed."""
    count = int(sys.argv[1]) if sys.argv[1:] else 200
    several = {"processes": PROCESSES, "sessions": SESSIONS, "count": count}

    def row(name: str, it: dict[str, float]) -> dict[str, float]:
        figures = f"{it['polls']:,} | {it['gap']:.1f} s | {it['cpu']:.1f} s"
        print(f"| {name} | {figures} |", flush=True)
        return it

    print(f"{count} executions of 5 to 30 s with {FOLLOWERS} streams each:\n")
    print("| | polls | longest gap in a stream | CPU |", flush=True)
    print("|---|---|---|---|", flush=True)
    with redis_server() as redis:
        one = row("one session", run("", processes=1, sessions=1, count=count, kills=False))
        row("eight sessions, each for itself", run("", **several, kills=False))
        shared = row("eight sessions with a backplane", run(redis, **several, kills=False))
        killed = row(
            f"the same, but the polling process dies after {KILL_AFTER:g} s",
            run(redis, **several, kills=True),
        )
    missed = [
        name
        for name, is_missed in (
            (
                f"at most {MOST_POLLS:g} times the polls",
                shared["polls"] > MOST_POLLS * one["polls"],
            ),
            ("every stream ends complete", any(it["missing"] for it in (one, shared, killed))),
        )
        if is_missed
    ]
    for miss in missed:
        print(f"missed: {miss}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
