"""The pages of help: how they are laid out, and the topics that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from promptlayer_exec._ways_out import PROGRAM
from promptlayer_exec.cli._printing import out, quoted

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_TOPICS = {
    "exit-codes": """\
Exit codes:
  0    succeeded
  1    the run or an item of the batch failed, or it is unknown whether it
       started; PromptLayer refused a request, and waiting will not change
       that; or doctor found a problem
  2    invalid usage, a wrong setting, no API key, or a key of another request
  3    still running when the time was up
  4    PromptLayer or the database is unreachable or failing: the same command
       may work later. For run, watch and results, any failed request is a 4
  70   a bug in this program
  74   could not write the output
  130  interrupted (Ctrl-C)
  141  the reader of a pipe closed it
  143  terminated (SIGTERM, or a closed terminal)
""",
    "environment": """\
Environment variables:
  PROMPTLAYER_API_KEY          API key. No option sets it: every user of the
                               machine can read the arguments of a command.
  PROMPTLAYER_BASE_URL         server, unless you give --base-url [default:
                               https://api.promptlayer.com]
  PROMPTLAYER_EXEC_DB          database, unless you give --db [default: a
                               SQLite file in your state directory]
  PROMPTLAYER_EXEC_VIEW_TOKEN  token in the URL of `view`, so that the URL
                               survives a restart
  PROMPTLAYER_EXEC_MCP_TOKEN   token that clients of `mcp --http` send
  HTTPS_PROXY, HTTP_PROXY,     proxies, and the hosts to reach without one
  NO_PROXY
  NO_COLOR                     set it to get no colours
""",
    "inputs": """\
Inputs of `run`. FILE can be - for standard input:
  -i KEY=VALUE  JSON, or text if VALUE is not valid JSON:
                -i n=3   -i 'rows=[1, 2]'   -i name=Maria
                Quote text that would be valid JSON: -i 'zip="12345"'
  -i KEY@FILE   the text of FILE, never read as JSON, so that a script can
                pass any text: -i letter@letter.txt
  -i @FILE      a JSON object of inputs: -i @inputs.json

The key is the text before the first = or @. If you give a key twice, the last
one wins: `-i @defaults.json -i n=4` changes one input.
""",
    "items": """\
Items of `batch run`, one on each line:
  {"key": "a", "inputs": {"topic": "otters"}}

An item can also have a "workflow", a "label" or a "version", and "metadata".
Without a key, it gets a digest of its line.

In a CSV file, the first line names the columns, separated by commas,
semicolons or tabs. The columns key, workflow, label, version and metadata.NAME
mean the same as above. Every other column is an input, as text.

Results, one line for each finished item, in the order in which they finish:
  {"key": "a", "execution_id": 787, "succeeded": true, "output": "...",
   "error": null, "started": "2026-05-01T20:00:00+00:00",
   "finished": "2026-05-01T20:00:07+00:00"}

An error is {"type": ..., "message": ..., "data": {...}}. The data are the
attributes of that type of error, such as the nodes that "failed", and a
"reason" without the execution's id. Times are UTC.
""",
    "json": """\
Output of `watch --json` and `run --json`: one line of ASCII JSON for each poll
that changed something.
  {"execution_id": "787", "poll": 1, "elapsed": 0.012, "complete": false,
   "succeeded": null, "progress": 0.0, "nodes": {"Node 1": {"name": "Node 1",
   "status": "RUNNING", "value": null, "error_message": null,
   "raw_error_message": null, "is_output_node": true, "running": 0.012,
   "final": null}}}

Times are seconds since the first poll: "running" and "final" are when a poll
first showed the node in that state. In the last line, "complete" is true, and
"succeeded" is true or false. NaN and Infinity look as in Python.

If the command fails before that, its last line is
  {"error": {"type": ..., "message": ..., "execution_id": "787"}}
with an "execution_id" of null if no run started.
""",
}


def help_epilog(*examples: str) -> str:
    """Return the last lines of a page of help: examples, and the topic on exit codes."""
    lines = [f"  {PROGRAM} {example}" for example in examples]
    if lines:
        lines = ["\b", "Examples:" if len(lines) > 1 else "Example:", *lines, ""]
    return "\n".join([*lines, f"Exit codes: `{PROGRAM} help exit-codes`"])


class _PlainHelp:
    """Lists arguments and options without Python's types, in the sections of their panels."""

    def collect_usage_pieces(self, context: Any) -> list[str]:
        pieces = super().collect_usage_pieces(context)  # type: ignore[misc]
        return [piece.replace("{", "").replace("}", "") for piece in pieces]

    def format_options(self, context: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(context):  # type: ignore[attr-defined]
            heading = getattr(parameter, "rich_help_panel", None) or "Options"
            if parameter.param_type_name == "argument":
                heading = "Arguments"
            sections.setdefault(heading, []).append((_names(parameter), _text(parameter)))

        for heading, rows in sections.items():
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)
        if isinstance(self, TyperGroup):
            self.format_commands(context, formatter)


class PlainCommand(_PlainHelp, TyperCommand):
    """A command whose help is plain text."""


class PlainGroup(_PlainHelp, TyperGroup):
    """A group of commands whose help is plain text."""


class Program(typer.Typer):
    """A group of commands whose pages of help are plain text."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            cls=PlainGroup,
            no_args_is_help=True,
            rich_markup_mode=None,
            pretty_exceptions_enable=False,
            **settings,
        )

    def command(self, name: str | None = None, **settings: Any) -> Callable[[CommandT], CommandT]:
        """Return a decorator that registers a command."""
        return super().command(name, **{"cls": PlainCommand, **settings})


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"{parameter.metavar}..." if parameter.nargs != 1 else str(parameter.metavar)

    names = ", ".join(sorted(parameter.opts, key=len))
    if parameter.secondary_opts:
        return f"{names} / {', '.join(parameter.secondary_opts)}"
    return names if parameter.is_flag else f"{names} {parameter.metavar}"


def _text(parameter: Any) -> str:
    default = parameter.show_default
    if not isinstance(default, str):
        value = parameter.default
        is_shown = default and isinstance(value, str | int | float) and not isinstance(value, bool)
        default = str(value) if is_shown else ""
    return f"{parameter.help} [default: {default}]" if default else str(parameter.help)


def show_help(
    context: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="TOPIC", help="A command or a topic.")
    ] = None,
) -> None:
    """Show the help of a command, or explain a topic.

    \b
    Topics:
      exit-codes   the exit codes of all commands
      environment  the environment variables of all commands
      inputs       the forms of -i, as `run` takes them
      items        the file of items of `batch run`, and its results
      json         what `watch --json` and `run --json` write
    """  # noqa: D301 - \b is Typer's mark for preformatted text
    if words and len(words) == 1 and words[0] in _TOPICS:
        out(_TOPICS[words[0]].rstrip())
        return

    page: Any = context.parent
    for word in words or ():
        found = getattr(page.command, "commands", {}).get(word)
        if found is None:
            topics = ", ".join(_TOPICS)
            raise typer.BadParameter(f"no command or topic {quoted(word)}. The topics are {topics}")
        page = type(page)(found, info_name=word, parent=page)
    out(page.get_help())
