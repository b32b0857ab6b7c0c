"""Tests of the examples, which are run as programs of their own."""
