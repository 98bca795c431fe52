"""Claim 9: which method wins where, and what choosing it per layer is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vispco.config import PruningConfig

from ..benchmark import Benchmark
from ..cache import Cache
from ..searches import by_methods
from ..sizes import Size, Winner
from ..stats import summary, volume
from .base import NOT_TESTABLE, Piece, all_met, met

TITLE = "Which method wins where"
#: `auto` against the best single method in hindsight, and against FastV searched as long.
BEST, FASTV = 0.98, {"testbed-llava": 1.15, "testbed-qwen": 1.05, "testbed-smollm": 1.15}
TARGET = (
    "One search over all methods (method='auto') has a hypervolume on held-out accuracy of at "
    f"least {BEST} times that of the best single method, which is chosen in hindsight, and at "
    "least " + ", ".join(f"{least} times ({name})" for name, least in FASTV.items()) + " that of "
    "FastV. All are searched with start='profile', and with as many measurements a budget."
)
AUTO_ALONE, RIVAL = "auto", "fastv"
#: Passes of a profile, about; and those of all methods over those of one.
PROFILE = {"testbed-llava": 800, "testbed-qwen": 1700, "testbed-smollm": 2600}
PORTFOLIO = 2.5
#: Sides of smaller pictures, as shares of the whole ones.
SCALES = 0.875, 0.75, 0.625, 0.5, 0.375, 0.25


def pieces(size: Size) -> list[Piece]:
    """One per testbed and method, and one per testbed for the smaller pictures."""
    found = []
    for name, own in size.winners.items():
        search = len(own.budgets) * (own.refinement + 2) * own.questions
        for method in own.methods:
            # Several methods: a profile of all, and one more search with the one best alone.
            profiles, searches = (PORTFOLIO + 1, 2) if method == AUTO_ALONE else (1, 1)
            each = PROFILE[name] * profiles + search * searches + len(own.budgets) * own.test
            passes = int(own.seeds * each)
            found.append(Piece({"testbed": name, "method": method}, passes, name))
        if own.smaller:
            found.append(Piece({"testbed": name, "method": None}, len(SCALES) * own.test, name))
    return found


def run(cache: Cache, size: Size, testbed: str, method: str | None) -> dict:
    """What one method's searches find at every budget. method: None: smaller pictures."""
    own: Winner = size.winners[testbed]
    sizes = {"calibration": own.questions, "test": own.test, "batch": own.batch}
    benchmark = Benchmark(testbed, RIVAL, cache, **sizes)
    row = {"testbed": testbed, "method": method or "smaller pictures"}
    nothing = PruningConfig("random", [0.0] * benchmark.layers)
    row |= {"floor": benchmark.accuracy(nothing)}
    row |= {"full": benchmark.answers(None, benchmark.test).accuracy, "n_test": own.test}
    if method is None:
        seeds = [{"points": [benchmark.smaller(scale) for scale in SCALES], "passes": 0}]
        return {**row, "seeds": seeds}
    seeds = []
    for seed in range(own.seeds):
        found = by_methods(benchmark, method, own.budgets, seed, own.refinement)
        points = []
        for budget, config in found.configs.items():
            answers = benchmark.answers(config, benchmark.test)
            point = {"budget": budget, "share": found.shares[budget], "kl": answers.kl}
            point |= {"method": config.method, "tokens": config.tokens(benchmark.tokens)}
            points.append({**point, "accuracy": answers.accuracy})
        seeds.append({"points": points, "passes": found.passes})
    return {**row, "seeds": seeds}


def conclude(rows: list[dict], size: Size) -> dict:
    """Hypervolumes of all methods, and the ratios of `auto`.

    rows: what `run` found, or rows of an earlier result.
    """
    table, verdicts, words = [], [], []
    for testbed in dict.fromkeys(row["testbed"] for row in rows):
        own = [_row(row) if "seeds" in row else row for row in rows if row["testbed"] == testbed]
        ratios = _ratios(testbed, {row["method"]: row["hypervolume"]["mean"] for row in own})
        table += own
        verdict = all_met(met(ratio >= least) for _, ratio, least in ratios) if ratios else None
        verdicts.append(verdict or NOT_TESTABLE)
        words += [f"{testbed}: auto has {ratio:.3f} times {what}" for what, ratio, _ in ratios]
    return {
        "seeds": sorted({own.seeds for own in size.winners.values()}),
        "calibration": max((own.questions for own in size.winners.values()), default=0),
        "test": max((own.test for own in size.winners.values()), default=0),
        "verdict": all_met(verdicts),
        "rows": table,
        "measured": "; ".join(words) or "no testbed at this size",
    }


def _row(found: dict) -> dict:
    """A row of the result: one method's frontiers of all seeds, together."""
    row = {name: value for name, value in found.items() if name != "seeds"}
    seeds = found["seeds"]
    row |= {"hypervolume": summary(_volumes(found))}
    row |= {"passes": summary([seed["passes"] for seed in seeds])["mean"]}
    each = zip(*(seed["points"] for seed in seeds), strict=True)
    return {**row, "points": list(map(_over_seeds, each)), "number": len(seeds)}


def _volumes(row: Mapping) -> list[float]:
    """The hypervolume of each seed's frontier."""
    found = [[(p["share"], p["accuracy"]) for p in seed["points"]] for seed in row["seeds"]]
    return [volume(points, row["floor"]) for points in found]


def _ratios(testbed: str, means: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """(of whom, hypervolume of `auto` over theirs, the least that is promised)."""
    single = {n: v for n, v in means.items() if n not in (AUTO_ALONE, "smaller pictures")}
    if AUTO_ALONE not in means or RIVAL not in single:
        return []
    best = max(single, key=single.__getitem__)
    of = {
        f"that of {best}, the best in hindsight": (best, BEST),
        "FastV's": (RIVAL, FASTV[testbed]),
    }
    auto = means[AUTO_ALONE]
    return [(what, auto / max(means[name], 1e-9), least) for what, (name, least) in of.items()]


def _over_seeds(points: Sequence[Mapping]) -> dict:
    """One budget's points of all seeds: accuracies and KLs together, the rest of the first seed."""
    together = {name: summary([p[name] for p in points]) for name in ("accuracy", "kl")}
    return {**points[0], **together}
