"""Executions in a FastAPI app: progress as Server-Sent Events, and errors as problem+json."""

try:
    from promptlayer_exec.fastapi._events import execution_events
    from promptlayer_exec.fastapi._responses import add_error_handlers
    from promptlayer_exec.fastapi._router import create_router
except ModuleNotFoundError as error:
    error.add_note("this needs an extra: pip install 'promptlayer-exec[fastapi]'")
    raise

__all__ = ["add_error_handlers", "create_router", "execution_events"]
