"""What a check found, and the report that all findings make together."""

from __future__ import annotations

import enum
import json
import platform
import re
from collections import Counter
from collections.abc import Iterable

import attrs

from promptlayer_exec._values.errors import ConfigurationError
from promptlayer_exec._values.text import printable
from promptlayer_exec._version import __version__


class Verdict(enum.StrEnum):
    """The verdict of a check."""

    OK = "ok"
    DIFFERS = "differs"
    FAILED = "failed"
    SKIPPED = "skipped"


@attrs.frozen(kw_only=True)
class Finding:
    """What one check found.

    No text may contain the API key, an input, an output, or the name of a node or a workflow. So no
    text quotes the server.

    Args:
        verdict: how the check went.
        found: what the check found, or why it was skipped.
        expected: what this package expects. Only for `DIFFERS`.
        advice: what the user can do.
        place: the host, file or URL. The report for an issue omits it.
        group: the group of the check. `examine` sets it.
        name: the name of the check. `examine` sets it.
    """

    verdict: Verdict
    found: str
    expected: str = ""
    advice: str = ""
    place: str = ""
    group: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        """What the check found, beside what this package expects."""
        if self.expected:
            return f"expected {self.expected}; got {self.found}"
        return self.found


def ok(found: str, *, place: str = "", advice: str = "") -> Finding:
    return Finding(verdict=Verdict.OK, found=found, place=place, advice=advice)


def differs(expected: str, found: str, advice: str) -> Finding:
    return Finding(verdict=Verdict.DIFFERS, found=found, expected=expected, advice=advice)


def failed(found: str, advice: str, *, place: str = "") -> Finding:
    return Finding(verdict=Verdict.FAILED, found=found, advice=advice, place=place)


def skipped(why: str) -> Finding:
    return Finding(verdict=Verdict.SKIPPED, found=why)


@attrs.frozen
class Secrets:
    """What to remove from reports, in case a text contains it after all.

    Args:
        always: the API key, and the passwords in URLs.
        hosts: the user's own hosts, removed from reports for an issue.
    """

    always: tuple[str, ...] = attrs.field(repr=False)
    hosts: tuple[str, ...] = ()

    def removed(self, text: str, *, for_issue: bool = False) -> str:
        for secret in self.always:
            text = text.replace(secret, "***")
        if for_issue:
            for host in self.hosts:
                text = re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", "HOST", text)
        return printable(text)


def broken_rule(error: ConfigurationError) -> str:
    """Return which rule a setting breaks, without its value and without advice for programs."""
    return str(error.args[0])


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, such as `1 node` or `2 nodes`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def count_verdicts(findings: Iterable[Finding]) -> dict[Verdict, int]:
    """Return how many findings there are of each verdict, also if there is none."""
    counts = Counter(finding.verdict for finding in findings)
    return {verdict: counts[verdict] for verdict in Verdict}


def is_healthy(findings: Iterable[Finding]) -> bool:
    """Return True if no check failed, and none found a difference."""
    return not {Verdict.DIFFERS, Verdict.FAILED} & {finding.verdict for finding in findings}


def issue_report(findings: Iterable[Finding], secrets: Secrets) -> str:
    """Return the findings as JSON for an issue, without hosts, files and URLs."""
    findings = list(findings)
    checks = []
    for finding in findings:
        fields = {
            "group": finding.group,
            "check": finding.name,
            "verdict": finding.verdict,
            "expected": finding.expected,
            "found": finding.found,
            "advice": finding.advice,
        }
        checks.append(
            {
                name: secrets.removed(text, for_issue=True)
                for name, text in fields.items()
                if text or name == "found"
            }
        )

    return json.dumps(
        {
            "promptlayer_exec": __version__,
            "python": f"{platform.python_version()} ({platform.python_implementation()})",
            "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
            "counts": count_verdicts(findings),
            "checks": checks,
        },
        indent=2,
    )
