"""Structuring outputs into the user's types, strictly, and encoding inputs as JSON.

Its modules are imported at the first use, so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import cattrs

    from promptlayer_exec._structuring._inputs import encode_inputs
    from promptlayer_exec._structuring._outputs import check_type, structure_output
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = "_inputs" if name == "encode_inputs" else "_outputs"
        return getattr(import_module(f"{__name__}.{module}"), name)


__all__ = ["check_type", "encode_inputs", "strict_converter", "structure_output"]


def strict_converter() -> cattrs.Converter:
    """Return a new cattrs converter with the strict rules that `into=` has by default.

    Register hooks of your own on it, and pass it as `Session(converter=...)`. As in cattrs, a
    hook takes precedence over what was registered before. For other settings of the converter,
    use its `copy` method: `strict_converter().copy(forbid_extra_keys=True)`.
    """
    from promptlayer_exec._structuring import _rules  # noqa: PLC0415

    return _rules.strict_converter()
