"""What failures have in common: a reason without what differs from run to run.

Internal. Ten runs that fail for one reason are one thing to look at. Two reasons in one group would
hide one of them. So what may be a part of the program stays: names of keys and arguments, the host
of an address, and the status of a response.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Stands in for a reason, of single runs and of items alike, because it is part of the cause.
NO_REASON = "the server gave no reason"

_GONE = "…"  # stands for what was taken out
_LONGEST = 300

_DATE = r"\d{4}-\d\d-\d\d"
_TIME = r"\d\d:\d\d(?::\d\d(?:[.,]\d+)?)?(?:Z|[+-]\d\d:?\d\d)?"
_QUOTED = "|".join(rf"{mark}[^{mark}\n]+{mark}" for mark in "'\"`")
# After one of these words, a quoted text is a name in the program.
_BEFORE_NAME = "KeyError:|argument|attribute|column|field|function|key|method|module|name|property"
# After one of these, 400 to 599 is the status of a response.
_BEFORE_STATUS = r"\bHTTP[ /]|\b[Ss]tatus:? |\b[Cc]ode:? |\b[Ee]rror:? |\breturned |: |\(|^"
_STATUS = rf"(?:{_BEFORE_STATUS})[45]\d\d\b(?![.,:]?\d)"
# Such as `utf8`: the digits are the end of a name.
_NAME = r"(?<![\w.-])[A-Za-z]+\d{1,3}(?![\w-]|\.\w)"

# One after the other: a URL may contain a date, and a date consists of numbers. The group stays.
_DIFFERING = [
    re.compile(pattern)
    for pattern in (
        r"(\b\w+://[^\s/'\"),;]+/)[^\s'\"),;]+",  # the path of a URL
        r"()\b[\w.+-]+@[\w-]+\.[\w.-]*\w",  # the address of a mailbox
        rf"()\b{_DATE}(?:[T ]{_TIME})?",
        rf"((?:\b(?:{_BEFORE_NAME}) (?:'[\w.]+'|\"[\w.]+\"))?)(?<!\w)(?:(?:{_QUOTED})(?!\w))?",
        r"()(?<![\w/:.])(?:[A-Za-z]:\\|~?/)[\w.@-]+(?:[/\\][\w.@-]+)+",  # a path
        rf"({_STATUS}|{_NAME})|[$€£]?[\w-]*\d(?:[\w.,:-]*[\w%])?",  # a number, or a word with one
    )
]
_SEVERAL = re.compile(rf"(?:{_GONE}[\s,;]+)+(?={_GONE})")


def common_reason(reason: str) -> str:
    """Return a reason on one line, with an ellipsis for everything that differs between runs.

    Of a traceback, it is the last line.
    """
    lines = [line for line in reason.splitlines() if line.strip()]
    if lines and lines[0].startswith("Traceback "):
        reason = lines[-1]

    text = " ".join(reason.split())[:2000]
    for differing in _DIFFERING:
        text = differing.sub(_without, text)
    text = _SEVERAL.sub("", text)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + _GONE


def stored_cause(kind: str, problem: str, data: Mapping[str, Any]) -> str:
    """Return what an error that a database stored has in common with others.

    Args:
        kind: the name of its class.
        problem: what happened.
        data: its attributes.
    """
    for node in data.get("failed", ())[:1]:
        return f"{node['name']}: {common_reason(node['reason'] or NO_REASON)}"
    return common_reason(data.get("reason") or problem or kind)


def _without(match: re.Match[str]) -> str:
    kept = match[1] or ""
    return kept if kept == match[0] else kept + _GONE
