"""What batches and the record of starts share about their database: SQLite or PostgreSQL.

It needs an extra, so the core never imports it.
"""
