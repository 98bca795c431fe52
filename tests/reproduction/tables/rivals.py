"""Tables of competition: frontiers, percentiles, cost, depth."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from vispco.utils.console import percent

from ..claims.base import spread
from ..claims.cost import PREDICTOR, RAMP
from .base import (
    HEAD,
    HEAD_BUDGET,
    NOTHING,
    Columns,
    Markdown,
    in_points,
    kl,
    one_in,
    points,
    written,
)


def _ratio(name: str) -> Callable[[dict], str]:
    return lambda row: spread(row[f"ratio_{name}"]["values"])


_HYPERVOLUME: Columns = {
    **HEAD,
    "learned": lambda row: kl(row["hypervolume"]),
    "configurations of the grid": lambda row: len(row["grid"]),
    "grid, chosen by KL": lambda row: f"{row['grid_chosen']:.4f}",
    "grid, hindsight": lambda row: f"{row['grid_hindsight']:.4f}",
    "grid, hindsight of half on half": lambda row: f"{row['grid_halves']:.4f}",
    "ratio to chosen": _ratio("chosen"),
    "ratio to hindsight": _ratio("hindsight"),
    "ratio to hindsight of half on half": _ratio("halves"),
    "passes": lambda row: f"{row['passes']:,}",
    "of the 700-point grid's cost": lambda row: one_in(row["share_of_grid_cost"]),
    "the paper's predictor: ratio to hindsight": _ratio("predictor"),
    "refined: ratio to hindsight (cost)": lambda row: (
        f"{_ratio('refined')(row)} ({one_in(row['refined_share'])})"
        if row["refined_share"]
        else NOTHING
    ),
    "a refined ramp": lambda row: _ratio("refined_ramp")(row) if row["refined_share"] else NOTHING,
    "a ramp, no search": lambda row: f"{row['ratio_ramp']:.3f}",
    "verdict": lambda row: row["verdict"],
}


def hypervolume(result: dict, table: Markdown) -> list[str]:
    """Volumes below the frontiers, and their ratios."""
    return [written(result["rows"], _HYPERVOLUME, table)]


def _where_reached(columns: Columns, missing: str) -> Columns:
    """Columns that say nothing of a budget that was not reached; the last one says `missing`."""

    def known(name: str) -> Callable[[dict], object]:
        def cell(row: dict) -> object:
            if row["verdict"] != "not reachable":
                return columns[name](row)
            return missing.format(**row) if name == "verdict" else NOTHING

        return cell

    return {name: columns[name] if name in HEAD_BUDGET else known(name) for name in columns}


def _against_best(row: dict) -> str:
    differences = [100 * one["difference"] for one in row["against_best"]]
    noise = 196 * fmean(one["error"] for one in row["against_best"])
    return f"{fmean(differences):+.1f} ± {noise:.1f}"


def _random_accuracy(row: dict) -> str:
    accuracy = row["random_accuracy"]
    return f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f} ({row['held_out']})"


_PERCENTILE: Columns = {
    **HEAD_BUDGET,
    "pool": lambda row: row["pool"],
    "percentile on KL": lambda row: spread(row["percentile"]["values"], 1),
    "KL": lambda row: kl(row["kl"]),
    "random KL: mean, best": lambda row: f"{row['random_kl']:.4f}, {row['random_best_kl']:.4f}",
    "held-out accuracy, %": lambda row: points(row["accuracy"]),
    "random: mean ± s.d. (of so many)": _random_accuracy,
    "against the 99th percentile's, points": _against_best,
    "verdict": lambda row: row["verdict"],
}


def percentile(result: dict, table: Markdown) -> list[str]:
    """The learned configurations among random ones."""
    rows = [
        {**row, "at_least": percent(row["least"])} if "least" in row else row
        for row in result["rows"]
    ]
    columns = _where_reached(_PERCENTILE, "not reachable: at least {at_least}")
    return [written(rows, columns, table)]


def _rival(row: dict, name: str) -> dict | None:
    return next((rival for rival in row["rivals"] if rival["name"] == name), None)


def _kl_of(name: str) -> Callable[[dict], str]:
    def cell(row: dict) -> str:
        rival = _rival(row, name)
        return spread(rival["kl"], 4) if rival else NOTHING

    return cell


def _within(name: str) -> Callable[[dict], str]:
    return lambda row: f"{_kl_of(name)(row)} ({row['within'][name]})"


def _accuracy_of(name: str) -> Callable[[dict], str]:
    def cell(row: dict) -> str:
        rival = _rival(row, name)
        return in_points(rival["accuracy"]) if rival else NOTHING

    return cell


def _coarse(name: str) -> Callable[[dict], str]:
    def cell(row: dict) -> str:
        found = {one["name"]: one["accuracy"] for one in row["coarse"]}
        return f"{100 * found[name]:.1f}" if name in found else NOTHING

    return cell


def _best_of_pool(row: dict) -> dict:
    """Random search with 160 schedules, or as many as were measured."""
    return max((d for d in row["random"] if d["n"] <= 160), key=lambda d: d["n"])


def _best_of_ten(row: dict) -> str:
    return next((f"{d['mean']:.4f}" for d in row["random"] if d["n"] == 10), NOTHING)


def _pool_kl(row: dict) -> str:
    best = _best_of_pool(row)
    return f"{best['mean']:.4f} ({best['n']})"


def _pool_accuracy(row: dict) -> str:
    accuracy = _best_of_pool(row)["accuracy"]
    return NOTHING if accuracy is None else f"{100 * accuracy:.1f}"


def _verdict(row: dict) -> str:
    if row["verdict"] != "not testable":
        return row["verdict"]
    return "pool too small" if row["differs"] else "configurations do not differ"


_FIT, _RULE = "FitPrune's fit", "a ramp, no search"
_COST: Columns = {
    **HEAD_BUDGET,
    "passes a budget (of random best-of-160)": lambda row: (
        f"{row['passes']:,.0f} ({one_in(row['share_of_random_cost'])})"
    ),
    "learned": _kl_of("learned"),
    **{f"{name} (learned is)": _within(name) for name in (PREDICTOR, RAMP)},
    "learned, cheap": _kl_of("learned, cheap"),
    "random best of 10": _best_of_ten,
    "random best of 160 (or all)": _pool_kl,
    "chance to beat it": lambda row: percent(row["won"]["mean"], 0),
    **{name: _kl_of(name) for name in ("NSGA-II", "TPE", "greedy per layer", _FIT, _RULE)},
    "verdict": _verdict,
}
_ACCURACY: Columns = {
    **HEAD_BUDGET,
    "learned": _accuracy_of("learned"),
    **{name: _accuracy_of(name) for name in (PREDICTOR, RAMP)},
    "learned, cheap": _accuracy_of("learned, cheap"),
    "random best of 160 (or all)": _pool_accuracy,
    **{name: _accuracy_of(name) for name in ("NSGA-II", "TPE", "greedy per layer", _FIT, _RULE)},
    "VTW's rule": _accuracy_of("VTW's rule"),
    **{name: _coarse(name) for name in ("pooled", "strided", "random tokens", "smaller pictures")},
}


def cost(result: dict, table: Markdown) -> list[str]:
    """All competitors at all budgets: calibration KL, and held-out accuracy."""
    rows = result["rows"]
    reached = [row for row in rows if row["verdict"] != "not reachable"]
    divergence = written(rows, _where_reached(_COST, "not reachable"), table)
    accuracy = written(reached, _ACCURACY, table)
    return ["Calibration KL:", divergence, "Held-out accuracy, %:", accuracy]


def _random_most(row: dict) -> str:
    return f"{row['random_most']['mean']:.4f} ({row['random_most']['n']})"


_DEPTH: Columns = {
    "layers": lambda row: row["layers"],
    "budget": lambda row: row["budget"],
    "learned KL": lambda row: kl(row["kl"]),
    "a refined ramp": lambda row: kl(row["ungraded"]),
    "passes": lambda row: f"{row['passes']:,.0f}",
    "random of equal cost": lambda row: f"{row['random_equal']['mean']:.4f}",
    "random best of all": _random_most,
    "lead at equal cost": lambda row: f"{row['lead']:.2f}",
    "lead over all": lambda row: f"{row['lead_most']:.2f}",
    "verdict": lambda row: row["verdict"],
}


def depth(result: dict, table: Markdown) -> list[str]:
    """Learned and random configurations of ever deeper models."""
    return [written(result["rows"], _DEPTH, table)]


def winner(result: dict, table: Markdown) -> list[str]:
    """A table for each testbed: a row for each method, the largest hypervolume first."""
    parts = []
    for testbed in dict.fromkeys(row["testbed"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["testbed"] == testbed]
        budgets = [p["budget"] for p in own[0]["points"]]
        lines = []
        for row in sorted(own, key=lambda row: -row["hypervolume"]["mean"]):
            cells = [points(p["accuracy"]) for p in row["points"] if "budget" in p]
            cells = cells or [NOTHING] * len(budgets)
            volume = spread(row["hypervolume"]["values"], 4)
            passes = f"{row['passes']:,.0f}" if row["passes"] else NOTHING
            lines.append([row["method"], row["number"], passes, volume, *cells])
        header = ["method", "seeds", "passes", "hypervolume", *(f"{b:.0%}" for b in budgets)]
        parts += [
            f"{testbed}: held-out accuracy in % at each budget, on {own[0]['n_test']} questions. "
            f"The full model has {100 * own[0]['full']:.1f} %, none of the visual tokens "
            f"{100 * own[0]['floor']:.1f} %.",
            table(header, lines),
        ]
    return parts
