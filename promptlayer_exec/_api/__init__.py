"""Requests to the server and its responses, as plain data without I/O."""
