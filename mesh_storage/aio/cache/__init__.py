"""Reading through a cache in Redis; docs/caching.md says what it promises and why that holds."""
