"""Benchmarks: run as `python -m benchmarks.NAME` from the root of the repository; see docs/10-benchmarks.md."""
