"""Keeping the API key, and the passwords in URLs, out of every text that is shown."""

from __future__ import annotations

import json
import re
from copy import copy

# A shorter key is a test's, and may be a word of ordinary messages.
_LEAST_LENGTH = 6
_NOTHING = "(?!)"

# The user and the password in a URL, such as that of a proxy.
CREDENTIALS = re.compile(r"(?<=//)[^/\s@]*@")


class Redactor:
    """Redacts a secret, unless it has fewer than 6 characters."""

    def __init__(self, text: str) -> None:
        # Encoded, a character that is not ASCII has several bytes, or the one of Latin-1.
        encoded = text.encode("utf-8", "surrogatepass").decode("latin-1")
        spellings = {"".join(map(_spellings, each)) for each in (text, encoded)}
        pattern = "|".join(spellings) if len(text) >= _LEAST_LENGTH else _NOTHING
        self._pattern = re.compile(pattern)
        self._other: str | None = None

    def also(self, other: str | None) -> Redactor:
        """Return a redactor that also redacts `other`, which JSON need not escape."""
        if other is None:
            return self
        both = copy(self)
        both._other = other
        return both

    def redact(self, text: str) -> str:
        """Return `text` with `***` in place of the secret, however JSON or Python spells it."""
        text = self._pattern.sub("***", text)
        return text if self._other is None else text.replace(self._other, "***")

    def redact_bytes(self, text: bytes) -> bytes:
        """Return `text`, in any superset of ASCII, with `***` in place of the secret."""
        return self.redact(text.decode("latin-1")).encode("latin-1")

    def redact_body(self, body: bytes) -> bytes:
        """Return a body that may be JSON, in one of its encodings, with `***` for the secret."""
        body = self.redact_bytes(body)
        encoding = json.detect_encoding(body)  # of the first bytes, which may mislead
        if encoding.startswith("utf-8"):
            return body
        text = body.decode(encoding, "replace")
        clean = self.redact(text)
        return body if clean == text else clean.encode()

    def redact_start(self, body: bytes, size: int) -> bytes:
        """Return the first `size` bytes of a body, or fewer, redacted, and no part of a cut secret.

        Of a longer body, at least the length of the secret beyond `size` must be given.
        """
        clean = self.redact_body(body)
        surplus = max(len(body) - size, 0)
        return clean[: max(len(clean) - surplus, 0)]

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


def _spellings(character: str) -> str:
    """Return a pattern for a character: itself, or escaped as JSON or Python may do it."""
    units = character.encode("utf-16-be", "surrogatepass").hex()
    escaped = "".join(rf"\\u{units[n : n + 4]}" for n in range(0, len(units), 4))
    spellings = [re.escape(character), f"(?i:{escaped})"]
    if ord(character) < 0x100:
        spellings.append(rf"(?i:\\x{ord(character):02x})")
    if character in "\"'\\/":
        spellings.append(r"\\" + re.escape(character))
    return f"(?:{'|'.join(spellings)})"
