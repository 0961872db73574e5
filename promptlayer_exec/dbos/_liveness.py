"""Which workers are alive, and what happens to the items of dead ones."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from promptlayer_exec import ConfigurationError, StoreUnavailable
from promptlayer_exec.dbos._store import Store
from promptlayer_exec.dbos._tables import items, key_and_attempt

logger = logging.getLogger("promptlayer_exec")


@attrs.frozen
class Pulse:
    """How workers notice that another one is dead, in seconds.

    Each records a heartbeat every `interval`, and is dead after `dead_after` without one. That is
    longer than most stalls of a machine or restarts of a database, and short enough to move the
    items of a dead worker within 30 s. A round may be late by `slow`. Beyond that, the delay does
    not count as silence of the others.

    Every `look_every` rounds, a worker looks for items that it has taken but does not run.
    """

    interval: float = 2.0
    dead_after: float = 12.0
    slow: float = 4.0
    look_every: int = 5


PULSE = Pulse()


@attrs.define(eq=False)
class Liveness:
    """Records a worker's heartbeat, and recovers items that nobody runs.

    A worker is dead if its heartbeat has not changed for `dead_after` seconds on the clock of the
    worker that watches it. Nothing compares the clocks of two machines. Time in which the watching
    worker itself stood still does not count, because the others may have done the same. On the same
    machine, a worker is dead as soon as its process is gone.
    """

    _store: Store
    _batch: str
    _executor: str
    _active: Mapping[str, object]  # the DBOS workflows that this worker runs
    _let_go: Callable[[Iterable[str]], None]  # stops running some of them
    # The last heartbeat of each other worker, and for how many seconds it has not changed.
    _seen: dict[str, tuple[Any, float]] = attrs.field(init=False, factory=dict)
    _seen_at: float = attrs.field(init=False, factory=time.monotonic)
    _rounds: int = attrs.field(init=False, default=0)
    _idle: set[str] = attrs.field(init=False, factory=set)

    def record_heartbeat(self) -> None:
        """Record that this worker is alive, before it takes its first item."""
        process = json.dumps([*_pid_scope(), os.getpid()])
        self._store.record_heartbeat(self._batch, self._executor, process)

    async def run(self) -> None:
        """Record heartbeats, and look after other workers, until cancelled."""
        while True:
            try:
                await self._store.run_in_thread(self._look, {*self._active})
                self._let_go(await self._store.run_in_thread(self._ended, {*self._active}))
            except (ConfigurationError, StoreUnavailable) as error:
                logger.warning(
                    "could not check whether other workers are alive, trying again: %.300s", error
                )
            await asyncio.sleep(PULSE.interval)
            await self._store.run_in_thread(self.record_heartbeat)

    def _look(self, active: Collection[str]) -> None:
        taken = self._store.taken(self._batch)
        self._recover_from_dead_workers(taken)
        self._rounds += 1
        if self._rounds % PULSE.look_every == 0:
            mine = {item for item, executor in taken.items() if executor == self._executor}
            self._put_back_what_was_lost(mine.difference(active))

    def _ended(self, active: Collection[str]) -> list[str]:
        """Return those of the running items that have an outcome, or another attempt, or no row."""
        attempts = {workflow: key_and_attempt(workflow) for workflow in active}
        keys = [key for key, _ in attempts.values()]
        columns = items.c.attempt, items.c.kind
        rows = {row.key: row for row in self._store.rows_of(self._batch, keys, *columns)}
        return [
            workflow
            for workflow, (key, attempt) in attempts.items()
            if key not in rows or rows[key].kind is not None or rows[key].attempt != attempt
        ]

    def _recover_from_dead_workers(self, taken: Mapping[str, str]) -> None:
        """Put the items of dead workers back into the queue."""
        others = {*taken.values()} - {self._executor}
        heartbeats = self._store.heartbeats(self._batch) if others else {}
        now = time.monotonic()
        passed = min(now - self._seen_at, PULSE.interval + PULSE.slow)
        self._seen_at = now

        # Check all before releasing any, which may take a while.
        dead = [name for name in others if self._is_dead(name, heartbeats.get(name), passed)]
        for worker in dead:
            if self._store.claim_rescue(self._batch, worker, self._executor, PULSE.dead_after):
                release(self._store, self._batch, worker)

    def _put_back_what_was_lost(self, idle: set[str]) -> None:
        """Put back into the queue the items that this worker has taken but does not run.

        DBOS takes items in a transaction. If the connection breaks during its commit, DBOS never
        runs them.
        """
        # One that was just taken, or has just finished, is idle only once.
        if lost := idle & self._idle:
            text = "batch %r: putting back %d items that left the queue but did not run"
            logger.warning(text, self._batch, len(lost))
            self._store.put_back(self._batch, lost)
        self._idle = idle - lost

    def _is_dead(self, worker: str, heartbeat: Any, passed: float) -> bool:
        if heartbeat is None or _is_gone(heartbeat.process):  # it stopped, or was killed
            return True

        before, silent = self._seen.get(worker, (None, 0.0))
        if heartbeat == before:
            silent += passed
        else:
            silent = 0.0
        self._seen[worker] = heartbeat, silent
        return silent > PULSE.dead_after


def release(store: Store, batch: str, executor: str) -> None:
    """Put the items of a worker that is gone back into the queue, and forget the worker."""
    taken = store.taken(batch)
    store.put_back(batch, [workflow for workflow, by in taken.items() if by == executor])
    store.remove_worker(executor)


def count_workers(store: Store, batch: str) -> int:
    """Return how many workers are alive. A silent one counts for `dead_after` seconds."""
    return sum(not _is_gone(process) for process in store.processes(batch, PULSE.dead_after))


def _is_gone(process: str) -> bool:
    """Return True if a process is certainly gone, False if that is uncertain on this machine."""
    boot, namespace, pid = json.loads(process)
    if boot is None or [boot, namespace] != _pid_scope():
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def _pid_scope() -> list[str | None]:
    """Return the boot and the namespace within which a process id means the same process."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return [boot, str(Path("/proc/self/ns/pid").readlink())]
    return [None, None]
