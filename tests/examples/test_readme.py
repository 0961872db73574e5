"""The README and the tutorial, run from top to bottom beside `promptlayer-exec simulate`.

The language of a block says what becomes of it: `python` is saved, or run in a coroutine if it is
part of one, `sh` is run, `diff` changes the last program, and a `text` right after a command is
what that prints. `shell` prepares a machine, by an installation or a real key, which is no test's
business; only the command after an installation is run.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Return the environment with what `simulate` tells its user to export, and no other key."""
    scripts = str(Path(sys.executable).parent)
    kept = {name: it for name, it in os.environ.items() if not name.startswith("PROMPTLAYER")}
    kept["PATH"] = os.pathsep.join([scripts, os.environ["PATH"]])
    kept["PYTHONWARNINGS"] = "always::ResourceWarning"
    command = ["promptlayer-exec", "simulate", "--port", "0"]
    with subprocess.Popen(command, env=kept, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        introduction = "".join(iter(server.stdout.readline, "Requests:\n"))
        exported = dict(re.findall(r"^  export (\w+)=(\S+)$", introduction, re.MULTILINE))
        assert exported.keys() == {"PROMPTLAYER_BASE_URL", "PROMPTLAYER_API_KEY"}
        yield kept | exported
        server.send_signal(signal.SIGINT)
        server.communicate()
    assert server.returncode == 0


def run(command: str | list[str], directory: Path, environment: dict[str, str]) -> str:
    """Run a command, which must succeed, and return what it prints."""
    is_server = "promptlayer-exec view" in command  # which ends by Ctrl-C
    if is_server:
        command = str(command).split()
    with subprocess.Popen(
        command,
        shell=isinstance(command, str),
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        if is_server and process.stdout is not None:
            assert process.stdout.readline().startswith("http://127.0.0.1:")
            process.send_signal(signal.SIGINT)
        try:
            printed, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0, (command, printed, errors)
    assert "ResourceWarning" not in errors
    return printed


def lasting(text: str) -> list[str]:
    """Return the lines without what depends on when a poll came: progress, unfinished nodes."""
    final = (line for line in text.splitlines() if not line.endswith(("QUEUED", "RUNNING")))
    return [line[5:] if "%" in line else line for line in final]


def changed(program: str, diff: str) -> str:
    """Return a program with a change."""
    before, after = (
        "".join(f"{line[1:]}\n" for line in diff.splitlines() if line[0] != sign) for sign in "+-"
    )
    assert program.count(before) == 1
    return program.replace(before, after)


def whole(part: str) -> str:
    """Return a program that runs a part of a coroutine."""
    coroutine = f"async def main():\n{indent(part, '    ')}"
    return f"import asyncio\nfrom promptlayer_exec import Session\n{coroutine}\nasyncio.run(main())"


@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_each_example_runs_unchanged(
    page: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    """In order, without a key; no block is left out but those that install something."""
    text = (ROOT / page).read_text(encoding="utf-8")
    printed, end, unused = "", 0, set[Path]()
    for block in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        prose, (language, code) = text[end : block.start()], block.groups()
        end = block.end()
        match language:
            case "python" if code.startswith("async with"):
                run([sys.executable, "-c", whole(code)], tmp_path, environment)
            case "python":
                before_or_after = prose + text[end:]
                (name, *_) = re.findall(r"(?i)save (?:this|it) as `(\w+\.py)`", before_or_after)
                program = tmp_path / name
                program.write_text(code)
                unused.add(program)
            case "sh":
                for line in code.splitlines():
                    printed = run(line, tmp_path, environment)
                    unused -= {it for it in unused if it.name in line}
            case "shell" if "&& promptlayer-exec" in code:
                run(code.partition(" && ")[2], tmp_path, environment)
            case "diff":
                program.write_text(changed(program.read_text(), code))
                unused.add(program)
            case "text" if not prose.strip():
                assert lasting(printed) == lasting(code)
            case _:
                assert language in ("shell", "text")
    assert not unused
