"""Benchmarks: run as `python -m benchmarks.NAME` from the root of the repository; see docs/10-benchmarks.md."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its profiler reports on stderr whenever it starts and stops
