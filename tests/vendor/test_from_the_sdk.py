"""Two pages: both clients do what the tables of `docs/from-the-sdk.md` say, and their code runs."""

from __future__ import annotations

import asyncio
import datetime
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from promptlayer import AsyncPromptLayer, PromptLayer
from promptlayer.exceptions import PromptLayerError

from promptlayer_exec import PromptLayerExecError, RetryPolicy, Session
from promptlayer_exec.simulator import Fault, Scenario, SimNode, SimRequest, Simulator

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (DOCS / "from-the-sdk.md", DOCS / "synchronous.md")
TEXT = "".join(page.read_text(encoding="utf-8") for page in PAGES)


def section(heading: str) -> str:
    """Return the text under a heading, up to the next one."""
    return re.split(r"^#+ ", TEXT.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def code(heading: str) -> list[str]:
    """Return the code blocks of a section."""
    return re.findall(r"^```python\n(.*?)^```$", section(heading), re.MULTILINE | re.DOTALL)


def rows(heading: str) -> list[list[str]]:
    """Return the cells of each row of a section's table."""
    lines = re.findall(r"^\| (.*) \|$", section(heading), re.MULTILINE)
    return [line.split(" | ") for line in lines[1:]]


def write_report(inputs: Any) -> Scenario:
    """Take a moment, and fail for unicorns."""
    topic = inputs.get("topic", "otters")
    status = "FAILED" if topic == "unicorns" else "SUCCESS"
    report = SimNode("Report", f"About {topic}.", 0.1, status=status, is_output_node=True)
    return Scenario([SimNode("Plan", ["habitat"]), report])


FAULTS: list[Fault] = []  # the next start takes one


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    """Return a simulator that both clients find in the environment."""

    def affect_starts(request: SimRequest) -> None:
        if request.path.endswith("/run") and FAULTS:
            simulator.inject(FAULTS.pop())

    FAULTS.clear()
    with Simulator(on_request=affect_starts) as simulator:
        monkeypatch.setenv("PROMPTLAYER_API_KEY", simulator.api_key)
        monkeypatch.setenv("PROMPTLAYER_BASE_URL", simulator.base_url)
        simulator.add_workflow("write-report", write_report)
        simulator.add_workflow("typed", write_report, inputs={"topic": "string"})
        simulator.add_workflow("held", Scenario([SimNode("a", 1, None, is_output_node=True)]))
        yield simulator


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """Return a function that imports a code block of a section as a module."""
    names = []

    def load(heading: str, name: str, block: int = 0) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(code(heading)[block])
        monkeypatch.syspath_prepend(str(tmp_path))
        names.append(name)
        return importlib.import_module(name)

    yield load
    for name in names:
        del sys.modules[name]


def new_starts(sim: Simulator, before: int) -> list[dict[str, Any]]:
    """Return what the starts since then asked for, without what only the SDK sends."""
    own = {"channel_name_suffix", "return_all_outputs"}
    bodies = [run.body for run in sim.runs[before:]]
    return [
        {key: value for key, value in body.items() if key not in own and value is not None}
        for body in bodies
    ]


async def test_the_loop_pays_for_each_topic_once(
    sim: Simulator,
    load: Callable[..., ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """However often it is run; a failure is printed, and ends nothing."""
    monkeypatch.chdir(tmp_path)
    write_reports = load("Migrate a loop", "loop").write_reports
    for _ in range(2):
        topics = ["otters", "unicorns", "newts"]
        expected = {"otters": "About otters.", "newts": "About newts."}
        assert await write_reports(topics) == expected
        assert capsys.readouterr().out.startswith("unicorns: execution ")
    assert len(sim.runs) == 3


@pytest.mark.parametrize("row", range(len(rows("Every argument"))))
def test_both_clients_ask_for_the_same_and_return_the_same(
    sim: Simulator, load: Callable[..., ModuleType], row: int
) -> None:
    """Both cells of a row are run; the simulator shows what was asked for."""
    names = vars(load("Every argument", "page"))

    async def evaluate(cell: str, **clients: Any) -> Any:
        return await eval(cell.strip("`"), {**names, **clients})

    async def run() -> None:
        theirs, ours = rows("Every argument")[row]
        before = len(sim.runs)
        expected = await evaluate(theirs, client=AsyncPromptLayer())
        async with Session() as session:
            assert await evaluate(ours, session=session) == expected
        first, second = new_starts(sim, before)
        assert first == second

    asyncio.run(run())


def with_the_sdk(client: type[PromptLayer | AsyncPromptLayer], *args: Any, **options: Any) -> Any:
    """Run a workflow with one of the SDK's clients, and return the output or the error."""
    key = options.pop("key", None)
    try:
        if client is PromptLayer:
            return PromptLayer(api_key=key).run_workflow(*args, **options)

        async def run() -> Any:
            return await AsyncPromptLayer(api_key=key).run_workflow(*args, **options)

        return asyncio.run(run())
    except PromptLayerError as error:
        return error


def with_ours(*args: Any, **options: Any) -> Any:
    """Run a workflow, and return the output or the error."""

    async def run() -> Any:
        retry = RetryPolicy(base=0.01)
        async with Session(options.pop("key", None), retry=retry) as session:
            return await session.run(*args, **options)

    try:
        return asyncio.run(run())
    except (PromptLayerExecError, TypeError, ValueError) as error:
        return error


def errors_in(cell: str) -> set[str]:
    """Return the names of the errors that a cell names."""
    return set(
        re.findall(r"`(\w*(?:Error|Unknown|Failed|Timeout|Found|Inputs|Unauthorized))`", cell)
    )


def name_of(result: Any) -> set[str]:
    """Return the name of an error, or nothing for an output."""
    return {type(result).__name__} if isinstance(result, Exception) else set()


ORDINARY = ("write-report", {"topic": "otters"})
# What happens, by the first cell of a row: the arguments, the SDK's options and ours.
SITUATIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "no output node succeeded": (("write-report", {"topic": "unicorns"}), {}, {}),
    "the timeout passes": (("held",), {"timeout": 0.3}, {"timeout": 0.3}),
    "the key is wrong": (ORDINARY, {"key": "wrong"}, {"key": "wrong"}),
    "the workflow does not exist": (("unknown",), {}, {}),
    "PromptLayer refuses a start request with 429": (ORDINARY, {}, {}),
    "the response to your start request gets lost": (ORDINARY, {}, {}),
    "a required input is missing": (("typed", {"topik": "otters"}), {}, {}),
    "JSON cannot carry an input": (
        ("write-report", {"topic": "otters", "when": datetime.date(2026, 1, 1)}),
        {},
        {},
    ),
}


@pytest.mark.parametrize("row", rows("What fails loudly now"), ids=lambda row: row[0])
def test_what_happens_with_both_clients(sim: Simulator, row: list[str]) -> None:
    """The errors of a row are those that the clients raise."""
    situation, theirs, ours = row
    args, sdk_options, options = SITUATIONS[situation]
    faults = {"PromptLayer refuses a start request with 429": Fault.status(429)}
    faults["the response to your start request gets lost"] = Fault.disconnect()
    results = {}
    for client in (PromptLayer, AsyncPromptLayer):
        FAULTS[:] = [faults[situation]] if situation in faults else []
        results[client] = with_the_sdk(client, *args, **sdk_options)
    FAULTS[:] = [faults[situation]] if situation in faults else []
    result = with_ours(*args, **options)
    assert errors_in(theirs) == name_of(results[PromptLayer]) | name_of(results[AsyncPromptLayer])
    assert errors_in(ours) == name_of(result)
    if "`AsyncPromptLayer`" in theirs:  # it returns what the other one raises an error for
        returned = results[AsyncPromptLayer]
        assert errors_in(theirs) == name_of(results[PromptLayer])
        assert set(returned) == {"Plan", "Report"}
    if isinstance(result, PromptLayerExecError) and situation.startswith(("no output", "the time")):
        assert result.execution_id == sim.runs[-1].execution_id
        assert result.last_snapshot is not None
    if situation.startswith("the timeout"):
        assert str(sim.runs[0].execution_id) not in repr(vars(results[PromptLayer]))
    if isinstance(result, TypeError):
        assert "inputs.when" in str(result)
        assert "when" not in str(results[PromptLayer])
    if not isinstance(result, Exception):
        assert result == "About otters."


@pytest.mark.parametrize("name", ["input_variables", "workflow_label_name", "workflow_version"])
def test_the_sdk_s_names_of_arguments_are_answered_with_ours(sim: Simulator, name: str) -> None:
    """The error says what the argument is called here."""
    error = with_ours("write-report", **{name: "x"})
    assert isinstance(error, TypeError)
    assert re.fullmatch(
        rf"unexpected argument {name}=: it is (inputs|label|version)= here", str(error)
    )


def test_both_versions_of_the_function_return_the_same(
    sim: Simulator, load: Callable[..., ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    """The function before and after the migration, in one program and one loop."""
    blocking, blocking_after, before, after = (
        load("Migrate a function", f"version_{i}", i) for i in range(4)
    )

    async def run() -> list[str]:
        async with Session() as session:
            theirs = await before.write_report("otters")
            return [theirs, await after.write_report(session, "otters")]

    assert asyncio.run(run()) == ["About otters."] * 2
    first, second = new_starts(sim, 0)
    assert first == second
    asyncio.run(after.main())
    assert capsys.readouterr().out == "About otters.\n"

    before_blocking = len(sim.runs)
    assert blocking.report_on("otters") == blocking_after.report_on("otters") == "About otters."
    first, second = new_starts(sim, before_blocking)
    assert first == second
    blocking_after.blocking.close()


def test_a_synchronous_program(
    sim: Simulator, load: Callable[..., ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    """It gets one output after the other, then its progress, then several in parallel."""
    page = load("In a script", "synchronous")
    first, second, *others = page.write_reports()
    assert [first, second] == ["About otters.", "About newts."]
    assert sorted(others) == ["About seals.", "About toads."]
    assert capsys.readouterr().out.endswith("100%\n")


def test_threads_share_a_session(sim: Simulator, load: Callable[..., ModuleType]) -> None:
    """Each thread gets its own report."""
    page = load("Threads and WSGI servers", "threads")
    reports: dict[str, str] = {}

    def write(topic: str) -> None:
        reports[topic] = page.write_report(topic)

    topics = ["otters", "newts", "toads"]
    threads = [threading.Thread(target=write, args=[topic]) for topic in topics]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert reports == {topic: f"About {topic}." for topic in topics}
    page.session.close()


def test_a_program_with_an_open_session_ends(sim: Simulator, tmp_path: Path) -> None:
    """Its exit closes the session, and nothing keeps the process alive."""
    program = code("Threads and WSGI servers")[0] + "\nprint(write_report('otters'))"
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert (finished.stdout, finished.stderr) == ("About otters.\n", "")


def test_a_celery_worker_runs_the_task(sim: Simulator, tmp_path: Path) -> None:
    """A real worker with its default pool gets three tasks from a broker in the file system."""
    queue, results = tmp_path / "queue", tmp_path / "results"
    queue.mkdir()
    results.mkdir()
    options = {"data_folder_in": str(queue), "data_folder_out": str(queue)}
    options["control_folder"] = str(tmp_path / "control")
    configure = f"app.conf.update(broker_transport_options={options!r})"
    (tmp_path / "tasks.py").write_text(f"{code('Celery')[0]}\n{configure}\n")
    environment = {
        **os.environ,
        "BROKER_URL": "filesystem://",
        "RESULT_BACKEND": f"file://{results}",
        "PROMPTLAYER_EXEC_DB": f"sqlite:///{tmp_path / 'starts.sqlite'}",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }
    call = (
        "from tasks import write_report\n"
        "results = [write_report.delay(topic) for topic in ('otters', 'unicorns', 'newts')]\n"
        "print(*(result.get(timeout=40, propagate=False) for result in results), sep='\\n')\n"
    )
    celery = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "--concurrency=1"]
    with subprocess.Popen([*celery, "--loglevel=WARNING"], cwd=tmp_path, env=environment) as worker:
        try:
            finished = subprocess.run(
                [sys.executable, "-c", call],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=50,
                check=True,
            )
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.wait(20)
    otters, unicorns, newts = finished.stdout.splitlines()
    assert (otters, newts) == ("About otters.", "About newts.")
    ids = {run.inputs["topic"]: run.execution_id for run in sim.runs}  # in any order
    assert unicorns.startswith(f"execution {ids['unicorns']} failed: node 'Report' FAILED")
    assert len(sim.runs) == 3


ASGI = """
from django.conf import settings
from django.urls import path
settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="x")
from django.core.asgi import get_asgi_application
application = get_asgi_application()
import views
urlpatterns = [path("report/<int:order>", views.report)]
"""


def test_a_view_of_django(sim: Simulator, tmp_path: Path) -> None:
    """A real server answers one request after another from one session."""
    (tmp_path / "views.py").write_text(code("Threads and WSGI servers")[1])
    (tmp_path / "site_asgi.py").write_text(ASGI)
    uvicorn = [sys.executable, "-X", "dev", "-m", "uvicorn", "site_asgi:application", "--port", "0"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        uvicorn,
        env={**os.environ, "PYTHONPATH": path, "PROMPTLAYER_EXEC_DB": f"sqlite:///{tmp_path}/db"},
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            log = ""
            while (found := re.search(r"running on (http\S+)", log)) is None:
                line = server.stderr.readline()  # type: ignore[union-attr]
                assert line, log
                log += line
            seen = []
            for order, topic in enumerate(("otters", "unicorns", "newts")):
                try:
                    url = f"{found[1]}/report/{order}?topic={topic}"
                    seen.append(urllib.request.urlopen(url, timeout=20).read())
                except urllib.error.HTTPError as error:
                    seen.append(error.read())
        finally:
            server.send_signal(signal.SIGTERM)
            log += server.stderr.read()  # type: ignore[union-attr]
    assert seen == [
        b'{"report": "About otters."}',
        b'{"failed": ["Report"]}',
        b'{"report": "About newts."}',
    ]
    assert "Warning" not in log
