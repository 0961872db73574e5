"""Decoding JSON: what the standard library would return, in less time where msgspec is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

_decode_text = json.JSONDecoder().raw_decode


def _decode(body: bytes) -> Any:
    # The usual body: UTF-8, no BOM, no space before it. All else is left, by an error, to
    # `json.loads`, which looks for it for as long as it takes to read a small body.
    text = body.decode()
    value, end = _decode_text(text)
    if text[end:].strip(" \t\n\r"):
        raise ValueError
    return value


try:
    import msgspec
except ImportError:
    _quick_loads: Callable[[bytes], Any] = _decode
else:
    _quick_loads = msgspec.json.Decoder().decode


def loads(body: bytes) -> Any:
    """Do what `json.loads` does.

    Raises:
        ValueError: it is no JSON, or has a number too long to be read.
        RecursionError: it is nested too deep.
    """
    try:
        return _quick_loads(body)
    except Exception:  # noqa: BLE001 - whatever it was, the standard library tells it in its own way
        return json.loads(body)
