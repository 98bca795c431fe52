"""What every claim is made of: independent pieces of work, and a conclusion from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..benchmark import Benchmark
from ..cache import Cache
from ..sizes import Setting, Size
from ..stats import summary

MET, MISSED, NOT_TESTABLE = "met", "missed", "not testable"
MEASURED = "measured"  # where no threshold is set
SECONDS = {
    "testbed-llava": 0.005,
    "testbed-qwen": 0.0085,
    "testbed-smollm": 0.07,
}  # of one forward pass of one question, on one core


@dataclass(frozen=True)
class Piece:
    """A job: JSON-ready arguments of the claim's `run`, and about how many passes it takes."""

    args: dict[str, Any] = field(default_factory=dict)
    passes: int = 0
    testbed: str = "testbed-llava"
    depth: int = 1

    @property
    def seconds(self) -> float:
        """On one core, roughly."""
        return self.passes * SECONDS[self.testbed] * self.depth


def benchmark_of(setting: Setting, cache: Cache, size: Size, **options) -> Benchmark:
    """The benchmark of one setting at one size."""
    options = {"calibration": size.calibration, "test": size.test, "batch": size.batch, **options}
    return Benchmark(setting.testbed, setting.method, cache, **options)


def setting_of(size: Size, testbed: str, method: str) -> Setting:
    """The size's setting for a pair."""
    return next(s for s in size.settings if (s.testbed, s.method) == (testbed, method))


def named(setting: Setting) -> dict[str, str]:
    """A setting as arguments of `run`."""
    return {"testbed": setting.testbed, "method": setting.method}


def all_met(outcomes: Iterable[str]) -> str:
    """met if every outcome is, missed if one is; outcomes that are not testable do not count,
    unless there is no other.
    """
    seen = set(outcomes) - {NOT_TESTABLE}
    return NOT_TESTABLE if not seen else MISSED if MISSED in seen else MET


def met(condition: bool) -> str:
    """A condition as a verdict."""
    return MET if condition else MISSED


def spread(values: Sequence[float], digits: int = 3) -> str:
    """`0.123 ± 0.004`, or without the spread for one value.

    >>> spread([1.0, 2.0], 1), spread([1.0], 2)
    ('1.5 ± 0.7', '1.00')
    """
    s = summary(values)
    return f"{s['mean']:.{digits}f}" + (f" ± {s['std']:.{digits}f}" if len(values) > 1 else "")
