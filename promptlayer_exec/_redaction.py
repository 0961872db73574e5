"""Keeping the API key out of every text that is shown."""

from __future__ import annotations

import json

# A shorter key is a test's, and may be a word of ordinary messages.
_LEAST_LENGTH = 6


class Redactor:
    """Redacts a secret, unless it has fewer than 6 characters."""

    def __init__(self, text: str) -> None:
        in_json = json.dumps(text)[1:-1]
        quoted = repr(text)[1:-1], repr(text.encode())[2:-1]  # as parsers' errors quote it
        spellings = {text, in_json, in_json.replace("/", "\\/"), *quoted}
        self._spellings = spellings if len(text) >= _LEAST_LENGTH else set()

    def redact(self, text: str) -> str:
        """Return `text` with `***` in place of the secret."""
        for spelling in self._spellings:
            text = text.replace(spelling, "***")
        return text

    def redact_bytes(self, text: bytes) -> bytes:
        """Return `text`, in any superset of ASCII, with `***` in place of the secret."""
        return self.redact(text.decode("latin-1")).encode("latin-1")

    def redact_json(self, body: bytes) -> bytes:
        """Return a body with `***` in place of the secret, whichever way JSON spells it.

        A body that is not JSON is redacted as text.
        """
        try:
            plain = json.dumps(json.loads(body), ensure_ascii=False)
        except (ValueError, RecursionError):
            return self.redact_bytes(body)
        clean = self.redact(plain)
        return self.redact_bytes(body) if clean == plain else clean.encode("utf-8", "surrogatepass")

    def is_shown_by(self, error: BaseException | None) -> bool:
        """Return True if the error, its attributes, its cause or its context show the secret."""
        if error is None:
            return False
        shown = f"{error!r} {error} {vars(error)}"
        return (
            self.redact(shown) != shown
            or self.is_shown_by(error.__cause__)
            or self.is_shown_by(error.__context__)
        )
