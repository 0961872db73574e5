"""The README and the pages under docs/: their code is run, and their commands are parsed."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.metadata import metadata
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import AsyncMock

import aiohttp
import pytest
import typer
from aiohttp import web
from aiohttp.test_utils import TestClient as WebClient
from aiohttp.test_utils import TestServer as WebServer
from fastapi.testclient import TestClient
from mcp import Client
from typer.testing import CliRunner

import promptlayer_exec
import promptlayer_exec.simulator
from promptlayer_exec import (
    ExecutionFailed,
    ExecutionStarted,
    ExecutionTimeout,
    PromptLayerExecError,
    RetryPolicy,
    Session,
    StartFailed,
    StartUnknown,
    opentelemetry,
)
from promptlayer_exec._install import install_hint
from promptlayer_exec._integration import receive_callback
from promptlayer_exec.cli._app import app as command_line
from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator
from promptlayer_exec.webhooks import Callbacks

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
REPORT = Scenario([SimNode("Report", "done", is_output_node=True)])


def blocks(page: str, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def sentences(page: str) -> str:
    """Return what a page says outside of code blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def is_program(block: str) -> bool:
    """Return whether a block is a whole program, and not part of one."""
    return "asyncio.run(" in block


class _Marks(ast.NodeTransformer):
    """Makes each function of a block record its name when it is called."""

    def __init__(self) -> None:
        self.functions: set[str] = set()

    def _mark(self, node: Any) -> Any:
        self.generic_visit(node)
        self.functions.add(node.name)
        node.body.insert(0, ast.parse(f"_called.add({node.name!r})").body[0])
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = _mark  # noqa: N815 - ast's names


def run_blocks(code: list[str], namespace: dict[str, Any]) -> set[str]:
    """Run blocks as one module, and return the names of the functions that they define."""
    namespace["_called"] = set()
    marks = _Marks()
    for block in code:
        tree = ast.fix_missing_locations(marks.visit(ast.parse(block)))
        exec(compile(tree, namespace["__name__"], "exec"), namespace)
    return marks.functions


def names(page: str, module: str = "page") -> AbstractContextManager[dict[str, Any]]:
    """Yield what a page defines; each of its functions must be called within the context."""
    return defined([block for block in blocks(page, "python") if not is_program(block)], module)


def part_of(page: str, *indexes: int) -> AbstractContextManager[dict[str, Any]]:
    """Yield what some blocks of a page define, as `names` does."""
    code = blocks(page, "python")
    return defined([code[index] for index in indexes], "page")


@contextmanager
def defined(code: list[str], module: str) -> Iterator[dict[str, Any]]:
    """Yield what blocks define, and check that each of their functions was called."""
    namespace = ModuleType(module)
    # Python 3.15 warns of a module whose `__spec__` is None when it formats a traceback.
    del namespace.__spec__
    sys.modules[module] = namespace
    try:
        functions = run_blocks(code, vars(namespace))
        yield vars(namespace)
    finally:
        del sys.modules[module]
    assert functions == vars(namespace)["_called"]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_code_of_each_page_is_run(page: str) -> None:
    """Each page with Python code is named by a test, here or in another module."""
    tests = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("*.py")]
    assert any(f'"{page}"' in test or f'"{Path(page).name}"' in test for test in tests)


def parsed(argv: list[str]) -> str:
    """Parse a command line without running it, and return the path of its command."""
    command: Any = typer.main.get_command(command_line)
    context, name = None, argv.pop(0)
    while True:
        settings = command.context_settings
        context = command.make_context(name, argv, parent=context, **settings)
        if not hasattr(command, "resolve_command"):
            return str(context.command_path)
        name, command, argv = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )


COMMANDS = [
    pytest.param(line, id=f"{page}: {line}")
    for page in PAGES
    for block in blocks(page, "sh")
    for line in re.split(r"\n|&&", block)
    if line.strip().startswith("promptlayer-exec ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_shown_exist(line: str) -> None:
    """Each command and each of its options exists; none of them is run."""
    argv = shlex.split(line.partition("|")[0], comments=True)
    assert parsed(argv).startswith("promptlayer-exec ")


INLINE = sorted(
    {
        (page, line)
        for page in PAGES
        for line in re.findall(r"`(promptlayer-exec (?!--)[^`]+)`", sentences(page))
    }
)


@pytest.mark.parametrize(("page", "line"), INLINE)
def test_the_commands_in_sentences_exist(page: str, line: str) -> None:
    """Each command and each of its options exists; a sentence may leave out what it is given."""
    with suppress(typer.BadParameter):  # also what is missing
        assert parsed(shlex.split(line)).startswith("promptlayer-exec ")


def test_the_reference_is_complete() -> None:
    """It lists each public module and name, and the page on failures lists each error."""
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    modules = {module.name for module in pkgutil.iter_modules(promptlayer_exec.__path__)}
    for module in modules - {"cli", "push"}:
        assert module.startswith("_") or f"promptlayer_exec.{module}\n" in pages, module
    for name in {*promptlayer_exec.__all__, *promptlayer_exec.simulator.__all__} - {"__version__"}:
        assert re.search(rf":: {name}$", pages, re.MULTILINE), name
    failures = (ROOT / "docs" / "failures.md").read_text()
    for name, value in vars(promptlayer_exec).items():
        if isinstance(value, type) and issubclass(value, PromptLayerExecError):
            assert value is PromptLayerExecError or f"\n| `{name}` |" in failures, name


def tables(page: str) -> Iterator[list[list[str]]]:
    """Yield the tables of a page, each as rows of cells, without the row of dashes."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in row[1:-1].split(" |")] for row in table.splitlines()]
        yield [row for row in rows if set(row[0]) - set("-|")]


def contents() -> list[str]:
    """Return the names of all pages, in the order of the tables of contents of the index."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    return " ".join(re.findall(r"^:caption: .*\n\n([^`]*)```", index, re.MULTILINE)).split()


def test_the_index_begins_as_the_readme_does_and_lists_each_page_once() -> None:
    """What a newcomer sees first is the same; the cards are the tables of contents, in order."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert index.startswith(readme.partition("\n## ")[0].replace("](docs/", "]("))
    cards = index.partition("\n{.cards}\n")[2]
    assert re.findall(r"\]\(([\w/-]+)\.md\)", cards) == contents()
    assert cards.count("\n- **") == index.count("\n:caption: ")


@pytest.mark.parametrize("page", PAGES)
def test_a_code_host_shows_no_directives(page: str) -> None:
    """They are within comments, from which `docs/conf.py` takes them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    assert re.findall(r"^(?:`{3}|:{3})\{.*|^\{\..*|^% .*", shown, re.MULTILINE) == []


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page: str) -> None:
    """On a code host, too, where no build has checked them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_links_of_the_readme_are_absolute_on_a_package_index() -> None:
    """There are no files beside the description of the installed package."""
    description = metadata("promptlayer-exec")["Description"]
    assert not re.search(r"\]\((?!https:)", description)
    repository = r"\]\(https://github\.com/[^/]+/promptlayer-exec/(?:blob|raw)/main/([^)]+)"
    files = re.findall(repository, description)
    assert len(files) > 20
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_the_recording_of_the_demo_is_small_and_can_stand_still() -> None:
    """It loads nothing, and does not move for whoever has asked for less motion."""
    path = ROOT / "docs" / "images" / "demo.svg"
    svg = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 200_000
    assert "@media (prefers-reduced-motion: reduce) { .moving { animation: none; } }" in svg
    assert svg.count("http") == svg.count('xmlns="http://www.w3.org/2000/svg"') == 1
    assert "execution 787 succeeded" in svg


def test_one_page_explains_what_a_run_costs() -> None:
    """No other one repeats the default rate; those that need it link to the page."""
    rate = inspect.signature(Session).parameters["rate"].default
    default = re.compile(rf"\b{rate:.0f} (?:requests )?per\s+second")
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    naming = {page.name for page in pages if default.search(page.read_text(encoding="utf-8"))}
    assert naming == {"costs.md"}


def test_the_figures_on_reliability_are_those_of_the_pages_that_explain_them() -> None:
    """Each number in a row of the last figures is on the page that the row links to."""
    (rows,) = (table[1:] for table in tables("docs/design/reliability.md") if "last" in table[0][1])
    for what, figures, _ in rows:
        (link,) = re.findall(r"\]\(([\w./-]+\.md)", figures)
        page = (ROOT / "docs" / "design" / link).read_text(encoding="utf-8")
        text = re.sub(r"\]\(.*?\)|p\d\d", "", figures)
        numbers = re.findall(r"\d[\d,.]*\d|\d", text)
        assert numbers, what
        for number in numbers:
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", page), number


def test_the_tests_that_the_page_on_reliability_names_exist() -> None:
    """Each file that a command runs is there, and so is each session of nox."""
    text = (ROOT / "docs" / "design" / "reliability.md").read_text(encoding="utf-8")
    files = set(re.findall(r"tests/[\w/]+\.py", text))
    assert len(files) > 10
    assert all((ROOT / name).exists() for name in files)
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert all(f"def {name}(" in noxfile for name in re.findall(r"nox -s (\w+)", text))


def test_the_page_on_the_sdk_names_the_version_that_it_is_checked_with() -> None:
    """It is that of the nox session `vendor`."""
    page = " ".join((ROOT / "docs" / "from-the-sdk.md").read_text(encoding="utf-8").split())
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^SDK = "promptlayer==([\d.]+)"$', noxfile, re.MULTILINE)
    assert f"version {version} of the SDK." in page


def test_each_recipe_for_a_framework_names_its_version_and_has_a_test() -> None:
    """The nox session `frameworks` installs what the section names, and runs its test."""
    page = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
    notebooks = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8").removeprefix("# ")
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    for section in (*page.split("\n## ")[1:], notebooks.partition("\n## ")[0]):
        heading, _, text = section.partition("\n")
        assert re.search(r"^Tested with `[\w-]+==[\d.]+`", text, re.MULTILINE), heading
        (test,) = re.findall(rf'^    "(\w+)": "{heading}",$', noxfile, re.MULTILINE)
        name = "notebooks.md" if notebooks.startswith(heading) else heading
        assert f'"{name}"' in (ROOT / f"tests/frameworks/test_{test}.py").read_text()


def test_only_the_page_on_installing_installs_the_package() -> None:
    """A release on an index changes that page and one module: no other text names the package."""
    code = (ROOT / "promptlayer_exec").rglob("*.py")
    texts = [*(ROOT / page for page in PAGES), *code]
    install = re.compile(r"(?:pip|uv) (?:install|add)\b[^&\n]*promptlayer.exec")
    naming = {path.name for path in texts if install.search(path.read_text(encoding="utf-8"))}
    assert naming == {"installing.md"}
    page = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    wheel = f'promptlayer_exec-{promptlayer_exec.__version__}-py3-none-any.whl[cli]"'
    for command in ('python -m pip install ".[cli]"', wheel):
        assert command in page
        assert command in install_hint("cli")


def test_the_page_on_installing_lists_every_extra() -> None:
    """Its table has each extra of `pyproject.toml`, and no other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(project["optional-dependencies"])


def test_the_names_on_the_page_on_architecture_exist() -> None:
    """Whoever renames something private renames it there, too."""
    page = (ROOT / "docs" / "design" / "architecture.md").read_text(encoding="utf-8")
    code = " ".join(re.findall(r"`([^`\n]+)`", page))
    modules = [*Path(promptlayer_exec.__file__).parent.rglob("*.py")]
    source = " ".join(f"{path.stem} {path.read_text(encoding='utf-8')}" for path in modules)
    private = re.compile(r"\b_\w+")
    assert len(private.findall(code)) > 50
    assert sorted({*private.findall(code)} - {*private.findall(source)}) == []


def test_ci_runs_the_test_command_of_the_readme() -> None:
    """CI runs exactly what the README, and the page for contributors, tell a newcomer to type."""
    command = blocks("README.md", "shell")[1].strip()
    assert blocks("CONTRIBUTING.md", "shell") == [f"{command}\n"]
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    run = [line for line in script if not line.startswith(("#", "set ", "cd "))]
    assert run == command.split(" && ")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, threaded_sim: Simulator) -> Simulator:
    """Return a simulator whose URL and key a session reads from the environment."""
    monkeypatch.setenv("PROMPTLAYER_API_KEY", threaded_sim.api_key)
    monkeypatch.setenv("PROMPTLAYER_BASE_URL", threaded_sim.base_url)
    return threaded_sim


def test_the_apps_on_running_a_workflow_work(server: Simulator) -> None:
    """The aiohttp app and the FastAPI app await an output in their one session."""
    server.add_workflow("write-report", REPORT)

    async def use(make_app: Callable[[], web.Application]) -> None:
        async with WebClient(WebServer(make_app())) as client:
            response = await client.post("/reports", params={"topic": "otters"})
            assert await response.json() == {"report": "done"}

    with part_of("docs/outputs.md", 2, 3) as page:
        asyncio.run(use(page["make_app"]))
        with TestClient(page["app"]) as client:
            assert client.post("/reports", params={"topic": "otters"}).json() == "done"


async def test_the_page_on_testing_has_tests_that_pass(
    promptlayer_simulator: Simulator,
) -> None:
    """All of its tests pass, and import the code that it shows."""
    with names("docs/testing.md", "progress") as page:
        for name, test in list(page.items()):
            if name.startswith("test_"):
                await (test(promptlayer_simulator) if test.__code__.co_argcount else test())


async def test_the_server_on_mcp_tells_agents_what_a_workflow_is_for(
    sim: Simulator, session: Session
) -> None:
    """The official client reads it, and a wrong input gets the error of the page, at no cost."""
    sim.add_workflow("write-report", REPORT, inputs={"topic": "string"}, labels=["prod"])
    with names("docs/mcp.md") as page:
        async with Client(page["agent_server"](session)) as client:
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            wrong = {"topic": "otters", "length": "long"}
            refused = await client.call_tool("run_write-report", wrong)
        description = page["write_report"].description
    assert (tools["run_write-report"].description or "").startswith(description)
    assert refused.is_error
    text = str(refused.content[0])
    assert "$.length: expected an integer, got a string" in text
    assert "No run was started" in text
    assert not sim.runs


async def test_the_code_on_push_is_pushed(server: Simulator) -> None:
    """The runs share the WebSocket that the first one needed."""
    server.add_workflow("write-report", Scenario([SimNode("Report", "done", 0.1)]))
    with part_of("docs/watching.md", 2) as page:
        assert await page["write_reports"](["otters", "newts"]) == ["done", "done"]
    paths = [request.path for request in server.requests]
    assert paths.count("/connection/websocket") == 1


async def test_the_line_on_push_is_logged_where_there_is_none(
    server: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    """The run is polled, and the log says why, at the level that the page names."""
    server.add_workflow("write-report", Scenario([SimNode("Report", "done", 0.3)]))
    server.inject(Fault.status(404, times=None), path="/ws-token-request-library")
    with caplog.at_level("INFO", "promptlayer_exec"):
        async with Session() as session:
            assert await session.run("write-report") == "done"
    lines = [f"{record.levelname} {record.message}\n" for record in caplog.records]
    assert blocks("docs/watching.md", "text") == [line for line in lines if "push" in line]


def test_the_page_on_the_command_line_shows_what_is_printed(server: Simulator) -> None:
    """Its commands are run, and print what the page shows."""
    plan = SimNode("Plan", "habitat, diet, threats")
    report = SimNode("Report", "Otters are fine.", after=["Plan"], is_output_node=True)
    scenario = Scenario([plan, report])
    server.add_workflow("write-report", scenario, inputs={"topic": "string"}, labels=["prod"])
    page = "docs/reference/command-line.md"
    commands = blocks(page, "sh")
    texts = blocks(page, "text")[: len(commands)]  # then comes the help of each command
    for command, shown in zip(commands, texts, strict=True):
        argv = shlex.split(command.partition("|")[0])
        printed = CliRunner().invoke(command_line, argv[1:])
        assert re.sub(r"\d\.\d s", "0.0 s", printed.output) == shown


async def test_the_code_on_watching_works(
    server: Simulator, session: Session, held: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """It shows the progress until half of the nodes are final; its sessions follow an execution."""
    execution_id = server.add_execution(REPORT)
    with part_of("docs/watching.md", 0, 1, 3) as page:
        await page["until_half"](session.execution(held))
        assert capsys.readouterr().out == "50% done\n"
        async with Session() as own:
            await page["watch_all"](own, [execution_id])
        assert capsys.readouterr().out == f"{execution_id}: 100% done\n"
        for tuned in (page["for_a_person"](), page["for_the_night"]()):
            async with tuned:
                assert await tuned.execution(execution_id).output() == "done"


def test_the_page_on_failures_lists_the_statuses_that_are_retried() -> None:
    """They are those of the default policy."""
    text = " ".join((ROOT / "docs" / "failures.md").read_text(encoding="utf-8").split())
    found = re.search(r"the statuses ([\d, ]+) and (\d+) to (\d+)\.", text)
    assert found is not None
    listed = {int(status) for status in found[1].split(", ")}
    assert listed | {*range(int(found[2]), int(found[3]) + 1)} == RetryPolicy().statuses


@pytest.mark.parametrize("silenced", [False, True])
def test_the_line_on_observing_silences_the_first_failure(*, silenced: bool) -> None:
    """Without a log, an outage is seen on standard error."""
    text = (ROOT / "docs" / "observing.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"`(logging\.getLogger\(.*)`", text)
    program = (
        f"import asyncio, logging\n{line if silenced else ''}\n"
        "from promptlayer_exec import RetryPolicy, Session\n"
        "async def main():\n"
        "    retry = RetryPolicy(outage=0.02, base=0.01)\n"
        "    async with Session('key', base_url='http://127.0.0.1:9', retry=retry) as session:\n"
        "        await session.get_results(787)\n"
        "try:\n"
        "    asyncio.run(main())\n"
        "except ConnectionError:\n"
        "    pass\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    shown = "execution 787: could not reach http://127.0.0.1:9: Connection refused"
    assert finished.stderr.startswith("" if silenced else f"{shown}. Trying again")
    assert finished.stderr.count("\n") == (not silenced)
    assert shown in text


async def test_the_client_session_on_security_reads_no_surplus_response(
    raw_server: Any,
) -> None:
    """The server repeats its last response on a connection just after the next request came."""
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    (call,) = re.findall(r"`(aiohttp\.ClientSession\(.*)`", text)

    async def repeat(request: Any) -> None:
        number = int(request.execution_id)
        numbers = (number - 1, number) if request.is_reused else (number,)
        response = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d"
        await request.send(b"".join(response % it for it in numbers))

    async def read(**settings: Any) -> list[Any]:
        async with Session("key", base_url=raw_server.url, **settings) as session:
            return [(await session.get_results(number)).value for number in (1, 2)]

    raw_server.respond = repeat
    assert await read() == [1, 1]  # what cannot be detected
    async with eval(call, {"aiohttp": aiohttp}) as http:
        assert await read(http=http) == [1, 2]


async def test_the_code_on_failures_returns_the_reason(
    sim: Simulator, session: Session, held: int
) -> None:
    """It returns an error or success."""
    with part_of("docs/failures.md", 0) as page:
        result_or_reason = page["result_or_reason"]
        sim.inject(Fault.status(404))
        assert (await result_or_reason(session, held)).startswith("NotFound: execution")
        waiting = asyncio.create_task(result_or_reason(session, held))
        await sim.wait_for_requests(sim.request_count + 1)
        sim.finish(held, "Answer")
        assert await waiting == "succeeded"


async def test_the_code_on_failures_pays_once(
    server: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run_once` repeats no start that may have run."""
    with part_of("docs/failures.md", 3) as page:
        monkeypatch.chdir(tmp_path)
        server.add_workflow("write-report", REPORT, inputs={"topic": "string"})
        for _ in range(2):
            async with page["open_session"]() as keyed:
                assert await page["run_once"](keyed, "a", "otters") == "done"
                server.inject(Fault.disconnect(), path="/run")
                with pytest.raises(StartUnknown):
                    await page["run_once"](keyed, "b", "newts")
                server.clear_faults()
    assert [run.inputs["topic"] for run in server.runs] == ["otters", "newts"]


async def test_the_code_on_outputs_works(
    sim: Simulator, session: Session, held: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """It starts a run, prints the server's warning, and returns outputs, typed or as they are."""
    report = SimNode("Report", '{"title": "Otters", "score": 1}', is_output_node=True)
    sim.add_workflow("reports/weekly", Scenario([report]), warning="missing input variables: tone")
    with part_of("docs/outputs.md", 0, 1, 4, 5, 6, 7) as page:
        output = await page["weekly_report"](session, "otters", "job-1")
        assert output == page["Report"]("Otters", 1.0)
        started = await page["start_report"](session, "otters")
        assert await started.output(into=page["Report"]) == output
        assert await page["report_on"](session, "otters") == output
        begun = await page["begin"](session, "otters")
        assert await page["title_of"](session, begun.id) == "Otters"
        sim.add_workflow("write-report", REPORT, inputs={"topic": "string"})
        async with Session(sim.api_key, base_url=sim.base_url) as checking:
            with pytest.raises(ValueError, match="topik") as caught:
                await checking.run("write-report", {"topik": "otters"})
        assert blocks("docs/outputs.md", "text") == [f"InvalidInputs: {caught.value}\n"]
        article = Scenario([SimNode("add links", "see", is_output_node=True)])
        assert await page["article"](session, sim.add_execution(article)) == "see"
        assert await page["result_so_far"](session, held) == "50% done"
        sim.finish(held, "Answer", value="42")
        assert await page["result_so_far"](session, held) == {"Answer": "42"}
    first, second, *described = sim.runs
    assert first.body["metadata"] == {"job": "job-1"}
    assert {run.body["workflow_label_name"] for run in sim.runs} == {"prod"}
    assert described[0].inputs == {"topic": "otters", "sections": ["intro", "figures"]}
    warning = f"execution {second.execution_id}: missing input variables: tone\n"
    assert capsys.readouterr().out == warning


async def test_the_code_on_starting_works(
    sim: Simulator, open_session: Callable[..., Session], recorder: Any
) -> None:
    """It recovers a start whose answer was lost, and keeps the id of an abandoned one."""
    sim.add_workflow("report", REPORT)
    callbacks = Callbacks("http://127.0.0.1:9", secret="s3cret")
    session = open_session(callbacks=callbacks)
    with part_of("docs/failures.md", 1, 2) as page:
        sim.inject(Fault.delay(0.02))
        starting = asyncio.create_task(session.start("report"))
        await sim.wait_for_requests(sim.request_count + 1)
        starting.cancel()
        page["keep_orphans"](await recorder.next(ExecutionStarted))
        assert page["orphans"] == [sim.runs[0].execution_id]
        assert (await page["start_once"](session, "newts")).id == sim.runs[1].execution_id
        sim.inject(Fault.disconnect())
        starting = asyncio.create_task(page["start_once"](session, "eels"))
        await recorder.next(StartFailed)
        token = sim.runs[2].body["callback_url"].removeprefix(callbacks.url_for(""))
        receive_callback(session, token, sim.runs[2].execution_id)
        assert (await starting).id == sim.runs[2].execution_id
        page["keep_orphans"](recorder.events[-1])
        assert page["orphans"][1:] == [sim.runs[2].execution_id]


async def test_the_page_on_observing_is_right(
    sim: Simulator, open_session: Callable[..., Session], held: int
) -> None:
    """Its observer counts bytes, and the page lists every metric and attribute."""
    sim.add_workflow("report", Scenario([SimNode("Out", status="FAILED")]))
    with names("docs/observing.md") as page:
        meters, server = page["serve_metrics"](0)
        observer = opentelemetry.OpenTelemetryObserver(meter_provider=meters)
        try:
            async with open_session(observers=[page["count_bytes"], observer]) as session:
                await session.execution(held).snapshot()
                assert page["received"] == {}  # a single read is not a poll
                with pytest.raises(ExecutionTimeout):
                    await session.execution(held).wait(timeout=0.05)
                # One may go to the poll that the deadline ended.
                sim.inject(Fault.status(429, times=2, retry_after=0.01))
                execution = await session.start("report")
                session.wake(execution.id)
                await execution.wait()
                with pytest.raises(ExecutionFailed):
                    await session.run("report")
            url = f"http://127.0.0.1:{server.server_port}/metrics"
            with await asyncio.to_thread(urllib.request.urlopen, url) as response:
                scraped = response.read().decode()
            check_dashboard(scraped)
        finally:
            meters.shutdown()
            server.shutdown()
            server.server_close()
        assert page["received"][held] > 100
    text = (ROOT / "docs" / "observing.md").read_text(encoding="utf-8")
    source = inspect.getsource(opentelemetry)
    name = r"((?:promptlayer_exec|gen_ai|server|error|exception)\.[a-z._]+)"
    emitted = set(re.findall(f'"{name}"', source))
    shown = set(re.findall(f"`{name}`", text))
    shown |= {f"promptlayer_exec{suffix}" for suffix in re.findall(r"`(\.[a-z]+)`", text)}
    assert emitted <= shown
    alerts = re.findall(r"promptlayer_exec_\w+_count", text)
    assert len(alerts) == 2
    for counter in alerts:
        assert re.search(f'^{counter}{{.*error_type="promptlayer_exec', scraped, re.MULTILINE)


def check_dashboard(scraped: str) -> None:
    """Check that its queries name what a scrape shows; `nox -s dashboard` asks a Prometheus."""
    text = (ROOT / "docs" / "grafana-dashboard.json").read_text(encoding="utf-8")
    panels = json.loads(text)["panels"]
    queries = "\n".join(target["expr"] for panel in panels for target in panel["targets"])
    metrics = set(re.findall(r"promptlayer_exec_\w+(?=[{[)])", queries))
    grouped = {label for by in re.findall(r"by \(([^)]*)\)", queries) for label in by.split(", ")}
    labels = grouped | set(re.findall(r'(\w+)[!=]~?"', queries))
    assert labels == {"error_type", "gen_ai_agent_name", "le", "promptlayer_exec_source"}
    assert labels <= set(re.findall(r'(\w+)="', scraped))
    metrics -= labels
    assert len(metrics) == 13
    assert metrics <= set(re.findall(r"^(promptlayer_exec_\w+)[{ ]", scraped, re.MULTILINE))


async def test_the_code_on_fanning_out_works(
    server: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each item comes back with its output or its error, and starts once."""

    def grade(inputs: Any) -> Scenario:
        return Scenario([SimNode("Grade", inputs["grade"], is_output_node=True)])

    async def rows() -> AsyncIterator[dict[str, Any]]:
        yield {"id": "a", "grade": 0.5}
        yield {"id": "b", "grade": "none"}

    server.add_workflow("grade", grade, definition=grade({"grade": 1.0}))
    monkeypatch.chdir(tmp_path)
    with names("docs/fanning-out.md") as page:
        lines = sorted(await page["grade"](rows()))
        assert sorted(await page["grade"](rows())) == lines
        assert len(server.runs) == 2
    assert lines[0] == "a: 0.50"
    assert lines[1].startswith("b: execution ")


async def test_the_limiters_on_costs_are_acquired(
    sim: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each request; the code is what type checkers read."""
    checked = (ROOT / "tests" / "typing" / "limiter.py").read_text()
    assert blocks("docs/costs.md", "python")[0] in checked
    with names("docs/costs.md") as page:
        bucket = page["InMemoryBucket"]  # in place of the one in Redis
        init = AsyncMock(side_effect=lambda rates, redis, key: bucket(rates))
        monkeypatch.setattr(page["RedisBucket"], "init", init)
        for limiter in (page["in_memory"](1000), await page["in_redis"](None, 1000)):
            limiter.acquire = AsyncMock(side_effect=limiter.acquire)
            before = sim.request_count
            async with Session(sim.api_key, base_url=sim.base_url, limiter=limiter) as limited:
                await limited.execution(sim.add_execution(REPORT)).wait()
            assert limiter.acquire.await_count == sim.request_count - before == 1
