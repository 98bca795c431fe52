"""Benchmarks: run `python -m benchmarks.NAME` from the root of the repository.

See docs/10-benchmarks.md.
"""

import os

# PyTorch's profiler would report on stderr whenever it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
