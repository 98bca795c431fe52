"""How much of everything: the reproduction's numbers, in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vispco.profiling.measure import AUTO

METHODS = ("fastv", "sparsevlm", "fitprune", "pdrop")
#: Methods for pictures that "auto" does not try.
OTHERS = (
    "dart",
    "fitprune",
    "hiprune",
    "holov",
    "ivcprune",
    "pact",
    "prumerge",
    "vscan",
)
_ALL_METHODS = ("auto", "random", *AUTO, *OTHERS)
KERNELS = ("single_layer", "p_sigmoid", "linear", "exponential", "multi_step", "monotone")
TENTHS = tuple(i / 10 for i in range(1, 10))
TWENTIETHS = tuple(i / 20 for i in range(1, 20))
FIVE, PAIR = (0.1, 0.3, 0.5, 0.7, 0.9), (0.3, 0.6)
_ALL = tuple(
    (testbed, method) for testbed in ("testbed-llava", "testbed-qwen") for method in METHODS
)
_THREE = (("testbed-llava", "fastv"), ("testbed-llava", "sparsevlm"), ("testbed-qwen", "fastv"))


@dataclass(frozen=True)
class Setting:
    """What one (testbed, method) pair is given: budgets, seeds of the searches, random schedules
    per budget (`pool`), how many of them answer the held-out questions too (`held_out`), keep
    ratios per layer of the grid, seeds of the rivals (NSGA-II, TPE, greedy) and of the searches by
    kernel."""

    testbed: str
    method: str
    budgets: tuple[float, ...]
    seeds: int
    pool: int
    held_out: int
    grid_ratios: int
    rivals: int
    kernel_seeds: int


@dataclass(frozen=True)
class Winner:
    """What the race of the methods is given on one testbed: methods, budgets, seeds, calibration
    questions, held-out questions, questions in a batch, refinement a budget, and whether smaller
    pictures take part."""

    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    seeds: int
    questions: int = 96
    test: int = 320
    batch: int = 16
    refinement: int = 4
    smaller: bool = True


@dataclass(frozen=True)
class Size:
    """A size of the whole reproduction.

    calibration, test: questions. settings: the pairs of testbed and method. percentile_pool: how
    many schedules of a pool the percentile is taken of. winners: the races of methods, by testbed.
    frontier_budgets: where the cheap frontier
    is asked. depth_*, kernel_*, transfer_*, convergence_*, estimator_*: of those claims.
    """

    name: str
    settings: tuple[Setting, ...]
    winners: dict[str, Winner]
    calibration: int = 96
    test: int = 192
    batch: int = 8
    percentile_pool: int = 500
    frontier_budgets: tuple[float, ...] = (0.15, *TENTHS)
    depth_factors: tuple[int, ...] = (1, 2, 3, 4)
    depth_budgets: tuple[float, ...] = (0.4,)
    depth_questions: int = 64
    depth_pool: int = 60
    depth_seeds: int = 2
    depth_also: tuple[float, ...] = FIVE
    kernel_steps: int = 20
    transfer_budget: float = 0.4
    transfer_tasks: int = 8
    transfer_methods: int = 4
    transfer_questions: int = 64
    transfer_testbeds: int = 2
    convergence_steps: int = 20
    convergence_budgets: tuple[float, ...] = (0.15, 0.5, 0.9)
    convergence_pairs: tuple[tuple[str, str], ...] = _THREE
    convergence_kernels: tuple[str, ...] = KERNELS
    convergence_questions: int = 32
    estimator_questions: int = 16
    estimator_steps: int = 2
    estimator_seeds: int = 0


def _settings(
    llava: tuple, qwen: tuple, llava_rest: tuple | None, qwen_rest: tuple | None
) -> tuple[Setting, ...]:
    """FastV as given first, the three other methods as given last."""
    rest = (("testbed-llava", llava_rest), ("testbed-qwen", qwen_rest))
    return (
        Setting("testbed-llava", "fastv", *llava),
        Setting("testbed-qwen", "fastv", *qwen),
        *(
            Setting(testbed, name, *given)
            for testbed, given in rest
            if given
            for name in METHODS[1:]
        ),
    )


def _winners(seeds: int, deep: Winner) -> dict[str, Winner]:
    """All methods for pictures on the small testbeds, fewer on the deep one."""
    small = Winner(_ALL_METHODS, (0.2, 0.35, 0.5, 0.7), seeds)
    return {"testbed-llava": small, "testbed-qwen": small, "testbed-smollm": deep}


_DEEP = Winner(
    ("auto", "random", *METHODS[:2], "pdrop", "visionzip"), (0.12, 0.2, 0.3, 0.5, 0.7), 3
)
_HOUR: dict[str, Any] = {
    "depth_factors": (1, 2, 4),
    "depth_pool": 40,
    "depth_questions": 48,
    "convergence_questions": 16,
    "transfer_questions": 48,
    "transfer_testbeds": 1,
}
_FULL = (TENTHS, 5, 640, 50, 20, 5, 5)
SIZES = {
    "smoke": Size(
        "smoke",
        (Setting("testbed-llava", "fastv", (0.5,), 1, 6, 3, 2, 1, 1),),
        {"testbed-llava": Winner(("auto", "fastv"), (0.5,), 1, 8, 8, 8, 0)},
        calibration=16,
        test=16,
        frontier_budgets=(0.3, 0.6),
        depth_factors=(1, 2),
        depth_budgets=(0.5,),
        depth_questions=8,
        depth_pool=4,
        depth_seeds=1,
        depth_also=(),
        kernel_steps=2,
        transfer_tasks=2,
        transfer_methods=2,
        transfer_questions=4,
        convergence_steps=2,
        convergence_budgets=(0.5,),
        convergence_pairs=_THREE[:1],
        convergence_kernels=("monotone",),
        convergence_questions=8,
        estimator_questions=0,
    ),
    "quick": Size(
        "quick",
        _settings(
            (TENTHS, 1, 40, 8, 10, 1, 1),
            (FIVE, 1, 30, 8, 5, 1, 1),
            (PAIR, 1, 20, 6, 3, 1, 0),
            None,
        ),
        _winners(1, Winner(("auto", "fastv"), (0.2, 0.3, 0.5), 1, 48, 192)),
        calibration=80,
        test=160,
        **_HOUR,
    ),
    "deep": Size(
        "deep",
        (),
        {"testbed-smollm": Winner(_ALL_METHODS, (0.12, 0.2, 0.3, 0.5), 1, 48, 192)},
        **_HOUR,
    ),
    "standard": Size(
        "standard",
        _settings(
            (TENTHS, 3, 160, 20, 20, 1, 3),
            (FIVE, 3, 160, 20, 10, 1, 3),
            (PAIR, 3, 160, 20, 10, 1, 0),
            None,
        ),
        _winners(3, _DEEP),
        **{**_HOUR, "depth_seeds": 3, "transfer_testbeds": 2},
        convergence_pairs=_ALL,
        estimator_questions=64,
        estimator_seeds=3,
    ),
    "full": Size(
        "full",
        _settings(_FULL, _FULL, _FULL, _FULL),
        _winners(5, replace(_DEEP, seeds=5)),
        calibration=128,
        test=512,
        frontier_budgets=TWENTIETHS,
        depth_budgets=(0.2, 0.35, 0.5, 0.7),
        depth_questions=128,
        depth_pool=640,
        depth_seeds=5,
        transfer_questions=128,
        convergence_budgets=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
        convergence_pairs=_ALL,
        convergence_questions=64,
        estimator_questions=128,
        estimator_steps=8,
        estimator_seeds=5,
    ),
}
