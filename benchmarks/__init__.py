"""What the library costs beside plain psycopg, by one run of both: `python -m benchmarks`."""
