"""Executions in a FastAPI app: progress as Server-Sent Events, and errors as problem+json."""

from promptlayer_exec._integration import install_hint

try:
    from promptlayer_exec.fastapi._receivers import create_callback_router, create_webhook_router
    from promptlayer_exec.fastapi._responses import add_error_handlers
    from promptlayer_exec.fastapi._router import create_router
    from promptlayer_exec.fastapi._run_events import execution_events
    from promptlayer_exec.fastapi._tickets import Tickets
except ModuleNotFoundError as error:
    error.add_note(f"this needs {install_hint('fastapi')}")
    raise

__all__ = [
    "Tickets",
    "add_error_handlers",
    "create_callback_router",
    "create_router",
    "create_webhook_router",
    "execution_events",
]
