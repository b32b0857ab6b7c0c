"""Tests; packages, so that each folder has a conftest of its own to import from."""
