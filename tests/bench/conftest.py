"""Fixtures of the benchmark's tests."""

from tests.bench.tiny import tiny

__all__ = ["tiny"]
