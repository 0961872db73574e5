"""Workflows as tools for agents, over the Model Context Protocol (extra `mcp`)."""

from promptlayer_exec._integration import install_hint

try:
    from promptlayer_exec.mcp._mcp_http import serve_http
    from promptlayer_exec.mcp._mcp_server import create_server, serve_stdio
except ModuleNotFoundError as error:
    error.add_note(f"this needs {install_hint('mcp')}")
    raise

__all__ = ["create_server", "serve_http", "serve_stdio"]
