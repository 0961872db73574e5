"""What the log says of outages: a line when one begins, and a line when it is over."""

from __future__ import annotations

import math

from promptlayer_exec._errors import RequestError
from promptlayer_exec._events import logger
from promptlayer_exec._policies import Outage


class Outages:
    """The outages of a session's requests: to the log they are one, however many requests fail.

    So there are never more lines than one outage after the other has: a request that failed is not
    sent again before its delay has passed, and until then the outage lasts.
    """

    def __init__(self) -> None:
        self._present: set[Outage] = set()
        self._answered = False

    def begin(self, error: RequestError, outage: Outage) -> None:
        """Take note that a request failed and will be repeated."""
        if not self._present:
            self._answered = False
            limit = "" if outage.limit == math.inf else f" for up to {outage.limit:g} s"
            # Not the whole error: that shows how the body begins, and says what to do at its end.
            what = str(error.args[0]).encode("utf-8", "backslashreplace").decode()
            logger.warning("%s: %s; trying again%s", _whose(error), what, limit)
        self._present.add(outage)

    def end(self, outage: Outage, *, answered: bool) -> None:
        """Take note that a request is not repeated any more: it was answered, or given up."""
        if outage not in self._present:
            return
        self._present.remove(outage)
        self._answered |= answered
        if self._answered and not self._present:
            logger.info("the server answers again")


def _whose(error: RequestError) -> str:
    return "a start" if error.execution_id is None else f"execution {error.execution_id}"
