"""Keeping the API key, and the passwords in URLs, out of every text that is shown."""

from __future__ import annotations

import re

import attrs

# A shorter secret is a test's, and may be a word of ordinary messages.
_LEAST_LENGTH = 6

# The user and the password in a URL, such as that of a proxy, or in the quoted part of one.
CREDENTIALS = re.compile(r"(?<=[/'])[^/\s@']*@")


@attrs.frozen
class Redactor:
    """Replaces secrets by `***`, except for those of fewer than 6 characters."""

    _secrets: tuple[str, ...] = attrs.field(repr=False)

    def also(self, secret: str | None) -> Redactor:
        return self if secret is None else Redactor((*self._secrets, secret))

    def redact(self, text: str) -> str:
        for secret in self._secrets:
            if len(secret) >= _LEAST_LENGTH:
                text = text.replace(secret, "***")
        return text

    def redact_bytes(self, text: bytes) -> bytes:
        """Return `text`, in any superset of ASCII, without the secrets."""
        return self.redact(text.decode("latin-1")).encode("latin-1")
