"""The cost of the library compared with plain psycopg, measured in the same run: `python -m benchmarks`."""
