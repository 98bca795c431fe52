"""Claim 7: the gradient estimators against the exact gradient; the study is `vispco.reproduction.estimators`."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from ...ste import ESTIMATORS
from ..arena import Arena
from ..cache import Cache, of_file
from ..sizes import Size
from .base import NOT_TESTABLE, Piece, all_met, met

TITLE = "Gradient estimators"
METHOD, REACH = "fastv", "4"  # differences over 4 tokens
MARGIN = 0.02
TARGET = (f"The default estimator agrees best with exact differences of the hard loss over {REACH} tokens: the cosine of a batch's "
          f"gradient with them, mean over four schedules, is within {MARGIN} of the best estimator's at equal cost.")


def pieces(size: Size) -> list[Piece]:
    """One per testbed."""
    questions = 4 * size.estimator_questions
    return [Piece({"testbed": name}, questions * (50 + 3 * 40 + 16 * size.estimator_steps), name)
            for name in dict.fromkeys(s.testbed for s in size.settings) if questions]


def run(cache: Cache, size: Size, testbed: str) -> dict:
    """The study of one testbed."""
    from .. import estimators as study

    arena = Arena(testbed, METHOD, cache, calibration=16)
    options: dict[str, Any] = {"questions": size.estimator_questions, "steps": size.estimator_steps, "seed": 0}
    return arena.searched("estimators", lambda: study.study(testbed, METHOD, report=lambda line: None, **options),
                          source=of_file(study.__file__), **options)


def conclude(rows: list[dict], size: Size) -> dict:
    """Means over the schedules."""
    if not rows:
        return {"verdict": NOT_TESTABLE, "rows": [], "measured": "not measured at this size"}
    table = []
    for row in rows:
        names = [n for n in row["estimators"] if not n.startswith("truth")]
        means = {n: _means(row["estimators"][n]) for n in row["estimators"]}
        best = max(names, key=lambda n: means[n]["batch"])
        default = next(n for n in names if n.replace(",", " ").split()[0] == ESTIMATORS["default"].__name__)
        table += [{"testbed": row["model"], "estimator": n, **means[n], "default": n == default, "best": n == best,
                   "verdict": met(means[n]["batch"] >= means[best]["batch"] - MARGIN)} for n in row["estimators"]]
    ours, best = [t for t in table if t["default"]], [t for t in table if t["best"]]
    return {"seeds": [1], "calibration": 4 * size.estimator_questions, "test": 0,
            "verdict": all_met(t["verdict"] for t in ours), "rows": table, "measured": "; ".join(
        f"{a['testbed']}: {a['estimator']} (the default) {a['batch']:.2f}, {b['estimator']} (the best) {b['batch']:.2f}"
        for a, b in zip(ours, best))}


def _means(schedules: dict) -> dict[str, float]:
    names = {"cosine": "cosine", "batch": "cosine of a batch", "scale": "scale", "bias": "bias", "std": "std"}
    return {short: fmean(row[name][REACH] for row in schedules.values()) for short, name in names.items()}
