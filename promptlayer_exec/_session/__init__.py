"""What a caller calls: a session, the handle of an execution, fan-outs and combined streams.

The public API and `_integration` import it, and nothing below them.
"""
