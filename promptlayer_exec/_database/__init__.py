"""The database of batches and of the record of starts: SQLite or PostgreSQL.

It needs an extra, so the core never imports it.
"""
