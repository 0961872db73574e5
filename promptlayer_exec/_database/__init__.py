"""Connections to SQLite and PostgreSQL, retries and grouped writes.

It needs an extra, so the core never imports it: only `dbos`, `starts`, and who uses their tables.
"""
