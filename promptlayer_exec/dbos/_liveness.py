"""Who is alive, and what becomes of the items of those who are not."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from promptlayer_exec import ConfigurationError
from promptlayer_exec.dbos._store import Beat, Store

logger = logging.getLogger("promptlayer_exec")
BEAT = 2.0
# Long enough for a stalled machine or a database that restarts, and well within the 30 s in which
# a dead worker's items must have moved.
DEAD_AFTER = 14.0


class Liveness:
    """Shows every two seconds, from a thread, that this worker lives, and looks after the others.

    The clocks of two machines are never compared: a worker is dead if its beat stayed the same for
    `DEAD_AFTER` seconds on the clock of the one who looks. On the same machine a process that is
    gone is seen at once.

    Args:
        store: where the beats are.
        batch: whose workers look after each other.
        executor: this worker.
        recover: gives the items of dead workers back to the queue.
    """

    def __init__(
        self, store: Store, batch: str, executor: str, recover: Callable[[list[str]], object]
    ) -> None:
        self._store = store
        self._batch = batch
        self._executor = executor
        self._recover = recover
        self._process = describe(os.getpid())
        self._seen: dict[str, tuple[Beat, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="promptlayer_exec-liveness")

    def announce(self) -> None:
        """Show that this worker lives, before it has any item."""
        self._store.beat(self._executor, self._process)

    def start(self) -> None:
        """Go on showing it, and look after the others."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait until it has."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.announce()
                self._look_around()
            except (ConfigurationError, SQLAlchemyError) as error:
                # Whoever could not look cannot tell how long the others were silent.
                self._seen.clear()
                logger.warning("%.300s", error)
            self._stop.wait(BEAT)

    def _look_around(self) -> None:
        others = set(self._store.running(self._batch, patience=0.0)) - {self._executor}
        beats = self._store.beats() if others else {}
        dead = [other for other in others if self._is_dead(other, beats.get(other))]
        if dead:
            self._recover(dead)

    def _is_dead(self, other: str, beat: Beat | None) -> bool:
        if beat is None or is_gone(beat.process):  # it stopped in good order, or was killed
            return True
        now = time.monotonic()
        before, since = self._seen.get(other, (None, now))
        if before != beat:
            since = now
        self._seen[other] = (beat, since)
        return now - since > DEAD_AFTER


def describe(pid: int) -> str:
    """Return where a process is: the boot, the namespace, its id and when it began."""
    return json.dumps([*_realm(), pid, _began(pid)])


def is_gone(process: str) -> bool:
    """Tell whether a process is surely gone; False where that cannot be told from here."""
    boot, namespace, pid, began = json.loads(process)
    if boot is None or [boot, namespace] != _realm():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    now = _began(pid)
    return now is not None and now != began


def _realm() -> list[str | None]:
    """Return what two processes have in common if one's id means something to the other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return [boot, str(Path("/proc/self/ns/pid").readlink())]
    except OSError:
        return [None, None]


def _began(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]
