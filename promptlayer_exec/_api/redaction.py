"""Keeps the API key and the passwords in URLs out of every message and log line."""

from __future__ import annotations

import re

import attrs

# The user and the password in a URL, for example of a proxy, or in a quoted part of one.
CREDENTIALS = re.compile(r"(?<=[/'])[^/\s@']*@")


@attrs.frozen
class Redactor:
    """Replaces secrets with `***`, unless they have fewer than 6 characters."""

    _secrets: tuple[str, ...] = attrs.field(repr=False)

    def also(self, secret: str | None) -> Redactor:
        """Return a redactor that replaces one more secret."""
        if secret is None:
            return self
        return Redactor((*self._secrets, secret))

    def redact(self, text: str) -> str:
        for secret in self._secrets:
            # A shorter one comes from a test, and may be a word in ordinary messages.
            if len(secret) >= 6:
                text = text.replace(secret, "***")
        return text

    def redact_bytes(self, text: bytes) -> bytes:
        """Return `text`, in any superset of ASCII, without the secrets."""
        return self.redact(text.decode("latin-1")).encode("latin-1")
