"""Structuring outputs into the user's types, strictly, and encoding inputs as JSON."""

from promptlayer_exec._structuring._inputs import encode_inputs
from promptlayer_exec._structuring._outputs import check_type, structure, structure_output

__all__ = ["check_type", "encode_inputs", "structure", "structure_output"]
