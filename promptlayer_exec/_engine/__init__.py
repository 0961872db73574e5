"""An open session in plain asyncio, without HTTP: its settings, watches, calls and starts.

Only `_push`, `_http` and `_session` import it; integrations get what they need from `_integration`.
"""
