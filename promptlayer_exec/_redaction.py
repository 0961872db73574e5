"""The API key, and how it is kept out of all that is shown."""

from __future__ import annotations

import json

# A shorter key is no secret but a test's, and as a word it may stand in any message.
_LEAST_LENGTH = 6


class Redactor:
    """Finds a text that must not be shown, and redacts it.

    Args:
        text: the secret.
    """

    def __init__(self, text: str) -> None:
        in_json = json.dumps(text)[1:-1]
        spellings = {text, in_json, in_json.replace("/", "\\/")}
        self._spellings = spellings if len(text) >= _LEAST_LENGTH else set()

    def redact(self, text: str) -> str:
        """Return a text in which `***` stands wherever the secret stood."""
        for spelling in self._spellings:
            text = text.replace(spelling, "***")
        return text

    def redact_bytes(self, text: bytes) -> bytes:
        """Do the same for bytes in any superset of ASCII."""
        return self.redact(text.decode("latin-1")).encode("latin-1")

    def redact_json(self, body: bytes) -> bytes:
        """Do the same for a body that may be JSON, in which the secret has many spellings."""
        try:
            plain = json.dumps(json.loads(body), ensure_ascii=False)
        except (ValueError, RecursionError):
            return self.redact_bytes(body)
        clean = self.redact(plain)
        return self.redact_bytes(body) if clean == plain else clean.encode("utf-8", "surrogatepass")

    def is_shown_by(self, error: BaseException | None) -> bool:
        """Tell whether an error, or one that it hangs on, would show the secret."""
        if error is None:
            return False
        shown = f"{error!r} {error} {vars(error)}"
        return (
            self.redact(shown) != shown
            or self.is_shown_by(error.__cause__)
            or self.is_shown_by(error.__context__)
        )
