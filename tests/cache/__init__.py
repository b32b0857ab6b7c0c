"""Tests of reading through a cache in Redis."""
