"""The inputs of a run in short, for its line."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

_MOST = 12  # inputs of a run
_LONGEST = 80  # characters of each


@lru_cache(maxsize=1024)  # every change of a run on the page shows the same inputs again
def brief_inputs(inputs: str | None) -> dict[str, str] | None:
    """Return the beginning of each input as text, or None if the inputs are not known.

    Args:
        inputs: a JSON object.
    """
    if inputs is None:
        return None
    try:
        known = json.loads(inputs)
    except (ValueError, RecursionError):
        return None
    if not isinstance(known, dict):
        return None
    return {str(name): brief(value) for name, value in [*known.items()][:_MOST]}


def brief(value: Any) -> str:
    """Return the beginning of a value on one line, a string without quotes."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text[: 2 * _LONGEST].split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
