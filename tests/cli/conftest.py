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
from typing import Any, NamedTuple, TextIO

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


class Output(io.TextIOWrapper):
    """A standard stream in a file. It passes on each line when it reaches the file."""

    def __init__(
        self, path: Path, encoding: str, *, is_screen: bool, on_line: Callable[[str], object]
    ) -> None:
        super().__init__(path.open("wb"), encoding)
        self._path, self._is_screen, self._on_line = path, is_screen, on_line
        self._lines = 0

    def isatty(self) -> bool:
        """Return whether the stream says that it is a terminal."""
        return self._is_screen

    def flush(self) -> None:
        """Write what is buffered to the file."""
        super().flush()
        new = self.text().splitlines(keepends=True)[self._lines :]
        self._lines += len(new)
        for line in new:
            self._on_line(line)

    def text(self) -> str:
        """Return what has reached the file."""
        return self._path.read_bytes().decode(self.encoding) if self._path.is_file() else ""


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
def call(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """Run commands to their end in this process.

    The function takes the arguments and the environment of the command, and:

    - `stdin`: standard input, or the text that it can read from there.
    - `encoding`: that of standard output.
    - `on_screen`: whether standard output says that it is a terminal. The text is returned without
      bold and dim.
    - `out`: where standard output goes instead, such as `/dev/full`.
    - `on_line`, called with each line as soon as it is written, for example to let the simulator
      go on.
    """
    streams = tmp_path_factory.mktemp("streams")

    def call(
        *arguments: object,
        stdin: str | TextIO = "",
        encoding: str = "utf-8",
        on_screen: bool = False,
        out: Path = streams / "out",
        on_line: Callable[[str], object] = str,
        **env: str,
    ) -> Finished:
        with (
            pytest.MonkeyPatch.context() as patch,
            Output(out, encoding, is_screen=on_screen, on_line=on_line) as written,
            Output(streams / "err", "utf-8", is_screen=False, on_line=str) as errors,
        ):
            for name, value in env.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["promptlayer-exec", *map(str, arguments)])
            if isinstance(stdin, str):
                stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")
            patch.setattr(sys, "stdin", stdin)
            patch.setattr(sys, "stdout", written)
            patch.setattr(sys, "stderr", errors)
            with pytest.raises(SystemExit) as exited:
                main()

        text, error_text = written.text(), errors.text()
        assert "Traceback" not in error_text, error_text
        if on_screen:
            text = re.sub(r"\x1b\[\d*m", "", text)
        return Finished(exited.value.code, text, error_text)

    return call
