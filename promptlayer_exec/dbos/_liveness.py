"""Which workers are alive, and what happens to the items of those that are not."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import attrs
import sqlalchemy as sa

from promptlayer_exec import ConfigurationError
from promptlayer_exec.dbos._connector import DatabaseLost
from promptlayer_exec.dbos._database import RETRY_FOR
from promptlayer_exec.dbos._store import Heartbeat, Store
from promptlayer_exec.dbos._tables import created_of
from promptlayer_exec.dbos._values import BatchStatus

logger = logging.getLogger("promptlayer_exec")
HEARTBEAT_INTERVAL = 2.0
# Longer than a stalled machine or the restart of a database takes. With the time until another
# worker looks, it is below the 15 s within which the items of a dead worker must move.
DEAD_AFTER = 12.0
_WATCH_INTERVAL = 0.5
# Seconds by which a round may be late; the rest of a longer one does not count as silence.
_SLOW = 4.0
_LOOK_INTERVAL = 10.0


@attrs.define(eq=False)
class Liveness:
    """A thread that records this worker's heartbeat, and recovers items that nobody runs.

    A worker is dead if its heartbeat has not changed for `DEAD_AFTER` seconds on the clock of the
    worker that watches it; the clocks of two machines are never compared. Time in which the
    watching worker itself stood still does not count, because the others may have stood still as
    well. On the same machine, a worker is dead as soon as its process has ended.
    """

    _store: Store
    _batch: str
    _executor: str
    # The DBOS workflows that this worker runs; another thread changes it.
    _active: Mapping[str, object]
    # Whether the worker was left without its end: then it is as good as dead.
    _is_abandoned: Callable[[], bool]
    # Called if the database was lost: the worker can do nothing more.
    _give_up: Callable[[Exception], None]
    _process: str = attrs.field(init=False, factory=lambda: describe(os.getpid()))
    # The last heartbeat of each other worker, and for how many seconds it has been the same.
    _seen: dict[str, tuple[Heartbeat, float]] = attrs.field(init=False, factory=dict)
    _seen_at: float = attrs.field(init=False, factory=time.monotonic)
    _next_look: float = attrs.field(init=False, default=0.0)
    _idle: set[str] = attrs.field(init=False, factory=set)
    _stop: threading.Event = attrs.field(init=False, factory=threading.Event)
    _thread: threading.Thread | None = attrs.field(init=False, default=None)

    def record_heartbeat(self) -> None:
        """Record that this worker is alive, before it takes its first item."""
        self._store.record_heartbeat(self._batch, self._executor, self._process)

    def start(self) -> None:
        """Start the thread."""
        # As a daemon, it does not keep the process of a worker that was left without its end.
        name = "promptlayer_exec-liveness"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, and wait until it has ended."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        failing_since: float | None = None
        while not (self._stop.is_set() or self._is_abandoned()):
            began = time.monotonic()
            try:
                self.record_heartbeat()
                self.recover_from_dead_workers()
                if time.monotonic() >= self._next_look:
                    self._put_back_what_was_lost()
                    self._next_look = time.monotonic() + _LOOK_INTERVAL
                failing_since = None
            except Exception as error:  # noqa: BLE001 - nobody else would see that the thread ends
                self._seen.clear()
                failing_since = began if failing_since is None else failing_since
                is_lost = isinstance(error.__cause__, DatabaseLost | BatchDeleted)
                is_lost = is_lost or began - failing_since > RETRY_FOR
                if isinstance(error, ConfigurationError) and not is_lost:
                    logger.warning("cannot exchange heartbeats with other workers: %.300s", error)
                else:
                    self._give_up(error)
            self._stop.wait(HEARTBEAT_INTERVAL)

    def recover_from_dead_workers(self) -> None:
        """Put the items of dead workers back into the queue."""
        others = self._store.running_executors(self._batch) - {self._executor}
        heartbeats = self._store.heartbeats() if others else {}
        now = time.monotonic()
        passed = min(now - self._seen_at, HEARTBEAT_INTERVAL + _SLOW)
        self._seen_at = now
        dead = [each for each in others if self._is_dead(each, heartbeats.get(each), passed)]
        for each in dead:
            if self._store.claim_rescue(self._batch, each, self._executor, DEAD_AFTER):
                self._store.requeue(self._batch, self._store.taken(self._batch, each))
                self._store.remove_worker(each)

    def _put_back_what_was_lost(self) -> None:
        """Put the items back into the queue that this worker has taken, and does not know of."""
        idle = self._store.taken(self._batch, self._executor).difference(self._active)
        # One that has just been taken, or has just ended, is idle only once.
        if lost := idle & self._idle:
            text = "batch %r: items that were taken from the queue and not run are put back: %d"
            logger.warning(text, self._batch, len(lost))
            self._store.requeue(self._batch, lost)
        self._idle = idle - lost

    def _is_dead(self, other: str, heartbeat: Heartbeat | None, passed: float) -> bool:
        if heartbeat is None or is_gone(heartbeat.process):  # it stopped properly, or was killed
            return True
        before, silent = self._seen.get(other, (None, 0.0))
        silent = silent + passed if heartbeat == before else 0.0
        self._seen[other] = heartbeat, silent
        return silent > DEAD_AFTER


class BatchDeleted(Exception):
    """The cause of an error: a batch was deleted while a worker stood still."""


def check_of(store: Store, batch: str) -> Callable[[sa.Connection], None]:
    """Return a check that raises an error if the batch is deleted, even if it is added again.

    The items of another batch of that name have the same keys. The check needs no lock: a
    transaction of a worker that stands still ends before the worker is taken for dead.
    """
    created = store.created(batch)

    def check(connection: sa.Connection) -> None:
        if created is None or connection.scalar(created_of(batch)) != created:
            raise ConfigurationError(
                f"batch {batch!r} was deleted meanwhile; what this worker had started runs on"
            ) from BatchDeleted()

    return check


def status(store: Store, batch: str) -> BatchStatus:
    """Return how many items are in which state, and how many workers are alive."""
    alive = [each for each in store.processes(batch, DEAD_AFTER) if not is_gone(each)]
    return attrs.evolve(store.status(batch), workers=len(alive))


def is_worked_on(store: Store, batch: str) -> bool:
    """Return True if a worker of the batch is alive; silence takes `DEAD_AFTER` to be believed."""
    first: dict[str, Heartbeat] | None = None
    give_up = time.monotonic() + DEAD_AFTER
    while True:
        alive = {
            executor: heartbeat
            for executor, heartbeat in store.heartbeats(batch).items()
            if not is_gone(heartbeat.process)
        }
        if first is None:
            first = alive
        if not alive or time.monotonic() > give_up:
            return False
        if any(first.get(executor) != heartbeat for executor, heartbeat in alive.items()):
            return True
        time.sleep(_WATCH_INTERVAL)


def describe(pid: int) -> str:
    """Return JSON that identifies a process: machine boot, namespace, id and start time."""
    return json.dumps([*_pid_scope(), pid, _start_time(pid)])


def is_gone(process: str) -> bool:
    """Return True if a process has certainly ended; False where that cannot be seen from here."""
    boot, namespace, pid, start_time = json.loads(process)
    if boot is None or [boot, namespace] != _pid_scope():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _start_time(pid) not in (None, start_time)


def _pid_scope() -> list[str | None]:
    """Return the boot and the namespace within which a process id means the same process."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return [boot, str(Path("/proc/self/ns/pid").readlink())]
    return [None, None]


def _start_time(pid: int) -> str | None:
    """Return when a process started; "" if it has ended, and its parent did not wait for it."""
    with suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *fields = stat.rpartition(")")[2].split()
        # A process of which only the first thread has ended is a zombie here, too, and runs on.
        return "" if state in "ZX" and fields[16] in "01" else fields[18]
    return None
