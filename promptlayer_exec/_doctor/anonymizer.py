"""Removes from the server's responses what is private, and keeps what this package relies on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from promptlayer_exec._api.json import loads

# The documented fields, by what they contain. All other names in bodies are the user's.
_STRUCTURE = {
    *("workflow", "items", "nodes", "edges", "output", "token_details", "success", "created_at"),
    *("id", "workflow_id", "workflow_version_id", "workflow_version_execution_id"),
    *("version", "version_number", "workflow_version_number", "latest_version_number"),
    *("is_output_node", "is_draft", "is_deleted", "is_and", "commit_message", "issued", "expires"),
    *("page", "per_page", "pages", "total", "has_next", "has_prev", "next_num", "prev_num"),
}
_WORDS = {"status", "node_type", "type", "messaging_backend"}  # of the server
_MESSAGES = {"message", "error", "detail", "msg"}  # of the server, for people
_NAMES = {
    *("name", "workflow_name", "source_node_name", "target_node_name", "dependencies"),
    "release_labels",
}
_KEYS = {"required_input_variables", "capability"}  # whose keys are names
_PRIVATE = {
    *("value", "error_message", "raw_error_message", "configuration", "conditionals"),
    *("external_ids", "user_id", "workspace_id", "token", "clientId"),
    "warning",  # about inputs, by their names
}
_LOCATION = "loc"  # where a parameter of the request is wrong: it may lead to an input
_FIELDS = _STRUCTURE | _WORDS | _MESSAGES | _NAMES | _KEYS | _PRIVATE | {_LOCATION}
_PARAMETERS = {
    *("body", "header", "path", "query", "input_variables", "metadata", "callback_url"),
    *("workflow_label_name", "workflow_version_number", "return_all_outputs"),
    *("workflow_version_execution_id", "channel_name_suffix", "capability", "page", "per_page"),
}
_INPUT_TYPES = {"string", "integer", "number", "float", "boolean", "object", "array", "json"}


class Anonymizer:
    """Keeps the shape of bodies: documented fields, words of the server, ids and other numbers.

    A text becomes its kind and length, and a name an alias, the same one everywhere. Numbers in
    values become 0. Messages of the server stay, without what they quote, unless they contain a
    text that is known to be private: one that was given, or that was removed from a body.
    """

    def __init__(self, private: Iterable[str]) -> None:
        self._aliases: dict[str, str] = {}
        self._private = {text.casefold() for text in private if text.strip()}
        self._node_names: set[frozenset[str]] = set()
        self._bodies: dict[tuple[object, ...], str] = {}

    def restart(self) -> None:
        """Begin again, with all that is known by now to be private."""
        self._bodies.clear()

    def alias(self, name: str) -> str:
        """Return the alias of a name."""
        self._private.add(name.casefold())
        return self._aliases.setdefault(name, f"name {len(self._aliases) + 1}")

    def parameter(self, value: str) -> str:
        """Return the value of a query parameter, if it is a number or a flag."""
        return value if re.fullmatch(r"[0-9]+|true|false", value) else "..."

    def body(self, body: bytes, path: str, query: Mapping[str, str], status: int) -> str:
        """Return the body of a response, as JSON if it is JSON."""
        if not body.strip():
            return ""

        # Many polls of a run get the same body.
        is_bare = query.get("return_all_outputs") != "true"
        key = (body, path, is_bare, status)
        if key not in self._bodies:
            try:
                shaped = self._body(loads(body), path, status, is_bare=is_bare)
                self._bodies[key] = json.dumps(shaped) + "\n"
            except (ValueError, RecursionError):
                kind = "html" if b"<" in body[:200] else "text"
                self._bodies[key] = f"<{kind} {len(body)}>"
        return self._bodies[key]

    def _body(self, value: Any, path: str, status: int, *, is_bare: bool) -> Any:
        if path != "/workflow-version-execution-results" or status >= 300:
            return self._documented(value, "", depth=0 if isinstance(value, dict) else 1)
        if not is_bare:
            if _looks_like_nodes(value):
                return self._node_map(value)
            return self._documented(value, "", depth=1)  # without messages
        # A main output may merely look like nodes.
        if isinstance(value, dict) and frozenset(value) in self._node_names:
            return self._node_map(value)
        return self._value(value)

    def _node_map(self, nodes: dict[str, Any]) -> dict[str, Any]:
        self._node_names.add(frozenset(nodes))
        return {
            self.alias(name): self._documented(node, "", depth=1) for name, node in nodes.items()
        }

    def _documented(self, value: Any, field: str, depth: int = 0) -> Any:
        """Return a part of a documented body, which is in `field`.

        Only at depth 0 may there be messages. Deeper ones may be the user's.
        """
        if field in _PRIVATE:
            return self._value(value, field)
        if isinstance(value, list):
            if field == "detail" and depth == 1:  # FastAPI's list of invalid parameters
                depth = 0
            return [self._documented(item, field, depth) for item in value]
        if isinstance(value, str):
            return self._text(value, field, depth)
        if isinstance(value, dict):
            return self._object(value, field, depth)
        return value

    def _object(self, value: dict[str, Any], field: str, depth: int) -> dict[str, Any]:
        if field in _KEYS:
            return {self.alias(name): self._documented(it, field) for name, it in value.items()}
        if field == "output":
            return self._node_map(value) if _looks_like_nodes(value) else self._value(value)

        shaped = {}
        for name, inner in value.items():
            if name in _FIELDS:
                shaped[name] = self._documented(inner, name, depth + 1)
            else:
                shaped[self.alias(name)] = self._value(inner)
        return shaped

    def _value(self, value: Any, field: str = "") -> Any:
        """Return the shape of a value without its content."""
        if isinstance(value, dict):
            is_error = field.endswith("error_message")
            return {
                name if name == "raw" and is_error else self.alias(name): self._value(inner)
                for name, inner in value.items()
            }
        if isinstance(value, list):
            return [self._value(item) for item in value]
        if isinstance(value, str):
            return self._private_text(value)
        if type(value) in (int, float):
            return type(value)(0)
        return value

    def _text(self, text: str, field: str, depth: int) -> str:
        if self._is_word(text, field):
            return text
        if field in _NAMES or field == _LOCATION:
            return self.alias(text)
        if field not in _MESSAGES or depth > 1:
            return self._private_text(text)
        if self._is_indiscreet(text):
            return _removed(text)
        return re.sub(r"'[^']*'|\"[^\"]*\"|`[^`]*`|https?://\S+|\d+", "...", text)[:300]

    def _is_word(self, text: str, field: str) -> bool:
        """Return whether a text is a word of the server, and not of the user."""
        if field == "required_input_variables":
            return text in _INPUT_TYPES
        if field == _LOCATION:
            return text in _PARAMETERS and text.casefold() not in self._private
        return field in _WORDS and re.fullmatch("[A-Za-z_ -]{1,40}", text) is not None

    def _private_text(self, text: str) -> str:
        if text.strip():
            self._private.add(text.casefold())
        return _removed(text)

    def _is_indiscreet(self, message: str) -> bool:
        """Return whether a message contains a private text, or three words of one in a row."""
        message = message.casefold()
        quotes = set(_triples(message))
        for text in self._private:
            if text in message and (len(text) > 3 or re.search(rf"\b{re.escape(text)}\b", message)):
                return True
            if quotes and not quotes.isdisjoint(_triples(text)):
                return True
        return False


def _removed(text: str) -> str:
    return f"<text {len(text)}>"


def _triples(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return zip(words, words[1:], words[2:], strict=False)


def _looks_like_nodes(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(node, dict) and "status" in node for node in value.values())
    )
