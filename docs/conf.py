"""How Sphinx builds these pages: `python -m nox -s docs`."""

import posixpath
import re
from importlib import metadata
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

project = "promptlayer-exec"
author = "The promptlayer-exec maintainers"
project_copyright = author
version = release = metadata.version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_llm.txt"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3  # links to headings are then the same here and on a code host
myst_enable_extensions = ["attrs_block"]  # {.cards}

html_theme = "furo"
pygments_dark_style = "monokai"  # the theme's own underlines every module's name
html_title = f"{project} {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["cards.css"]

# llms.txt, llms-full.txt and each page as Markdown, beside the HTML pages.
llms_txt_full_build = True
llms_txt_nested_enabled = False
llms_txt_suffix_mode = "replace"
llms_txt_description = (
    "The asyncio client for PromptLayer workflows: it starts runs, shows progress, and returns "
    "typed outputs."
)

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_attr_annotations = True
napoleon_use_ivar = True
python_use_unqualified_type_names = True
default_role = "py:obj"

# What other projects document: their inventories are on the network, and a build needs none.
nitpick_ignore = [
    ("py:class", name)
    for name in (
        "EllipsisType",
        "MeterProvider",
        "Path",
        "Redis",
        "ScenarioSource",
        "TracerProvider",
        "TypeForm",
        "aiohttp.ClientSession",
        "cattrs.Converter",
        "collections.abc.AsyncGenerator",
        "collections.abc.AsyncIterable",
        "collections.abc.Awaitable",
        "collections.abc.Callable",
        "collections.abc.Collection",
        "collections.abc.Generator",
        "collections.abc.Iterable",
        "collections.abc.Mapping",
        "collections.abc.MutableMapping",
        "datetime.datetime",
        "fastapi.routing.APIRouter",
        "mcp.server.lowlevel.server.Server",
        "pathlib.Path",
        "promptlayer_exec.sync.Execution",  # its page is not indexed: `Session` names the other one
        "promptlayer_exec.viewer._board.Card",
        "socket.socket",
        "starlette.responses.Response",
        "types.EllipsisType",
    )
]
# Type variables, which no page describes.
nitpick_ignore_regex = [("py:class", r"(.+\.)?(Handle|Inputs|Item|Output)?T")]


def tell_apart(app: Sphinx, docname: str, source: list[str]) -> None:
    """Read what a page has in comments, since a code host would show directives as text.

    And leave out what is for readers on a code host alone.
    """
    text = re.sub(r"<!-- Sphinx:\n(.*?)\n-->", r"\1", source[0], flags=re.DOTALL)
    source[0] = re.sub(r"<!-- Not Sphinx: -->\n.*?\n<!-- -->", "", text, flags=re.DOTALL)


def mark_code(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Read single backticks as the docstrings mean them: as code, and a name as a link."""

    def marked(found: re.Match[str]) -> str:
        text = found[0] if re.fullmatch(r"[\w.]*\w", found[1]) else f"`{found[0]}`"
        return f"{text}\\ "  # so that a plural's s may follow

    lines[:] = re.sub(r"(?<!`)`([^`]+)`(?!`)", marked, "\n".join(lines)).split("\n")


def tidy_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Write defaults as a reader of the source would see them."""
    if not signature:
        return None
    signature = re.sub(r"=(\w+Policy)\(.*?\)(?=, \w+=|\)$)", r"=\1()", signature)
    # The latter stands for what attrs makes anew for each instance.
    return re.sub(r"\b(Ellipsis|NOTHING)\b", "...", signature), returns


def leave_code(
    app: Sphinx, env: Any, node: pending_xref, content: nodes.TextElement
) -> nodes.TextElement | None:
    """Leave a name in backticks that leads nowhere, such as an argument's, as plain code."""
    return content if node["reftype"] == "obj" else None


def finish_markdown(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Make links within a page, and images, lead to what the output has."""
    if "markdown" not in app.builder.name:
        return
    for reference in doctree.findall(nodes.reference):
        reference["internal"] = reference.get("internal", "refid" in reference)
    directory = posixpath.dirname(docname) or "."
    for image in doctree.findall(nodes.image):
        file = app.env.images[image["uri"]][1]
        image["uri"] = posixpath.relpath(f"_images/{file}", directory)


def keep_text(translator: Any, node: nodes.abbreviation) -> None:
    """Let the text of a node be written, and nothing beside it."""


def setup(app: Sphinx) -> None:
    """Connect the above."""
    # The `*` of a signature: without this, the Markdown pages lack it.
    app.add_node(nodes.abbreviation, override=True, markdown=(keep_text, keep_text))
    app.connect("source-read", tell_apart)
    app.connect("autodoc-process-docstring", mark_code, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", tidy_signature)
    app.connect("missing-reference", leave_code)
    app.connect("doctree-resolved", finish_markdown)
