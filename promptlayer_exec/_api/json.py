"""Decoding JSON as the standard library does.

With or without msgspec, `loads(body)` returns what `json.loads` returns and raises the same errors:
`ValueError` for a body that is not JSON or has a number with too many digits, `RecursionError` for
one with too many levels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

try:
    import msgspec
except ImportError:
    loads: Callable[[bytes], Any] = json.loads
else:
    _decode = msgspec.json.Decoder().decode

    def _loads(body: bytes) -> Any:
        try:
            return _decode(body)
        except Exception:  # noqa: BLE001 - NaN, for one, is JSON to the standard library alone
            return json.loads(body)

    loads = _loads
