"""The command line, in processes of its own where signals and streams matter."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import pytest

from promptlayer_exec import RetryPolicy
from promptlayer_exec._install import install_hint
from promptlayer_exec.cli._exit import ExitCode
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator, examples

Call: TypeAlias = Callable[..., tuple[int, str, str]]
Start: TypeAlias = Callable[..., Any]
PROGRAM = [sys.executable, "-W", "error", "-m", "promptlayer_exec"]
TIMEOUT = 45.0
MAIN = "from promptlayer_exec.__main__ import main; main()"
BROKEN = (
    """
import promptlayer_exec

def execution(*args):
    raise EOFError("what now?")
promptlayer_exec.Session.execution = execution
"""
    + MAIN
)
UNREACHABLE = "http://127.0.0.1:9"
PATIENT = ("--timeout", str(TIMEOUT))  # in case that a line never comes
FULL = Path("/dev/full")
PROXIES = {"HTTP_PROXY": UNREACHABLE, "HTTPS_PROXY": UNREACHABLE}
HELD = Scenario(
    [
        SimNode("think", {"plan": 1}, None),
        SimNode("reply", "Good day", None, after=["think"], is_output_node=True),
    ]
)
DONE = Scenario([SimNode("reply", "Good\nday", is_output_node=True)])
FAILED = Scenario(
    [
        SimNode("think", status="FAILED", error_message="no idea\nat \x1b[31mall"),
        SimNode("reply", after=["think"], is_output_node=True),
    ]
)
HOSTILE = Scenario(
    [
        SimNode("[red]name", "[blue]x\x1b[2J\x9b2J\u202e"),
        SimNode("half \ud800", [math.nan, math.inf, "\udfff", "日本"], is_output_node=True),
    ]
)


def redirected(how: str) -> list[str]:
    """Return the program as run by a shell command in which RUN stands for it."""
    return ["sh", "-c", how.replace("RUN", 'exec "$@"'), "sh", *PROGRAM]


def python(code: str) -> list[str]:
    """Return a program that runs Python code."""
    return [sys.executable, "-W", "error", "-c", code]


def shown(text: str) -> str:
    """Return the text without escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


class TestWatch:
    """`watch ID`."""

    def test_plain_lines_are_written_as_the_nodes_change(self, sim: Simulator, call: Call) -> None:
        """Each change of a node is one line, written at once; the last line is the result."""
        execution_id = sim.add_execution(HELD)

        def go_on(line: str) -> None:
            if line.endswith("reply  QUEUED\n"):
                sim.finish(execution_id, "think")
                sim.finish(execution_id, "reply")

        code, out, err = call("watch", execution_id, *PATIENT, on_line=go_on, FORCE_COLOR="1")
        assert (code, err) == (0, "")
        assert re.fullmatch(
            r" +0\.\d s  think  RUNNING\n"
            r" +0\.\d s  reply  QUEUED\n"
            r' +\d\.\d s  think  SUCCESS  {"plan": 1}\n'
            r' +\d\.\d s  reply  SUCCESS  "Good day"\n'
            rf"execution {execution_id} succeeded after \d\.\d s: 2 SUCCESS\n",
            out,
        )

    def test_a_failed_execution_is_exit_code_1(self, sim: Simulator, call: Call) -> None:
        """The last line is a sentence with node and reason; then comes how to read the rest."""
        execution_id = sim.add_execution(FAILED)
        code, out, err = call("watch", execution_id)
        assert code == 1
        assert r"think  FAILED   no idea\nat \x1b[31mall" in out
        sentence = rf"execution {execution_id} failed in think: no idea at \x1b[31mall."
        assert out.splitlines()[-1] == sentence
        assert err == f"print the whole error with:\n  promptlayer-exec results {execution_id}\n"

    def test_the_end_of_the_traceback_is_printed(self, sim: Simulator, call: Call) -> None:
        """Its last three lines, escaped, and `results` prints all of it."""
        details = "Calls:\n  one\n\n  two\n  three\x1b[31m\nWhy: no idea"
        raw = {"raw": details}
        nodes = [SimNode("a", status="FAILED", error_message="no idea", raw_error_message=raw)]
        execution_id = sim.add_execution(
            Scenario([*nodes, SimNode("b", status="FAILED"), SimNode("c", after=["a", "b"])])
        )
        code, out, err = call("watch", execution_id, "--base-url", sim.base_url)
        assert code == 1
        assert out.endswith(f"execution {execution_id} failed in a and 1 other node: no idea.\n")
        assert err == (
            "    two\n    three\\x1b[31m\n  Why: no idea\nprint the whole error with:\n"
            f"  promptlayer-exec results {execution_id} --base-url {sim.base_url}\n"
        )
        whole = details.replace("\x1b", "\\x1b")
        assert call("results", execution_id)[2].startswith(f"a: {whole}\n\nb: PromptLayer gave no")
        assert call("watch", execution_id, "--json")[2] == ""

    def test_the_failure_on_the_page_is_what_is_printed(self, sim: Simulator, call: Call) -> None:
        """The page on the command line shows it, with the time that its nodes take."""
        scenario = examples.WORKFLOWS["invoice-check"].scenario({})
        nodes = [attrs.evolve(node, duration=0.0) for node in scenario.nodes]
        execution_id = sim.add_execution(Scenario(nodes))
        page = Path(__file__).parents[2] / "docs" / "reference" / "command-line.md"
        (shown,) = re.findall(r"```console\n.*\n([^`]*)```", page.read_text(encoding="utf-8"))
        _, out, err = call("watch", execution_id)
        printed = f"{out.splitlines()[-1]}\n{err}".replace(str(execution_id), "1002")
        assert shown.replace(" after 4.3 s", "") == printed

    def test_json_lines(self, sim: Simulator, call: Call) -> None:
        """With --json, each poll with a change is one object; the last one is complete."""
        execution_id = sim.add_execution(HELD)

        def go_on(line: str) -> None:
            nodes = json.loads(line)["nodes"]
            if nodes["think"]["status"] == "RUNNING":
                sim.finish(execution_id, "think")
            elif nodes["reply"]["status"] == "RUNNING":
                sim.finish(execution_id, "reply", status="FAILED", error_message="why")

        code, out, err = call("watch", execution_id, "--json", *PATIENT, on_line=go_on)
        assert (code, err) == (1, "")
        first, second, last = map(json.loads, out.splitlines())
        assert first["execution_id"] == str(execution_id)
        assert first["poll"] == 1
        assert (first["complete"], first["succeeded"]) == (False, None)
        assert [node["status"] for node in first["nodes"].values()] == ["RUNNING", "QUEUED"]
        assert second["poll"] > 1
        assert second["nodes"]["think"]["value"] == {"plan": 1}
        assert second["nodes"]["think"]["running"] == first["nodes"]["think"]["running"]
        assert (last["complete"], last["succeeded"]) == (True, False)
        assert last["nodes"]["reply"]["error_message"] == "why"

    def test_hostile_text(self, sim: Simulator, call: Call) -> None:
        """Escape sequences, markup, NaN and lone surrogates are text, and intact in JSON."""
        execution_id = sim.add_execution(HOSTILE)
        code, out, err = call("watch", execution_id)
        assert (code, err) == (0, "")
        assert out.isprintable() is False
        assert set(out) & {"\x1b", "\x9b", "\u202e"} == set()
        assert r'[red]name    SUCCESS  "[blue]x\u001b[2J\x9b2J\u202e"' in out
        assert r'half \ud800  SUCCESS  [NaN, Infinity, "\udfff", "日本"]' in out

        code, out, _ = call("watch", execution_id, encoding="ascii")
        assert code == 0
        assert r"\u65e5\u672c" in out

        code, out, _ = call("watch", execution_id, "--json")
        nodes = json.loads(out)["nodes"]
        assert nodes["[red]name"]["value"] == "[blue]x\x1b[2J\x9b2J\u202e"
        assert str(nodes["half \ud800"]["value"]) == str([math.nan, math.inf, "\udfff", "日本"])
        assert code == 0

    def test_a_timeout_is_exit_code_3(self, sim: Simulator, call: Call) -> None:
        """The error shows how to pick the execution up again; with --json it is a line too."""
        execution_id = sim.add_execution(HELD)
        code, out, err = call("watch", execution_id, "--json", "--timeout", "0.3")
        assert code == 3
        assert f"execution {execution_id}: still running after 0.3 s" in err
        where = "last seen running in think (0 of 2 nodes done). Follow it with"
        assert err.endswith(f", {where}:\n  promptlayer-exec watch {execution_id}\n")
        error = json.loads(out.splitlines()[-1])["error"]
        assert (error["type"], error["execution_id"]) == ("ExecutionTimeout", str(execution_id))
        assert "still running after 0.3 s" in error["message"]

    def test_a_refusal_is_exit_code_4(self, sim: Simulator, call: Call) -> None:
        """A wrong key or an unknown id is reported at once, without advice to try again."""
        wrong_key = call("watch", 5, PROMPTLAYER_API_KEY="wrong")
        unknown_id = call("watch", 2**63 - 1)
        code, out, err = wrong_key
        assert (code, out) == (4, "")
        assert "Invalid or missing API key" in err
        assert "Follow it with" not in err
        code, out, err = unknown_id
        assert (code, out) == (4, "")
        assert f"execution {2**63 - 1}: " in err

    def test_plain_http_is_one_warning(self, call: Call) -> None:
        """If the key would be sent unencrypted, standard error says so, and the command goes on."""
        url = "http://0.0.0.0:9"
        code, out, err = call("watch", 5, "--outage", "0", "--base-url", url)
        assert (code, out) == (4, "")
        assert re.match(rf"warning: {url} is plain http: .*\n", err)
        assert err.count("plain http") == 1
        assert "UserWarning" not in err

    def test_a_retry_is_one_line(self, sim: Simulator, call: Call) -> None:
        """A request that is retried is one line of standard error, and not a failure."""
        execution_id = sim.add_execution(DONE)
        sim.inject(Fault.status(503, execution_id=execution_id))
        code, out, err = call("watch", execution_id)
        assert code == 0
        assert "succeeded" in out
        assert re.fullmatch(r"execution \d+: the server returned 503 .*\. Trying again .*\n", err)

    def test_an_interrupt_is_exit_code_130(self, sim: Simulator, start: Start) -> None:
        """Ctrl-C prints the command that picks the execution up again, and so does SIGTERM."""
        execution_id = sim.add_execution(HELD)
        commands = [start("watch", execution_id), start("watch", execution_id, "--json")]
        terminated = start("watch", execution_id)
        for command in commands:
            command.line()
            command.process.send_signal(signal.SIGINT)
        terminated.line()
        terminated.process.terminate()
        code, _, err = commands[0].end()
        assert code == 130
        assert err == (
            f"interrupted\nexecution {execution_id} continues on PromptLayer, last seen running in"
            " think (0 of 2 nodes done). Follow it with:\n"
            f"  promptlayer-exec watch {execution_id}\n"
        )
        code, out, _ = commands[1].end()
        error = {
            "type": "Interrupted",
            "message": "interrupted",
            "execution_id": str(execution_id),
        }
        assert (code, json.loads(out)) == (130, {"error": error})
        code, _, err = terminated.end()
        assert code == 143
        assert err.startswith("terminated\n")
        assert f"promptlayer-exec watch {execution_id}" in err

    def test_a_broken_pipe_is_quiet(self, sim: Simulator, start: Start) -> None:
        """The command ends without a message when its reader is gone."""
        execution_id = sim.add_execution(HELD)
        command = start("watch", execution_id)
        command.line()
        assert command.process.stdout is not None
        command.process.stdout.close()
        sim.finish(execution_id, "think")
        assert command.process.wait(TIMEOUT) == 141
        assert command.process.stderr is not None
        assert command.process.stderr.read() == ""

    def test_usage_errors_are_exit_code_2(self, call: Call) -> None:
        """An invalid id, option or setting is reported, and nothing is sent."""
        cases = {
            call("watch", "0"): "Invalid value for 'ID'",
            call("watch", 2**63): "Invalid value for 'ID'",
            call(
                "watch", 5, "--base-url", "http://a..b"
            ): "base_url must be a valid URL. Correct --base-url",
            call("watch", 5, "--timeout", "nan"): "Invalid value for '--timeout'",
            call("results", 5, "--base-url", "ftp://x"): "must be an http:// or https:// URL",
            call("watch", 5, PROMPTLAYER_API_KEY=""): "variable PROMPTLAYER_API_KEY",
        }
        for (code, out, err), message in cases.items():
            assert (code, out) == (2, "")
            assert message in err
            assert "Follow it with" not in err


class TestRun:
    """`run WORKFLOW`."""

    def test_a_run_is_started_and_watched(self, sim: Simulator, call: Call) -> None:
        """Standard error has the id and the command for the output; the rest is as with `watch`."""
        sim.add_workflow("held", HELD)

        def go_on(line: str) -> None:
            if "RUNNING" in line:
                sim.finish(sim.runs[-1].execution_id, line.split()[2])

        code, out, err = call("run", "held", *PATIENT, on_line=go_on)
        execution_id = sim.runs[-1].execution_id
        assert code == 0
        assert re.match(r" +0\.\d s  think  RUNNING\n", out)
        assert f"\nexecution {execution_id} succeeded after" in out
        assert err == (
            f"execution {execution_id} started\n"
            f"print its main output with:\n  promptlayer-exec results {execution_id}\n"
        )

    def test_inputs_label_and_metadata_are_sent(
        self, sim: Simulator, call: Call, tmp_path: Path
    ) -> None:
        """Inputs come from arguments, files and standard input; names have any characters."""
        sim.add_workflow("a/b 7", DONE)
        letter = tmp_path / "letter.txt"
        letter.write_text("12\n")
        options = ("-i", "@-", "--input", "n=2", "-i", f"letter@{letter}", "--label", "prod")
        metadata = ("--metadata", "source=nightly", "--metadata", "run=7", "--no-push")
        piped = '{"n": 1, "who": "Maria"}'
        assert call("run", "a/b 7", *options, *metadata, stdin=piped)[0] == 0
        assert sim.runs[-1].workflow == "a/b 7"
        assert sim.runs[-1].body == {
            "input_variables": {"n": 2, "who": "Maria", "letter": "12\n"},
            "workflow_label_name": "prod",
            "metadata": {"source": "nightly", "run": "7"},
        }

    def test_workflow_id_and_version_number_are_sent(self, sim: Simulator, call: Call) -> None:
        """A workflow can be given by its id, and a version by its number."""
        workflow_id = sim.add_workflow("by id", DONE)
        assert call("run", workflow_id, "--version", 3, "--no-push")[0] == 0
        assert sim.runs[-1].workflow == "by id"
        assert sim.runs[-1].body == {"input_variables": {}, "workflow_version_number": 3}

    def test_a_warning_of_the_server_is_printed(self, sim: Simulator, call: Call) -> None:
        """It is one printable line of standard error, and not a failure."""
        sim.add_workflow("warned", DONE, warning="Missing: letter\x1b[2J")
        code, _, err = call("run", "warned")
        assert code == 0
        assert err.startswith("warning: Missing: letter\\x1b[2J\n")

    def test_no_watch_prints_only_the_id(self, sim: Simulator, call: Call) -> None:
        """If standard output cannot be written, the id is on standard error."""
        sim.add_workflow("unwatched", HELD)
        code, out, err = call("run", "unwatched", "--no-watch")
        execution_id = sim.runs[-1].execution_id
        assert (code, out, err) == (0, f"{execution_id}\n", f"execution {execution_id} started\n")
        code, out, err = call("run", "unwatched", "--no-watch", "--json")
        assert code == 0
        assert json.loads(out) == {"execution_id": str(sim.runs[-1].execution_id)}
        code, _, err = call("run", "unwatched", "--no-watch", out=FULL)
        assert code == 74
        assert err.startswith(f"execution {sim.runs[-1].execution_id} started\n")

    def test_a_refusal_is_exit_code_4(self, call: Call) -> None:
        """An unknown workflow or a wrong key is reported at once; no run was started."""
        unknown = call("run", "unknown", "--json")
        wrong_key = call("run", "unknown", PROMPTLAYER_API_KEY="wrong")
        code, out, err = unknown
        assert code == 4
        assert err.startswith("no run of workflow 'unknown' started: the server returned 404")
        assert "`promptlayer-exec workflows` lists the names." in err
        assert err.count("no run") == 1
        error = json.loads(out)["error"]
        assert (error["type"], error["execution_id"]) == ("NotFound", None)
        code, out, err = wrong_key
        assert (code, out) == (4, "")
        assert "Invalid or missing API key" in err

    def test_a_lost_answer_is_exit_code_1(self, sim: Simulator, call: Call) -> None:
        """The error says that the run may have started; it is not started again."""
        sim.add_workflow("lost", DONE)
        before = len(sim.runs)
        sim.inject(Fault.disconnect(), path="/run")
        code, out, err = call("run", "lost", "--json")
        assert code == 1
        assert "may have started" in err
        assert "no run was started" not in err
        assert "Follow it with" not in err
        error = json.loads(out)["error"]
        assert (error["type"], error["execution_id"]) == ("StartUnknown", None)
        assert len(sim.runs) == before + 1

    def test_a_timeout_is_exit_code_3(self, sim: Simulator, call: Call) -> None:
        """A run that started can be picked up again; a start is not retried for longer either."""
        sim.add_workflow("slow", HELD)
        code, _, err = call("run", "slow", "--timeout", "0.5")
        assert code == 3
        assert "still running after 0.5 s" in err
        assert err.endswith(f"  promptlayer-exec watch {sim.runs[-1].execution_id}\n")

        never = ("--timeout", "0.1", "--base-url", UNREACHABLE)
        code, _, err = call("run", "slow", *never)
        assert code == 3
        assert "could not send the start request within 0.1 s, so no run was started" in err
        assert "Follow it with" not in err

    def test_usage_errors_are_exit_code_2(self, sim: Simulator, call: Call) -> None:
        """Arguments that cannot be sent are reported, and nothing is sent."""
        sim.add_workflow("unused", DONE)
        before = sim.request_count
        cases = {
            call("run"): "Missing argument",
            call("run", ""): "workflow name must not be empty. This command started no run.",
            call("run", "unused", "letter=x"): "give inputs with -i: -i 'letter=x'",
            call("run", "unused", "-i", "letter"): "Invalid value for '--input'",
            call("run", "unused", "-i", "rows=[1, NaN]"): "rows[1]",
            call("run", "unused", "--metadata", "7"): "Invalid value for '--metadata'",
            call("run", "unused", "--version", 0): "Invalid value for '--version'",
            call("run", "unused", "--label", "a", "--version", 1): "pass either label or version",
            call("run", "unused", PROMPTLAYER_API_KEY=""): "variable PROMPTLAYER_API_KEY",
        }
        for (code, out, err), message in cases.items():
            assert (code, out) == (2, "")
            assert message in err
        assert sim.request_count == before

    def test_a_usage_error_is_written_as_json(self, call: Call) -> None:
        """With --json, an input that the library refuses is an error line too."""
        code, out, _ = call("run", "x", "-i", "x=[1e999]", "--json")
        assert code == 2
        error = json.loads(out)["error"]
        assert (error["type"], error["execution_id"]) == ("Misuse", None)

    def test_a_key_starts_one_run(self, sim: Simulator, call: Call) -> None:
        """The same command again watches the run that exists; other inputs are refused."""
        sim.add_workflow("keyed", DONE)
        before = len(sim.runs)
        options = ("keyed", "-i", "topic=otters", "--key", "order-42", "--no-push")
        first, again = call("run", *options), call("run", *options)
        assert len(sim.runs) == before + 1
        execution_id = sim.runs[-1].execution_id
        assert (first.code, again.code) == (0, 0)
        assert first.err.startswith(f"execution {execution_id} started\n")
        known = f"an earlier command with this key started execution {execution_id}\n"
        assert again.err.startswith(known)
        assert again.out.splitlines()[-1].startswith(f"execution {execution_id} succeeded")

        unwatched = call("run", *options, "--no-watch")
        assert unwatched == (0, f"{execution_id}\n", known)

        code, out, err = call("run", *options, "-i", "topic=voles", "--json")
        assert (code, err.count("\n"), len(sim.runs)) == (2, 1, before + 1)
        assert err == (
            "the key 'order-42' belongs to a different request (changed: inputs.topic), so"
            " nothing was sent. Use another --key, or repeat the original command.\n"
        )
        error = json.loads(out)["error"]
        assert (error["type"], error["execution_id"]) == ("KeyConflict", None)

    def test_a_lost_answer_with_a_key_stays_unknown(self, sim: Simulator, call: Call) -> None:
        """Each repetition starts nothing, and says what to do."""
        sim.add_workflow("lost once", DONE)
        before = len(sim.runs)
        sim.inject(Fault.disconnect(), path="/run")
        for _ in range(2):
            code, _, err = call("run", "lost once", "--key", "order-43", "--no-push")
            assert code == 1
            assert "with the key 'order-43'" in err
            assert "no run was started" not in err
            assert err.endswith(
                "The key starts nothing now. Look in PromptLayer for the metadata"
                " promptlayer_exec.key order-43. If the run is there, `promptlayer-exec starts"
                " adopt order-43 ID` records its id. If not, `promptlayer-exec starts forget"
                " order-43`, and start it again. Use the same --db.\n"
            )
        assert len(sim.runs) == before + 1

    def test_keys_belong_to_a_database(self, sim: Simulator, call: Call, tmp_path: Path) -> None:
        """`--db` names it; one that cannot be used starts nothing."""
        sim.add_workflow("keyed in a database", DONE)
        before = len(sim.runs)
        options = (
            "run",
            "keyed in a database",
            "--key",
            "order-44",
            "--no-push",
            "--no-watch",
            "--db",
        )
        url = f"sqlite:///{tmp_path / 'keys.sqlite'}"
        assert call(*options, url)[0] == call(*options, url)[0] == 0
        assert call(*options, f"sqlite:///{tmp_path / 'others.sqlite'}")[0] == 0
        assert len(sim.runs) == before + 2
        code, _, err = call(*options, f"sqlite:///{tmp_path}")
        assert (code, err.count("This command started no run.")) == (2, 1)
        assert call("run", "keyed", "--key", "x" * 501)[0] == 2
        assert call("run", "keyed", "--key", "")[0] == 2
        assert len(sim.runs) == before + 2

    def test_an_interrupted_watch_is_exit_code_130(self, sim: Simulator, start: Start) -> None:
        """The command that picks the execution up again has the --base-url that was given."""
        sim.add_workflow("interrupted", HELD)
        command = start("run", "interrupted", "--base-url", sim.base_url, PROMPTLAYER_BASE_URL="")
        command.line()
        command.process.send_signal(signal.SIGINT)
        code, _, err = command.end()
        execution_id = sim.runs[-1].execution_id
        assert code == 130
        assert err.splitlines()[1:] == [
            "interrupted",
            (
                f"execution {execution_id} continues on PromptLayer, last seen running in think"
                " (0 of 2 nodes done). Follow it with:"
            ),
            f"  promptlayer-exec watch {execution_id} --base-url {sim.base_url}",
        ]

    def test_an_interrupt_before_the_start_is_sent(self, start: Start) -> None:
        """The error says that no run was started, and the command ends at once."""
        command = start("run", "x", "--json", "--base-url", UNREACHABLE)
        assert "Trying again" in command.error_line()
        command.process.send_signal(signal.SIGINT)
        code, out, err = command.end()
        assert code == 130
        assert err.endswith("interrupted. This command started no run.\n")
        assert "waiting" not in err
        error = {
            "type": "Interrupted",
            "message": "interrupted. This command started no run.",
            "execution_id": None,
        }
        assert json.loads(out) == {"error": error}

    @pytest.mark.parametrize(
        ("signals", "code", "word"),
        [
            ([signal.SIGINT], 130, "interrupted"),
            ([signal.SIGTERM], 143, "terminated"),
            ([signal.SIGHUP] * 2, 143, "terminated"),  # the shell's, and the kernel's
        ],
    )
    def test_an_interrupted_start_reports_the_id(
        self, start: Start, gate: Any, signals: list[signal.Signals], code: int, word: str
    ) -> None:
        """The command waits for the answer of a start that was sent."""
        with Simulator(on_request=gate) as sim:
            sim.add_workflow("held", HELD)
            command = start("run", "held", PROMPTLAYER_BASE_URL=sim.base_url)
            assert gate.reached.wait(TIMEOUT)
            command.process.send_signal(signals[0])
            assert "the run may have started: waiting for its id" in command.error_line()
            for other in signals[1:]:
                command.process.send_signal(other)
            gate.opened.set()
            command.process.wait(TIMEOUT)
            execution_id = sim.runs[0].execution_id
        pick_up = "is not affected. Follow it with:\n  promptlayer-exec watch"
        message = f"{word}\nexecution {execution_id} {pick_up} {execution_id}\n"
        assert command.end() == (code, "", message)

    def test_a_start_in_a_terminal_that_is_closed_reports_the_id(
        self, start: Start, gate: Any
    ) -> None:
        """Standard error gets it, although the display can no longer be written."""
        leader, follower = pty.openpty()
        with Simulator(on_request=gate) as sim:
            sim.add_workflow("held", HELD)
            program = redirected(f"RUN >{os.ttyname(follower)}")
            env = {"TERM": "xterm", "PYTHONUNBUFFERED": "1"}  # the end of the display is written
            url = sim.base_url
            command = start("run", "held", program=program, PROMPTLAYER_BASE_URL=url, **env)
            assert gate.reached.wait(TIMEOUT)
            os.close(follower)
            os.close(leader)
            command.process.send_signal(signal.SIGHUP)
            assert "waiting for its id" in command.error_line()
            gate.opened.set()
            code, _, err = command.end()
            execution_id = sim.runs[0].execution_id
        assert code == 143
        assert err.endswith(f"Follow it with:\n  promptlayer-exec watch {execution_id}\n")

    @pytest.mark.parametrize(
        ("faults", "message"),
        [
            ([], "no run of workflow 'x' started: the server returned"),
            ([Fault.disconnect()], "a run of workflow 'x' may have started"),
        ],
    )
    def test_an_interrupted_start_that_fails(
        self, start: Start, gate: Any, faults: list[Fault], message: str
    ) -> None:
        """If there is no id, the error says whether a run may have started."""
        with Simulator(on_request=gate) as sim:
            for fault in faults:
                sim.inject(fault, path="/run")
            command = start("run", "x", PROMPTLAYER_BASE_URL=sim.base_url)
            assert gate.reached.wait(TIMEOUT)
            command.process.send_signal(signal.SIGINT)
            assert "waiting for its id" in command.error_line()
            gate.opened.set()
            code, _, err = command.end()
        assert code == 130
        assert err.startswith(f"interrupted. {message}")
        assert ("may have started" in err) is bool(faults)

    def test_a_second_interrupt_ends_a_start_at_once(self, start: Start, gate: Any) -> None:
        """The command does not wait for the answer."""
        with Simulator(on_request=gate) as sim:
            command = start("run", "x", PROMPTLAYER_BASE_URL=sim.base_url)
            assert gate.reached.wait(TIMEOUT)
            command.process.send_signal(signal.SIGINT)
            assert "Ctrl-C again stops waiting" in command.error_line()
            command.process.send_signal(signal.SIGINT)
            assert command.end() == (130, "", "")
            gate.opened.set()


class TestTerminal:
    """The output on a terminal."""

    def test_a_live_table(self, sim: Simulator, terminal: Callable[..., Any]) -> None:
        """The table is redrawn in place; its last state stays, with the reason for a failure."""
        execution_id = sim.add_execution(
            Scenario(
                [
                    SimNode("[red]think", "[blue]\x1b[2J" + "long " * 50, None),
                    SimNode("approve", None, None, after=["[red]think"]),
                    SimNode("reply", after=["approve"], is_output_node=True),
                ]
            )
        )
        screen = terminal("watch", execution_id)
        screen.read_until("RUNNING")
        assert "0 of 3" in shown(screen.text)
        sim.finish(execution_id, "[red]think")
        sim.finish(execution_id, "approve", status="ON_HOLD")
        screen.read_until("ON_HOLD")
        sim.finish(execution_id, "approve", status="FAILED", error_message="no\nway [bold]\x9b")
        code, text = screen.end()
        assert code == 1
        assert "\x1b[2J" not in text
        assert "\x1b[?25l" in text
        assert "\x1b[?25h" in text
        last = shown(text[text.rindex("execution", 0, text.rindex("Status")) :])
        assert "3 of 3" in last
        assert re.search(
            r"\n\[red\]think +SUCCESS +\d\.\d s +\"\[blue\]\\u001b\[2Jlong.*…\s*\n", last
        )
        assert f"\nexecution {execution_id} failed after" in last
        assert " s in approve: no way [bold]\\x9b.\n" in last
        assert "\x1b[32m━" not in text  # green is for runs that succeeded

    def test_a_narrow_terminal(self, sim: Simulator, terminal: Callable[..., Any]) -> None:
        """At 40 columns, no line of the table is wrapped."""
        execution_id = sim.add_execution(
            Scenario([SimNode("a node of many words", "x" * 99, is_output_node=True)])
        )
        code, text = terminal("watch", execution_id, columns=40, NO_COLOR="1").end()
        assert code == 0
        row = next(line for line in shown(text).splitlines() if line.startswith("a node"))
        assert len(row.rstrip()) <= 40
        assert "SUCCESS" in row

    def test_a_warning_is_shown_until_the_next_answer(
        self, sim: Simulator, terminal: Callable[..., Any]
    ) -> None:
        """A failed request is shown above the table until the server answers."""
        execution_id = sim.add_execution(HELD)
        sim.inject(Fault.status(503, execution_id=execution_id))
        screen = terminal("watch", execution_id)
        screen.read_until("waiting for the first response")
        screen.read_until("the server returned 503")
        screen.read_until("RUNNING")
        frame = screen.text[screen.text.rindex("0 of 2") :]
        assert "Trying again" not in frame
        sim.inject(Fault.disconnect(execution_id=execution_id))
        screen.read_until("no usable response")
        os.kill(screen.process.pid, signal.SIGINT)
        code, text = screen.end()
        assert code == 130
        end = shown(text[text.index("0 of 2", text.rindex("━")) :])
        assert "RUNNING" in end
        assert "Trying again" not in end
        assert end.endswith(f"promptlayer-exec watch {execution_id}\n")

    def test_a_run(self, sim: Simulator, terminal: Callable[..., Any]) -> None:
        """While the run starts, one line says so and shows warnings; the table replaces it."""
        sim.add_workflow("[red]agent", HELD, warning="no letter")
        sim.inject(Fault.status(429, retry_after=0.2), path="/run")
        screen = terminal("run", "[red]agent")
        screen.read_until("workflow [red]agent: starting")
        screen.read_until("the server returned 429")
        screen.read_until("RUNNING")
        execution_id = sim.runs[-1].execution_id
        sim.finish(execution_id, "think")
        sim.finish(execution_id, "reply")
        code, text = screen.end()
        assert code == 0
        erase_line = "\x1b[2K"
        assert erase_line in text[text.rindex("starting") : text.index("warning")]
        assert f"warning: no letter\nexecution {execution_id} started\n" in shown(text)
        assert "\x1b[32m━" in text  # the bar of a run that succeeded is green
        end = shown(text[text.rindex("Status") :])
        assert "Trying again" not in end
        assert end.endswith(f"  promptlayer-exec results {execution_id}\n")

    def test_a_refusal_prints_no_table(self, terminal: Callable[..., Any]) -> None:
        """Without a snapshot, only the error is left on the screen."""
        code, text = terminal("watch", 5).end()
        assert code == 4
        assert "execution 5: " in shown(text)
        assert "Status" not in text
        erase_line = "\x1b[2K"
        assert erase_line in text[text.rindex("waiting") :]

    def test_a_dumb_terminal(self, sim: Simulator, terminal: Callable[..., Any]) -> None:
        """A terminal that cannot move its cursor gets plain lines."""
        execution_id = sim.add_execution(DONE)
        code, text = terminal("watch", execution_id, TERM="dumb").end()
        assert code == 0
        assert "\x1b" not in text
        assert 'reply  SUCCESS  "Good\\nday"\n' in text

    def test_results(self, sim: Simulator, call: Call, terminal: Callable[..., Any]) -> None:
        """`results` prints an escaped string or indented JSON, and `--all` a table."""
        execution_id = sim.add_execution(
            Scenario([SimNode("reply", "One\n[b]\x1b[2J", is_output_node=True)])
        )
        nested = sim.add_execution(Scenario([SimNode("n", {"a": ["日本"]}, is_output_node=True)]))
        text = "One\n[b]\\x1b[2J\n"
        assert call("results", execution_id, on_screen=True) == (0, text, "")
        indented = '{\n  "a": [\n    "日本"\n  ]\n}\n'
        assert call("results", nested, on_screen=True) == (0, indented, "")
        code, text = terminal("results", execution_id, "--all").end()
        assert code == 0
        assert re.search(r'\nreply +SUCCESS +"One\\n\[b\]\\u001b\[2J" *\n', shown(text))


class TestResults:
    """`results ID`."""

    def test_the_main_output(self, sim: Simulator, call: Call) -> None:
        """A string is printed as it is, anything else as JSON; --all prints every node."""
        text = sim.add_execution(
            Scenario([SimNode("reply", "Good\n\x1b[1mday \ud800", is_output_node=True)])
        )
        number = sim.add_execution(
            Scenario([SimNode("reply", {"a": None, "b": "日本"}, is_output_node=True)])
        )
        commands = [
            call("results", text),
            call("results", text, "--json"),
            call("results", number),
            call("results", number, "--all"),
        ]
        assert commands[0] == (0, "Good\n\x1b[1mday \\ud800\n", "")
        assert commands[1] == (0, '"Good\\n\\u001b[1mday \\ud800"\n', "")
        assert commands[2] == (0, '{"a": null, "b": "\\u65e5\\u672c"}\n', "")
        code, out, err = commands[3]
        assert (code, err) == (0, "")
        (line,) = out.splitlines()
        assert json.loads(line)["nodes"]["reply"]["value"] == {"a": None, "b": "日本"}

    def test_a_failed_execution_is_exit_code_1(self, sim: Simulator, call: Call) -> None:
        """Standard output stays empty, and standard error says why."""
        execution_id = sim.add_execution(FAILED)
        code, out, err = call("results", execution_id)
        assert (code, out) == (1, "")
        sentence = rf"execution {execution_id} failed in think: no idea at \x1b[31mall."
        assert err == f"think: no idea\nat \\x1b[31mall\n\n{sentence}\n"

    def test_a_running_execution_is_exit_code_3(self, sim: Simulator, call: Call) -> None:
        """Standard error says so, with the command to follow it."""
        execution_id = sim.add_execution(HELD)
        code, out, err = call("results", execution_id)
        assert (code, out) == (3, "")
        assert "is still running, 0 of 2 nodes done. Follow it with:" in err
        assert f"promptlayer-exec watch {execution_id}\n" in err
        code, out, err = call("results", execution_id, "--all")
        assert code == 3
        assert json.loads(out)["complete"] is False

    def test_no_main_output(self, sim: Simulator, call: Call) -> None:
        """Without an output node, an execution in which nothing failed has no main output."""
        execution_id = sim.add_execution(Scenario([SimNode("only", status="SKIPPED")]))
        code, out, err = call("results", execution_id)
        assert (code, out) == (1, "")
        assert "completed without a main output" in err


class TestSimulate:
    """`simulate`."""

    def test_the_other_commands_can_use_it(self, start: Start, call: Call) -> None:
        """It prints commands to type and every request; an execution begins at its first one."""

        def nodes_of(execution_id: str) -> Any:
            code, out, err = call("results", execution_id, "--all", **env)
            assert code in (0, 3), err
            return json.loads(out)["nodes"]

        server = start("simulate", "--port", "0", "--webhook-url", "http://127.0.0.1:9/webhook")
        url = server.line().split()[-4]
        exports = [server.line_with("export "), server.line()]
        env = PROXIES | dict(line.split()[1].split("=") for line in exports)
        assert env["PROMPTLAYER_BASE_URL"] == url
        assert [server.line().split()[2] for _ in range(2)] == ["787", "788"]
        assert 'run support-agent -i letter="' in server.line_with("promptlayer-exec")
        assert server.line_with("webhook").endswith(
            "webhooks to http://127.0.0.1:9/webhook, signed with the secret simulator-secret\n"
        )
        server.line_with("Requests:")
        nodes = nodes_of("787")
        assert len(nodes) == 10
        assert nodes["read letter"]["status"] == "RUNNING"
        request = "GET /workflow-version-execution-results?workflow_version_execution_id=787"
        assert request in server.line()
        while nodes["read letter"]["status"] == "RUNNING":
            nodes = nodes_of("787")
        assert nodes["classify"]["status"] in ("RUNNING", "SUCCESS")
        run = ("run", "support-agent", "-i", "letter=Good day", "--no-watch")
        code, out, _ = call(*run, **env)
        assert code == 0
        server.line_with("POST /workflows/support-agent/run")
        nodes["read letter"]["value"] = None
        while nodes["read letter"]["value"] is None:
            nodes = nodes_of(out.strip())
        assert nodes["read letter"]["value"]["text"] == "Good day"
        server.process.send_signal(signal.SIGINT)
        code, _, err = server.end()
        assert (code, err) == (0, "")

    def test_an_unusable_address_is_exit_code_2(self, sim: Simulator, call: Call) -> None:
        """A port in use is reported in one line."""
        port = sim.base_url.rpartition(":")[2]
        code, out, err = call("simulate", "--port", port)
        assert (code, out) == (2, "")
        assert err.startswith(f"cannot listen on 127.0.0.1, port {port}: ")
        assert err.endswith(". --port 0 picks a free port\n")
        assert err.count("\n") == 1


class TestProgram:
    """How the program starts."""

    @pytest.mark.parametrize("text", ["abc", "0", "-1", "7.5", str(2**63), "\u0663"])
    def test_what_an_id_is(self, call: Call, text: str) -> None:
        """The error says what was meant, and where it comes from."""
        for command in ("watch", "results"):
            code, _, err = call(command, "--", text)
            assert code == 2
            assert "must be an execution id, a number such as 787, as `run` prints it" in err

    def test_proxies_of_the_environment(self, call: Call) -> None:
        """They are used, unless NO_PROXY names the server."""
        results = ("results", 787, "--outage", "0")
        env = PROXIES | {"PROMPTLAYER_BASE_URL": "https://api.invalid"}
        code, _, err = call(*results, **env)
        assert code == 4
        assert "no connection to the proxy 127.0.0.1:9" in err
        code, _, err = call(*results, **env, NO_PROXY="*")
        assert code == 4
        assert "proxy" not in err

    @pytest.mark.parametrize("missing", ["typer", "rich"])
    def test_without_the_extra(self, start: Start, missing: str) -> None:
        """Without typer or rich, one line says what to install, and the exit code is 2."""
        program = python(f"import sys; sys.modules[{missing!r}] = None; {MAIN}")
        hint = f"the command line needs {install_hint('cli')}\n"
        assert start(program=program).end() == (2, "", hint)

    def test_another_import_error_is_not_hidden(self, start: Start) -> None:
        """Only a missing extra is reported in one line; other errors have a traceback."""
        call = f"import sys; sys.modules['promptlayer_exec.cli._batch_commands'] = None; {MAIN}"
        code, out, err = start(program=python(call)).end(traceback=True)
        assert (code, out) == (70, "")
        assert "import of promptlayer_exec.cli._batch_commands halted" in err

    def test_an_interrupt_during_an_import(self, start: Start) -> None:
        """Ctrl-C is exit code 130, without a message, even if an import suppresses exceptions."""
        call = (
            "import signal, sys\n"
            "class Finder:\n"
            "    def find_spec(self, name, *args):\n"
            "        if name == 'promptlayer_exec.cli':\n"
            "            try: signal.raise_signal(signal.SIGINT)\n"
            "            except BaseException: pass\n"
            f"sys.meta_path.insert(0, Finder()); {MAIN}"
        )
        assert start("--help", program=python(call)).end() == (130, "", "")

    def test_help_imports_nothing_that_only_other_commands_need(self) -> None:
        """Otherwise each command, and the completion of a line, would take longer to begin."""
        program = [sys.executable, "-X", "importtime", "-m", "promptlayer_exec", "--help"]
        finished = subprocess.run(program, capture_output=True, text=True, timeout=60, check=True)
        imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
        assert "promptlayer_exec.cli" in imported
        heavy = {"aiohttp", "rich.live", "dbos", "mcp", "uvicorn", "promptlayer_exec.simulator"}
        assert imported & heavy == set()

    def test_help_lists_the_exit_codes_and_the_defaults(self, call: Call) -> None:
        """Every code has a line in a topic; how long to retry is the library's default."""
        policy = RetryPolicy()
        default = f"{policy.outage:g} for a request, {policy.watch_outage:g} for a watch"
        for command in ("run", "watch", "results"):
            text = call(command, "--help")[1]
            assert default in " ".join(text.split())
            assert "\n  Exit codes: `promptlayer-exec help exit-codes`\n" in text
        listed = re.findall(r"^  (\d+) +\S.*$", call("help", "exit-codes").out, re.MULTILINE)
        assert list(map(int, listed)) == list(ExitCode)

    def test_help_of_a_command_and_of_a_topic(self, call: Call) -> None:
        """`help` prints both, and an unknown word names the topics."""
        assert call("help", "batch", "run").out == call("batch", "run", "--help").out
        assert call("help").out == call("--help").out
        topics = re.findall(r"^    ([a-z-]+) +\S", call("help", "--help").out, re.MULTILINE)
        assert len(topics) == 5
        for topic in topics:
            code, out, _ = call("help", topic)
            assert code == 0
            assert max(map(len, out.splitlines())) <= 80
        code, _, err = call("help", "batch", "ruin")
        assert code == 2
        assert f"no command or topic 'ruin'. The topics are {', '.join(topics)}" in err

    def test_help_shows_the_json_that_is_written(self, sim: Simulator, call: Call) -> None:
        """The example in `help json` has the fields of a line of `watch --json`."""
        text = call("help", "json")[1]
        (example,) = re.findall(r'^ +({"execution_id".*?}}})$', text, re.MULTILINE | re.DOTALL)
        shown = json.loads(example)
        execution_id = sim.add_execution(DONE)
        written = json.loads(call("watch", execution_id, "--json")[1])
        assert list(shown) == list(written)
        assert list(shown["nodes"]["Node 1"]) == list(written["nodes"]["reply"])


class TestExit:
    """How the program exits when something goes wrong."""

    @pytest.mark.parametrize("command", [("watch", 5), ("run", "x"), ("results", 5)])
    def test_an_unreachable_server_is_exit_code_4(
        self, call: Call, command: tuple[object, ...]
    ) -> None:
        """An outage is one line, however many retries there are; the error says what to check."""
        code, out, err = call(*command, "--outage", "0.1", "--base-url", UNREACHABLE)
        assert (code, out) == (4, "")
        assert re.match(r".*could not reach .* refused\. Trying again for up to 0.1 s\n", err)
        assert "Check the network and --base-url.\n" in err
        assert err.count("Trying again") == 1
        again = f"Follow it with:\n  promptlayer-exec watch 5 --base-url {UNREACHABLE}\n"
        assert err.endswith(again) is (command[0] == "watch")

    def test_a_full_disk_is_exit_code_74(self, sim: Simulator, start: Start, call: Call) -> None:
        """Every command reports in one line that standard output cannot be written."""
        execution_id = sim.add_execution(DONE)
        full = (74, "", "cannot write the output: No space left on device\n")
        assert call("watch", execution_id, out=FULL) == full
        assert call("watch", execution_id, "--json", out=FULL) == full
        assert call("results", execution_id, out=FULL) == full
        assert call("simulate", "--port", "0", out=FULL) == full
        assert call("demo", out=FULL) == full
        assert call("--help", out=FULL) == full
        # The process adds nothing when it exits.
        assert start("--help", program=redirected(f"RUN >{FULL}")).end() == full

    def test_an_unexpected_error_is_exit_code_70(self, start: Start) -> None:
        """Its traceback is shown."""
        code, out, err = start("watch", 5, program=python(BROKEN)).end(traceback=True)
        assert (code, out) == (70, "")
        assert "EOFError: what now?\nthis is a bug in promptlayer-exec: please report it" in err

    def test_in_the_background_of_a_script(self, sim: Simulator, start: Start) -> None:
        """If SIGINT is ignored from the start, it stays ignored."""
        execution_id = sim.add_execution(HELD)
        command = start("watch", execution_id, program=redirected("trap '' INT; RUN"))
        command.line()
        command.process.send_signal(signal.SIGINT)
        sim.finish(execution_id, "think")
        sim.finish(execution_id, "reply")
        code, out, err = command.end()
        assert (code, err) == (0, "")
        assert "succeeded" in out


class TestDemo:
    """`demo`, with invalid settings and proxies that do not exist in the environment."""

    ENV = PROXIES | {"PROMPTLAYER_API_KEY": "wrong key", "PROMPTLAYER_BASE_URL": "ftp://nowhere"}

    @pytest.fixture(autouse=True)
    def _quick_agent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the run of the demo take a tenth of its eight seconds."""
        scenario = examples.support_agent()
        nodes = [attrs.evolve(node, duration=node.duration / 10) for node in scenario.nodes]
        monkeypatch.setattr(examples, "support_agent", lambda: Scenario(nodes))

    def test_plain(self, start: Start, call: Call, sim: Simulator) -> None:
        """It prints every node, including a skipped one, the main output, and a working program."""
        code, out, err = call("demo", **self.ENV)
        assert (code, err) == (0, "")
        assert "\x1b" not in out
        assert "ask a colleague  SKIPPED" in out
        assert "execution 787 succeeded after" in out
        assert "\nDear Ms. Rossi,\n" in out
        sim.add_execution(DONE, execution_id=787)
        program = start(program=python(out[out.index("import asyncio") :]))
        assert program.end() == (0, "reply SUCCESS\nGood\nday\n", "")

    def test_json(self, call: Call) -> None:
        """With --json, it writes snapshots and nothing else."""
        code, out, err = call("demo", "--json", **self.ENV)
        assert (code, err) == (0, "")
        snapshots = [json.loads(line) for line in out.splitlines()]
        assert len(snapshots) > 1
        assert snapshots[-1]["succeeded"] is True
        assert snapshots[-1]["nodes"]["ask a colleague"]["status"] == "SKIPPED"
