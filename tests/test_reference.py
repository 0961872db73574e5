"""The reference has the signatures and docstrings of the public names, and the help of commands.

`python tests/test_reference.py` renews them. They are for readers of a checkout: Sphinx leaves the
signatures and docstrings out, and makes its own.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from types import FunctionType, NoneType, UnionType
from typing import Any, ForwardRef, Generic, Union, get_args, get_origin

import attrs
import pytest
import typer

from promptlayer_exec.cli._app import app as command_line

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
WIDTH = 100
# What Sphinx alone reads, and what it leaves out.
PARTS = re.compile(
    r"(<!-- Sphinx:\n```\{eval-rst\}\n(.*?)\n```\n-->\n\n<!-- Not Sphinx: -->\n).*?(<!-- -->)",
    re.DOTALL,
)
DIRECTIVE = re.compile(r"^\.\. (\w+):: (\S+)\n((?:   :.*\n)*)", re.MULTILINE)
RENEW = "the reference is old: run python tests/test_reference.py, and commit what it changes"
PAGES = [page for page in sorted(REFERENCE.glob("*.md")) if PARTS.search(page.read_text("utf-8"))]


def documented(directives: str) -> Iterator[tuple[str, Any, dict[str, str]]]:
    """Yield what the directives of a page document: its name, what it is, and their options."""
    module = ""
    for kind, name, lines in DIRECTIVE.findall(f"{directives}\n"):
        options = dict(re.findall(r":([\w-]+): ?(.*)", lines))
        excluded = options.get("exclude-members", "").split(", ")
        match kind:
            case "currentmodule" | "module":
                module = name
            case "automodule":
                found = importlib.import_module(name)
                for public in found.__all__:
                    if public not in excluded:
                        yield public, getattr(found, public), options
            case _:
                yield name, getattr(importlib.import_module(module), name), options


def annotation(it: Any) -> str:
    """Return a type as its source has it, whatever attrs and this Python have made of it."""
    if isinstance(it, str):
        return it
    if isinstance(it, ForwardRef):
        return it.__forward_arg__
    if get_origin(it) in (Union, UnionType):
        return " | ".join(annotation(member) for member in get_args(it))
    return "None" if it is NoneType else inspect.formatannotation(it)


def parameter(it: inspect.Parameter) -> str:
    """Return a parameter as its source has it."""
    prefix = {it.VAR_POSITIONAL: "*", it.VAR_KEYWORD: "**"}.get(it.kind, "")
    text = f"{prefix}{it.name}"
    if it.annotation is not it.empty:
        text += f": {annotation(it.annotation)}"
    if it.default is not it.empty:
        default = re.sub(r"^(\w+Policy)\(.*\)$", r"\1()", repr(it.default))
        default = re.sub(r"^(Ellipsis|NOTHING)$", "...", default)
        if inspect.isroutine(it.default):
            default = f"{it.default.__module__}.{it.default.__qualname__}"
        text += f" = {default.removeprefix('typing.')}"
    return text.replace("'", '"')


def signature(name: str, it: Any) -> str:
    """Return a signature in one line, or with a line for each parameter."""
    found = inspect.signature(it)
    parameters = [each for each in found.parameters.values() if each.name not in ("self", "cls")]
    texts = [parameter(each) for each in parameters]
    keyword_only = [each.kind is each.KEYWORD_ONLY for each in parameters]
    if True in keyword_only and not any(each.kind is each.VAR_POSITIONAL for each in parameters):
        texts.insert(keyword_only.index(True), "*")

    result = ""
    if not inspect.isclass(it) and found.return_annotation not in (found.empty, "None", None):
        result = f" -> {found.return_annotation}"
    line = f"{name}({', '.join(texts)}){result}"
    if len(line) <= WIDTH:
        return line
    return "".join([f"{name}(\n", *(f"    {text},\n" for text in texts), f"){result}"])


def has_public_arguments(cls: Any) -> bool:
    """Return False for an error, a protocol and a handle, which users do not make."""
    if issubclass(cls, Exception) or getattr(cls, "_is_protocol", False):
        return False
    if re.search(r"^ *Args:$", cls.__doc__, re.MULTILINE):
        return True
    return attrs.has(cls) and not any(field.name.startswith("_") for field in attrs.fields(cls))


def entry(name: str, it: Any) -> str:
    """Return the line of code that stands for a name."""
    if isinstance(it, staticmethod | classmethod):
        return f"@{type(it).__name__}\n{entry(name, it.__func__)}"
    if isinstance(it, property):
        return f"{name}: {inspect.signature(it.fget).return_annotation}"
    if inspect.isclass(it):
        if issubclass(it, enum.Enum):
            values = "".join(f"\n    {member.name} = {member.value!r}" for member in it)
            return f"class {name}({it.__base__.__name__}):{values}"
        if has_public_arguments(it):
            return f"class {signature(name, it)}"
        bases = [base.__name__ for base in it.__bases__ if base not in (object, Generic)]
        return f"class {name}({', '.join(bases)})" if bases else f"class {name}"
    kind = "async def" if inspect.iscoroutinefunction(inspect.unwrap(it)) else "def"
    return f"{kind} {signature(name, it)}"


def members(cls: type, options: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield the members of a class that a directive asks for, in the order of the source."""
    if "members" not in options:
        return
    wanted = set(filter(None, options["members"].split(", ")))
    excluded = options.get("exclude-members", "").split(", ")
    for name, value in vars(cls).items():
        is_code = isinstance(value, property | staticmethod | classmethod | FunctionType)
        is_wanted = name in wanted if wanted else not name.startswith("_")
        if is_code and is_wanted and name not in excluded and value.__doc__:
            yield name, value


SECTION = re.compile(
    r"^(Args|Attributes|Example|Raises|Returns|Yields):\n((?:    .*\n|\n)+)", re.MULTILINE
)
CODE = re.compile(r"::\n\n((?:    .*\n|\n)+)")


def markdown(docstring: str) -> str:
    """Return a docstring in Google's style as Markdown."""

    def fenced(found: re.Match[str]) -> str:
        return f":\n\n```py\n{dedent(found[1]).strip()}\n```\n\n"

    def titled(found: re.Match[str]) -> str:
        title, body = found[1], dedent(found[2]).strip()
        if title in ("Args", "Attributes", "Raises"):
            body = re.sub(r"^(\S+?): ", r"- `\1`: ", body, flags=re.MULTILINE)
            body = re.sub(r"^    ", "  ", body, flags=re.MULTILINE)
        else:
            body = CODE.sub(fenced, f"{body}\n").rstrip()
        return f"**{title}:**\n\n{body}\n\n"

    text = SECTION.sub(titled, f"{inspect.cleandoc(docstring)}\n")
    return CODE.sub(fenced, text).strip()


def entries(directives: str) -> Iterator[str]:
    """Yield the headings, signatures and docstrings of what the directives of a page document."""
    for name, it, options in documented(directives):
        yield f"## {name}\n\n```py\n{entry(name, it)}\n```\n\n{markdown(it.__doc__)}"
        if inspect.isclass(it):
            for member, value in members(it, options):
                head = f"### {name}.{member}\n\n```py\n{entry(member, value)}\n```"
                yield f"{head}\n\n{markdown(value.__doc__)}"


def renewed(text: str) -> str:
    """Return a page with what follows from its directives and the docstrings."""

    def renew(found: re.Match[str]) -> str:
        return "\n\n".join([found[1].rstrip(), *entries(found[2]), found[3]])

    return PARTS.sub(renew, text)


COMMANDS = REFERENCE / "command-line.md"
HELP = "<!-- From here on, the output of `--help`. -->\n"


def sections(command: Any, parent: Any = None) -> Iterator[str]:
    """Yield the help of a command, and of those below it, as the program prints it."""
    settings = {"terminal_width": 88, **command.context_settings}
    context = command.context_class(command, parent, command.name, **settings)
    yield f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
    for each in getattr(command, "commands", {}).values():
        yield from sections(each, context)


def with_help(text: str) -> str:
    """Return the page on the command line with the help of each command."""
    program = typer.main.get_command(command_line)
    return "\n".join([text.partition(HELP)[0] + HELP, *sections(program)])


def test_the_reference_has_the_help_of_each_command() -> None:
    """`python tests/test_reference.py` renews it."""
    text = COMMANDS.read_text(encoding="utf-8")
    # Older versions of typer do not mark an argument that may come several times.
    assert with_help(text).replace("...", "") == text.replace("...", ""), RENEW


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_reference_has_the_signatures_and_docstrings_of_the_code(page: Path) -> None:
    """`python tests/test_reference.py` renews it."""
    text = page.read_text(encoding="utf-8")
    assert renewed(text) == text, RENEW


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
    COMMANDS.write_text(with_help(COMMANDS.read_text(encoding="utf-8")), encoding="utf-8")
