"""Connections, transactions and the pool for asyncio."""
