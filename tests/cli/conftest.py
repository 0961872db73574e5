"""Commands in processes of their own, in this process, and on terminals."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from promptlayer_exec.cli import main
from promptlayer_exec.simulator import SimRequest, Simulator

PROGRAM = [sys.executable, "-W", "error", "-m", "promptlayer_exec"]
TIMEOUT = 45.0


class Command:
    """A running command."""

    def __init__(self, command: list[str], env: dict[str, str], cwd: Path) -> None:
        self.process = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    def line(self) -> str:
        """Return the next line of standard output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def error_line(self) -> str:
        """Return the next line of standard error."""
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def line_with(self, text: str) -> str:
        """Return the next line of standard output that contains `text`."""
        while text not in (line := self.line()):
            assert line, f"{text!r} never came"
        return line

    def end(self, *, traceback: bool = False) -> tuple[int, str, str]:
        """Return the exit code, and the rest of standard output and standard error."""
        out, err = self.process.communicate(timeout=TIMEOUT)
        assert ("Traceback" in err) is traceback, err
        return self.process.returncode, out, err

    def close(self) -> None:
        """End the command if it is still running."""
        self.process.kill()
        self.process.communicate()


class Terminal:
    """A pseudo-terminal that runs a command, and the text that the command has written."""

    def __init__(self, command: list[str], env: dict[str, str], cwd: Path, columns: int) -> None:
        self.text = ""
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self.process = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)

    def read_until(self, text: str) -> None:
        """Read until `text` is written, after the text that was read before."""
        seen = len(self.text)
        while text not in self.text[seen:]:
            assert self._read(), f"{text!r} never came, but {self.text!r}"

    def end(self) -> tuple[int, str]:
        """Return the exit code and all text that was written."""
        while self._read():
            pass
        assert "Traceback" not in self.text
        return self.process.wait(TIMEOUT), self.text.replace("\r\n", "\n")

    def _read(self) -> bool:
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the other end is closed
            return False
        self.text += data.decode()
        return bool(data)

    def close(self) -> None:
        """End the command if it is still running."""
        self.process.kill()
        self.process.wait(TIMEOUT)
        os.close(self._master)


class Gate:
    """Holds the start of a run until it is opened; to be used as a simulator's `on_request`."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, request: SimRequest) -> None:
        """Block the server if the request starts a run."""
        if request.method == "POST":
            self.reached.set()
            self.opened.wait(TIMEOUT)


class Screen(io.StringIO):
    """A stream that says that it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        """Return True."""
        return True


class Finished(NamedTuple):
    """How a command ended."""

    code: Any
    out: str
    err: str


@pytest.fixture(scope="module")
def sim() -> Iterator[Simulator]:
    """Serve from a thread."""
    with Simulator() as simulator:
        yield simulator


@pytest.fixture
def gate() -> Gate:
    """Return a gate that is closed."""
    return Gate()


@pytest.fixture(autouse=True)
def _environment(sim: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment of a user of the simulator."""
    # These change the output of a command.
    for name in ("FORCE_COLOR", "LINES", "NO_COLOR", "PYTHONIOENCODING", "PYTHONUNBUFFERED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("PROMPTLAYER_API_KEY", sim.api_key)
    monkeypatch.setenv("PROMPTLAYER_BASE_URL", sim.base_url)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start commands in processes of their own; end those that still run."""
    with ExitStack() as running:

        def start(*arguments: object, program: list[str] = PROGRAM, **env: str) -> Command:
            command = Command([*program, *map(str, arguments)], os.environ | env, tmp_path)
            running.callback(command.close)
            return command

        yield start


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Open terminals; end the commands in them."""
    with ExitStack() as opened:

        def open_terminal(*arguments: object, columns: int = 80, **env: str) -> Terminal:
            command = [*PROGRAM, *map(str, arguments)]
            terminal = Terminal(command, os.environ | env, tmp_path, columns)
            opened.callback(terminal.close)
            return terminal

        yield open_terminal


@pytest.fixture
def call() -> Callable[..., Finished]:
    """Run commands to their end in this process."""

    def call(
        *arguments: object, encoding: str = "utf-8", on_screen: bool = False, **env: str
    ) -> Finished:
        out, err, screen = io.BytesIO(), io.BytesIO(), Screen()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["promptlayer-exec", *map(str, arguments)])
            patch.setattr(sys, "stdout", screen if on_screen else io.TextIOWrapper(out, encoding))
            patch.setattr(sys, "stderr", io.TextIOWrapper(err, "utf-8"))
            with pytest.raises(SystemExit) as exited:
                main()
            sys.stdout.flush()
            sys.stderr.flush()
            text = screen.getvalue() if on_screen else out.getvalue().decode(encoding)
            text = re.sub(r"\x1b\[\d*m", "", text) if on_screen else text  # bold and dim
            errors = err.getvalue().decode()
        assert "Traceback" not in errors, errors
        return Finished(exited.value.code, text, errors)

    return call
