"""Tests of reads from replicas, on a primary and two standbys."""
