"""The commands and their options."""

import sys
from functools import partial
from typing import Annotated

import typer

from promptlayer_exec import StartRequest

from ._batch_app import batch_app
from ._demo import EXECUTION_ID, demo
from ._ending import EXIT_CODES, Ending, Subject, conclude
from ._hints import PROGRAM, command
from ._inputs import read_inputs, read_metadata
from ._options import BaseUrl, Outage, seconds
from ._results import results
from ._run import run
from ._simulate import simulate
from ._streams import guard_streams
from ._view import TOKEN, view
from ._views import choose_view
from ._watch import watch

app = typer.Typer(
    name=PROGRAM,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(batch_app, name="batch")


def main() -> None:
    """Run the command line, and exit."""
    guard_streams()
    with Ending() as ending:
        app(prog_name=PROGRAM)
    sys.exit(ending.code)


_Id = Annotated[int, typer.Argument(metavar="ID", min=1, max=2**63 - 1, help="The execution's id.")]


@app.callback(epilog=EXIT_CODES)
def _commands() -> None:
    """Follow PromptLayer workflow executions, node by node.

    The API key is taken from the environment variable PROMPTLAYER_API_KEY, and from nowhere else:
    what is on a command line is visible to every user of the machine. New here? Try the demo.
    """


@app.command(
    "demo",
    help="Show a simulated execution. It needs no key and no network, and eight seconds.",
    short_help="Show a simulated execution: no key, no network.",
)
def _demo(
    as_json: Annotated[
        bool, typer.Option("--json", help="Write what `watch --json` would write, and no more.")
    ] = False,
) -> None:
    work = demo(choose_view(as_json=as_json), as_json=as_json)
    raise typer.Exit(conclude(work, Subject(EXECUTION_ID), as_json=as_json))


_RUN = """Start a run of a workflow, and watch it until it is complete.

WORKFLOW is the workflow's name or its id: the server finds either. Its input variables are given
with -i, in one of these ways, where - as FILE is standard input:

\b
  -i KEY=VALUE  JSON, or a text where it is no JSON: -i n=3 -i 'rows=[1, 2]'
                -i name=Maria. A text that would be JSON is written as a JSON
                string: -i 'zip="12345"'
  -i KEY@FILE   a file's text as it is, never taken for JSON, so that scripts
                can pass on any text: -i letter@letter.txt
  -i @FILE      a JSON object of inputs: -i @inputs.json

A key ends at the first = or @. Of the same key the last counts: -i @defaults.json -i n=4 changes
one input.

Once the run has started, standard error tells its execution id, and what the server warns of. From
then on it is like `watch`, with --json too; the error of a run that did not start has an
"execution_id" of null.

A start is never repeated once it may have reached the server: where the answer is lost, the error
says that the run may have started. Interrupted meanwhile, the command waits for the answer, to tell
the id; a second interrupt ends it at once. The run itself goes on: the server cannot cancel it. The
key is taken from PROMPTLAYER_API_KEY alone."""


@app.command("run", help=_RUN, epilog=EXIT_CODES)
def _run(
    workflow: Annotated[str, typer.Argument(metavar="WORKFLOW", help="The workflow's name or id.")],
    *,
    inputs: Annotated[
        list[str],
        typer.Option("--input", "-i", metavar="KEY=VALUE", help="An input, as told above."),
    ] = [],  # noqa: B006 - Typer's own way
    label: Annotated[
        str | None, typer.Option(metavar="NAME", help="The label of the version to run.")
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER", min=1, max=2**63 - 1, help="The version to run; excludes --label."
        ),
    ] = None,
    metadata: Annotated[
        list[str],
        typer.Option(metavar="KEY=TEXT", help="A string to keep with the run; may be repeated."),
    ] = [],  # noqa: B006 - Typer's own way
    watched: Annotated[
        bool,
        typer.Option(
            "--watch/--no-watch",
            help="Watch it; else only print its id once it has started, with exit code 0.",
        ),
    ] = True,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            callback=seconds,
            help="How long to wait at most, from its start; and as long for the start itself.",
        ),
    ] = 3600,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON Lines.")] = False,
    base_url: BaseUrl = None,
    outage: Outage = 600,
) -> None:
    if label is not None and version is not None:
        raise typer.BadParameter("give one of them", param_hint="'--label' / '--version'")
    request = StartRequest(
        workflow,
        read_inputs(inputs),
        label=label,
        version=version,
        metadata=read_metadata(metadata) or None,
    )
    view = choose_view(as_json=as_json)
    subject = Subject(
        pick_up=partial(command, "watch", base_url=base_url), remark="nothing was started"
    )
    work = run(
        request,
        view,
        subject,
        watched=watched,
        as_json=as_json,
        base_url=base_url,
        timeout=timeout,
        outage=outage,
    )
    raise typer.Exit(conclude(work, subject, as_json=as_json))


_WATCH = """Watch an execution until it is complete.

On a terminal: a table of its nodes that keeps up to date. Otherwise: a line for each change of a
node, written at once, and one for the end. Values are cut short; `results` prints them in full.

With --json, each poll that brought news becomes one line of ASCII JSON:

\b
  {"execution_id": "787", "poll": 1, "elapsed": 0.012, "complete": false,
   "succeeded": null, "nodes": {"Node 1": {"status": "RUNNING", "value": null,
   "error_message": null, "raw_error_message": null, "is_output_node": true,
   "running": 0.012, "final": null}}}

The times are seconds since the first poll; running and final are when the node was first seen so.
The last line has "complete": true and a "succeeded" of true or false, or, if the watch itself
ended early, it is {"error": {"type": ..., "message": ..., "execution_id": "787"}}. NaN and
Infinity, where a value has them, are written as Python's json does.

Troubles are told on standard error. The key is taken from PROMPTLAYER_API_KEY alone."""


@app.command("watch", help=_WATCH, epilog=EXIT_CODES)
def _watch(
    execution_id: _Id,
    timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", callback=seconds, help="How long to wait at most."),
    ] = 3600,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON Lines.")] = False,
    base_url: BaseUrl = None,
    outage: Outage = 600,
) -> None:
    view = choose_view(as_json=as_json)
    work = watch(execution_id, view, base_url=base_url, timeout=timeout, outage=outage)
    subject = Subject(execution_id, partial(command, "watch", base_url=base_url))
    raise typer.Exit(conclude(work, subject, as_json=as_json))


_RESULTS = """Print the results of an execution as they are now.

That is the main output: a string as it is, and anything else as JSON. Whether the execution
succeeded is judged by its nodes; if it did not, standard output stays empty, and standard error
tells why.

With --all it is every node: a table on a terminal, and otherwise one line of JSON, as `watch
--json` writes it.

The exit code is 3 while the execution is not complete. The key is taken from PROMPTLAYER_API_KEY
alone."""


@app.command("results", help=_RESULTS, epilog=EXIT_CODES)
def _results(
    execution_id: _Id,
    all_nodes: Annotated[bool, typer.Option("--all", help="Every node.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line of JSON, even if it is a string.")
    ] = False,
    base_url: BaseUrl = None,
    outage: Outage = 10,
) -> None:
    work = results(
        execution_id,
        base_url=base_url,
        outage=outage,
        all_nodes=all_nodes,
        as_json=as_json,
        pick_up=command("watch", execution_id, base_url=base_url),
    )
    raise typer.Exit(conclude(work, Subject(execution_id), as_json=as_json and all_nodes))


_VIEW = f"""Show executions in the browser, as they run.

It prints the URL of a page on this machine, and serves it until Ctrl-C, with exit code 0. The page
follows the executions of ID, and others that are added to it by id or started on it. --demo shows
a few simulated agents; it needs no key and no network.

The page may do what your key may do, so its URL holds a token, new each time. For a page that
survives a restart, put one of your own into {TOKEN}, and give --port.
The key is taken from PROMPTLAYER_API_KEY alone."""


@app.command("view", help=_VIEW, short_help="Show executions in the browser, as they run.")
def _view(
    execution_ids: Annotated[
        list[int] | None,
        typer.Argument(metavar="ID", min=1, max=2**63 - 1, help="The executions' ids."),
    ] = None,
    *,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port to listen on; 0 takes a free one.")
    ] = 0,
    is_demo: Annotated[bool, typer.Option("--demo", help="Show simulated agents.")] = False,
    base_url: BaseUrl = None,
    outage: Outage = 600,
) -> None:
    if is_demo and (execution_ids or base_url is not None):
        raise typer.BadParameter("it shows executions of its own", param_hint="'--demo'")
    work = view(
        execution_ids or [],
        host=host,
        port=port,
        is_demo=is_demo,
        base_url=base_url,
        outage=outage,
    )
    raise typer.Exit(conclude(work, Subject()))


_SIMULATE = """Serve a simulated PromptLayer.

Try `run`, `watch`, `results` and your own code on it. It tells the base URL, the key and the ids of
some executions, and then every request. Ctrl-C ends it, with exit code 0."""


@app.command("simulate", help=_SIMULATE)
def _simulate(
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port to listen on; 0 takes a free one.")
    ] = 8787,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
) -> None:
    raise typer.Exit(conclude(simulate(host, port), Subject()))
