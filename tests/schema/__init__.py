"""Tests of taking over the databases that the earlier Go service made and still writes to."""
