"""Claim 5: what a configuration is worth on other tasks, and in the hands of another method."""

from __future__ import annotations

from vispco.testbed import TASKS

from ..benchmark import Benchmark
from ..cache import Cache
from ..measure import Questions
from ..searches import predictor
from ..sizes import METHODS, Size
from .base import MEASURED, Piece

TITLE = "Transfer between tasks and between methods"
TARGET = (
    "Both matrices measured: a configuration found on the mixture of tasks or on one task, "
    "evaluated on each of the eight "
    "tasks; one found with one method, used by another. No threshold is set."
)
MIXTURE = "mixture"


def pieces(size: Size) -> list[Piece]:
    """One per testbed and matrix."""
    per = 17 * size.calibration
    n, m = size.transfer_tasks, size.transfer_methods
    tasks, methods = (
        (n + 1) * per + (n + 2) * n * size.transfer_questions,
        m * per + m * m * size.test,
    )
    return [
        Piece({"testbed": name, "matrix": matrix}, passes, name)
        for name in list(dict.fromkeys(s.testbed for s in size.settings))[: size.transfer_testbeds]
        for matrix, passes in (("tasks", tasks), ("methods", methods))
    ]


def run(cache: Cache, size: Size, testbed: str, matrix: str) -> dict:
    """One matrix on one testbed."""
    return {
        "testbed": testbed,
        "matrix": matrix,
        "budget": size.transfer_budget,
        **(_tasks if matrix == "tasks" else _methods)(cache, size, testbed),
    }


def _tasks(cache: Cache, size: Size, testbed: str) -> dict:
    """Rows: where it was found; columns: where it is used. FastV."""
    asked: dict[str, Questions] = {}
    rows, tasks = {}, TASKS[: size.transfer_tasks]
    for source in (MIXTURE, *tasks):
        benchmark = Benchmark(
            testbed,
            "fastv",
            cache,
            calibration=size.calibration,
            batch=size.batch,
            tasks=None if source == MIXTURE else [source],
        )
        asked = asked or {
            task: benchmark.questions("test", size.transfer_questions, tasks=[task])
            for task in tasks
        }
        config = predictor(benchmark, [size.transfer_budget], 0, size.batch).configs[
            size.transfer_budget
        ]
        rows[source] = {
            "tokens": config.tokens(benchmark.tokens),
            "accuracy": [benchmark.answers(config, asked[task]).accuracy for task in tasks],
        }
    full = [benchmark.answers(None, asked[task]).accuracy for task in tasks]
    return {"columns": list(tasks), "rows": rows, "full": full, "n_test": size.transfer_questions}


def _methods(cache: Cache, size: Size, testbed: str) -> dict:
    """Rows: the method of the search; columns: the method that ranks the tokens afterwards."""
    benchmarks = {
        m: Benchmark(
            testbed, m, cache, calibration=size.calibration, test=size.test, batch=size.batch
        )
        for m in METHODS[: size.transfer_methods]
    }
    rows = {}
    for source, benchmark in benchmarks.items():
        config = predictor(benchmark, [size.transfer_budget], 0, size.batch).configs[
            size.transfer_budget
        ]
        first = {m: a.first_layer for m, a in benchmarks.items()}
        moved = {
            m: a.config([1.0] * first[m] + list(config.keep_ratios[first[m] :]))
            for m, a in benchmarks.items()
        }
        rows[source] = {
            "tokens": config.tokens(benchmark.tokens),
            "kl": [benchmarks[m].kl(c) for m, c in moved.items()],
            "accuracy": [benchmarks[m].accuracy(c) for m, c in moved.items()],
            "share": [benchmarks[m].share(c) for m, c in moved.items()],
        }
    return {"columns": list(benchmarks), "rows": rows, "n_test": size.test}


def conclude(rows: list[dict], size: Size) -> dict:
    """What moving costs, in points of accuracy."""
    words = []
    for row in rows:
        places = {name: i for i, name in enumerate(row["columns"])}
        own = [row["rows"][name]["accuracy"][i] for name, i in places.items()]
        others = [
            a - own[i]
            for name, one in row["rows"].items()
            for i, a in enumerate(one["accuracy"])
            if name != MIXTURE and places[name] != i
        ]
        change = 100 * sum(others) / len(others)
        text = f"{row['testbed']}, between {row['matrix']}: {change:+.1f} points on average"
        if MIXTURE in row["rows"]:
            loss = [a - b for a, b in zip(row["rows"][MIXTURE]["accuracy"], own, strict=True)]
            text += f" (found on the mixture: {100 * sum(loss) / len(loss):+.1f})"
        words.append(text)
    return {
        "seeds": [1],
        "verdict": MEASURED,
        "rows": rows,
        "measured": "moved instead of found there, " + "; ".join(words),
    }
