"""All checks of the project: `python -m nox` runs them, on each Python that is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.2.9"
nox.options.sessions = [
    "lint",
    "types",
    "tests",
    "coverage",
    "docs",
    "kill_small",
    "vendor",
    "browser",
]
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True


def _is_there(version: str) -> bool:
    """Tell whether an interpreter runs: some version managers leave names that do not."""
    command = shutil.which(f"python{version}")
    return (
        command is not None
        and subprocess.run([command, "-c", ""], capture_output=True, check=False).returncode == 0
    )


PROJECT = nox.project.load_toml("pyproject.toml")
EXTRAS = sorted(PROJECT["project"]["optional-dependencies"])
EVERYTHING = f".[{','.join(EXTRAS)}]"
PYTHONS = [version for version in ("3.11", "3.12", "3.13") if _is_there(version)] or None


def _install(session: nox.Session, group: str, *packages: str) -> None:
    session.install(*nox.project.dependency_groups(PROJECT, group), *packages)


def _install_debian(session: nox.Session, *packages: str) -> None:
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        session.error(f"install {packages[0]} first: to do so here takes root and apt-get")
    session.run("apt-get", "update", "-q", external=True)
    session.run("apt-get", "install", "-qy", "--no-install-recommends", *packages, external=True)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the suite on the built wheel, with branch coverage; arguments go to pytest."""
    _install(session, "test", EVERYTHING)
    # The wheel is what is tested, so the checkout must not be found before it.
    environment = {
        "PYTHONSAFEPATH": "1",
        "COVERAGE_FILE": str(Path.cwd() / f".coverage.{session.python}"),
    }
    pytest = ("pytest", "-n", "auto", "--maxprocesses=4", *session.posargs)
    session.run("coverage", "run", "-m", *pytest, env=environment)


@nox.session
def coverage(session: nox.Session) -> None:
    """Demand full branch coverage of the private modules, and 90 % of the rest."""
    _install(session, "test")
    session.run("coverage", "combine")
    private = "promptlayer_exec/_*.py"
    session.run("coverage", "report", f"--include={private}", "--fail-under=100")
    session.run("coverage", "report", f"--omit={private}", "--fail-under=90")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    _install(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the package, and of code as its users write it."""
    _install(session, "types", "nox", "pytest", EVERYTHING)
    session.run(
        "mypy", "promptlayer_exec", "pytest_promptlayer_exec.py", "tests/typing", "noxfile.py"
    )
    # A second opinion on what users write: checkers differ in how they read overloads.
    session.run("pyrefly", "check", "tests/typing/api.py")


@nox.session
@nox.parametrize("extra", EXTRAS)
def extras(session: nox.Session, extra: str) -> None:
    """Import what an extra is for, with that extra alone."""
    session.install(f".[{extra}]")
    environment = {"PYTHONSAFEPATH": "1"}
    module = "_json" if extra == "speed" else extra
    session.run("python", "-W", "error", "-c", f"import promptlayer_exec.{module}", env=environment)
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
        "httpx>=0.28",  # the TestClient of older starlettes knows no httpx2
        EVERYTHING,
    )
    session.run("pytest", *session.posargs, env={"PYTHONSAFEPATH": "1"})


@nox.session
def sdist(session: nox.Session) -> None:
    """See that the sdist makes the same wheel, and holds what its tests need."""
    _install(session, "test", "build", "hatchling")
    out = Path(session.create_tmp()).resolve()
    shutil.rmtree(out)
    build = ("python", "-m", "build", "--no-isolation")
    session.run(*build, "--outdir", str(out / "by-sdist"))
    session.run(*build, "--outdir", str(out / "direct"), "--wheel")
    (through,) = (out / "by-sdist").glob("*.whl")
    (direct,) = (out / "direct").glob("*.whl")
    if _contents(through) != _contents(direct):
        session.error("the sdist makes another wheel than the checkout")
    (packed,) = (out / "by-sdist").glob("*.tar.gz")
    session.install(f"{through}[{','.join(EXTRAS)}]")
    shutil.unpack_archive(packed, out, filter="data")
    session.chdir(out / packed.name.removesuffix(".tar.gz"))
    # Those that read files beside the package, unless told otherwise.
    tests = session.posargs or [f"tests/test_{it}.py" for it in ("docs", "public_api", "packaging")]
    session.run("pytest", *tests, env={"PYTHONSAFEPATH": "1"})


def _contents(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {file.filename: file.CRC for file in archive.infolist()}


@nox.session
def docs(session: nox.Session) -> None:
    """Build the pages under docs/ to build/docs; whatever is doubtful in them is an error."""
    _install(session, "docs", "pytest", ".[cli,dbos,fastapi,opentelemetry,viewer]")
    session.run("sphinx-build", "-n", "-W", "--keep-going", "docs", "build/docs")


# The newest SDK, and one that turns to Ably unless it is told of Centrifugo.
SDKS = ("1.5.16", "1.4.7")


@nox.session
@nox.parametrize("sdk", SDKS)
def vendor(session: nox.Session, sdk: str) -> None:
    """Run workflows with the vendor's own SDK against the simulator of the built wheel."""
    _install(session, "vendor", f"promptlayer=={sdk}", ".")
    # The fixtures of the ordinary suite need packages that have no part in this.
    own_fixtures = "--confcutdir=tests/vendor"
    environment = {"PYTHONSAFEPATH": "1"}
    session.run("pytest", own_fixtures, "tests/vendor", *session.posargs, env=environment)


@nox.session
def browser(session: nox.Session) -> None:
    """Use the viewer's page in Debian's Chromium; `-- --screenshots` takes those of the docs."""
    if shutil.which("chromium") is None:
        _install_debian(session, "chromium", "fonts-dejavu-core", "fonts-liberation")
    _install(session, "browser", ".[viewer]")
    if session.posargs == ["--screenshots"]:
        session.run("python", "tests/browser/screenshots.py")
        return
    # The fixtures of the ordinary suite need packages that have no part in this.
    own_fixtures = "--confcutdir=tests/browser"
    environment = {"PYTHONSAFEPATH": "1"}
    session.run("pytest", own_fixtures, "tests/browser", *session.posargs, env=environment)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what a poll costs, and what following thousands does; see docs/scale.md."""
    # Beside the package with the standard library alone: with msgspec, and the vendor's SDK.
    others = {"speed": ".[speed]", "vendor": f"promptlayer=={SDKS[0]}"}
    pythons = {name: _another(session, name, package) for name, package in others.items()}
    session.install(".[dbos]", "httpx", "matplotlib")
    environment = {"PYTHONSAFEPATH": "1"}
    failed = []
    for program, *arguments in (
        ("imports.py",),
        ("schedule.py", "--chart", "docs/images/schedule.svg"),
        ("bucket.py",),
        ("durable.py",),
        ("__main__.py", *session.posargs),
        ("polls.py", *(part for name in others for part in (f"--{name}", pythons[name]))),
    ):
        try:
            session.run("python", f"tests/benchmarks/{program}", *arguments, env=environment)
        except CommandFailed:  # the others' tables are to be printed all the same
            failed.append(program)
    if failed:
        session.error(f"targets were missed: {', '.join(failed)}")


def _another(session: nox.Session, name: str, package: str) -> str:
    """Return the Python of another environment, which has that package."""
    home = Path(session.create_tmp()).resolve() / name
    session.run("python", "-m", "venv", str(home), silent=True)
    python = str(home / "bin" / "python")
    session.run(python, "-m", "pip", "install", package, external=True, silent=True)
    return python


@nox.session
def soak(session: nox.Session) -> None:
    """Send 50,000 items through a server that fails; the suite sends a few."""
    _install(session, "test", ".")
    environment = {"PYTHONSAFEPATH": "1", "PROMPTLAYER_EXEC_SOAK_ITEMS": "50000"}
    session.run("pytest", "-s", "tests/soak", *session.posargs, env=environment)


@nox.session
def kill_small(session: nox.Session) -> None:
    """Kill one of three workers of a batch on PostgreSQL; the suite does so on SQLite."""
    _kill(session, "tests/kill/test_small.py")


@nox.session
def kill(session: nox.Session) -> None:
    """Kill the workers of batches, the server and the database, at random and for minutes."""
    _kill(session, "tests/kill")


def _kill(session: nox.Session, tests: str) -> None:
    _install(session, "test", ".[cli,dbos]")
    # Debian's programs are not on the path.
    if shutil.which("initdb") is None and not Path("/usr/lib/postgresql").exists():
        _install_debian(session, "postgresql")
    session.run("pytest", tests, *session.posargs, env={"PYTHONSAFEPATH": "1"})
