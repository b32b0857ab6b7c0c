"""Connections to PostgreSQL: engine, pool, transactions, statements and type adaptation."""
