"""Requests to PromptLayer and its responses, as plain data without I/O.

Only `webhooks`, and the layers of an open session, import it.
"""
