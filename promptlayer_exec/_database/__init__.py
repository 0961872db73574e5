"""The database of batches and of the start store: SQLite or PostgreSQL.

It needs an extra, so the core never imports it.
"""
