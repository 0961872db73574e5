"""Structures outputs into your types, strictly, and encodes inputs as JSON.

`_values`, `_api` and `_session` import it. It imports its modules at first use, to keep importing
the package cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import cattrs

    from promptlayer_exec._structuring.fields import kinds_of
    from promptlayer_exec._structuring.inputs import encode_inputs, structure_inputs
    from promptlayer_exec._structuring.outputs import (
        check_type,
        structure_output,
        structure_outputs,
    )
else:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


_MODULES = {
    "check_type": "outputs",
    "encode_inputs": "inputs",
    "kinds_of": "fields",
    "structure_inputs": "inputs",
    "structure_output": "outputs",
    "structure_outputs": "outputs",
}
__all__ = [
    "check_type",
    "encode_inputs",
    "kinds_of",
    "strict_converter",
    "structure_inputs",
    "structure_output",
    "structure_outputs",
]


def strict_converter() -> cattrs.Converter:
    """Return a new cattrs converter with the strict rules that `into=` uses by default.

    Register your own hooks on it, and pass it as `Session(converter=...)`. As in cattrs, a later
    hook takes precedence over earlier ones. To change settings of the converter, use its `copy`
    method: `strict_converter().copy(forbid_extra_keys=True)`.
    """
    from promptlayer_exec._structuring import rules  # noqa: PLC0415

    return rules.strict_converter()
