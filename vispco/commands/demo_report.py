"""The demo's frontier beside its competitors, in numbers and as text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..config import PruningConfig
from ..frontier import Frontier, FrontierPoint
from ..utils.console import COST_HEADER, cost_cells, percent, standard_error, table

FLOOR = "no visual tokens after layer 0"


def compare(point: FrontierPoint, competitors: Sequence[dict]) -> dict[str, Any]:
    """One budget: the configuration found beside the grid's, the random ones, and FitPrune's.

    competitors: all of them, as in `Frontier.meta`; `kind` and `budget` tell which count here.
    """
    grid = [c for c in competitors if c["kind"] == "grid" and c["share"] <= point.budget + 1e-9]
    own = [c for c in competitors if c.get("budget") == point.budget]
    chance = [c for c in own if c["kind"] == "random"]
    row: dict[str, Any] = {
        "budget": point.budget,
        "accuracy": point.metrics["accuracy"],
        "kl": point.metrics["kl"],
        "grid": min(grid, key=lambda c: c["kl"], default=None),
        "hindsight": {},
        "random": {},
        "fitted": next(c for c in own if c["kind"] == "fitted"),
    }
    for name, best, sign in (("accuracy", max, 1), ("kl", min, -1)):
        values = [c[name] for c in chance]
        if values:
            row["random"][name] = {
                "mean": statistics.fmean(values),
                "std": statistics.pstdev(values),
                "best": best(values),
                "beaten": beaten(sign * row[name], [sign * value for value in values]),
            }
        if grid:
            row["hindsight"][name] = best(c[name] for c in grid)
    return row


def beaten(value: float, others: Sequence[float]) -> float:
    """Percentage of `others` below `value`; ties count half.

    >>> beaten(3, [1, 2, 3, 4])
    62.5
    """
    return 100 * sum((o < value) + (o == value) / 2 for o in others) / len(others)


def report(frontier: Frontier) -> str:
    """The demo's tables as text: what was found, how it compares, what it cost."""
    meta, costs = frontier.meta, frontier.meta["cost_in_forward_passes"]
    rows = [[FLOOR, "", f"{meta['floor_kl']:.4f}", percent(meta["floor_accuracy"])]]
    named = {"published": "FastV's published ", "coarse": ""}
    for c in meta["competitors"]:
        if c["kind"] in named:
            label, kl = named[c["kind"]] + c["label"], f"{c['kl']:.4f}"
            rows.append([label, percent(c["share"]), kl, percent(c["accuracy"])])
    parts = [
        f"Found by gradient ({meta['method']}, {meta['kernel']} kernel, {meta['steps']} steps a "
        "budget):",
        _found(frontier),
        table(["for comparison", "share", "held-out KL", "held-out accuracy"], rows),
        "Held-out accuracy at each budget, % (grid: of least KL on these questions; hindsight: of "
        "best accuracy):",
        _rivalry(meta["comparison"], "accuracy"),
        "Held-out KL at each budget, nats:",
        _rivalry(meta["comparison"], "kl"),
        "Cost in forward passes of one question (a backward pass counts 2): search "
        f"{costs['search']:,} for {len(frontier)} budgets;\non the same calibration questions the "
        f"grid's {meta['grid_size']} configurations would be {costs['grid']:,}, the random "
        f"schedules {costs['random']:,}. {meta['seconds_in_all']:.0f} s in all.",
    ]
    return "\n\n".join(parts)


def _found(frontier: Frontier) -> str:
    """A table of the configurations found, and of the full model."""
    meta = frontier.meta
    config = PruningConfig(meta["method"], [1.0] * meta["num_layers"], n_visual=meta["n_visual"])
    metrics = {"accuracy": meta["full_accuracy"], "kl": 0.0, "n": meta["n_test"]}
    full = FrontierPoint(config, "full", meta["full_flops"], 1.0, 0.0, metrics)
    rows = []
    for point in [*frontier.points, full]:
        accuracy = plus_minus(point.metrics["accuracy"], point.metrics["n"])
        losses = [f"{loss:.4f}" for loss in (point.loss, point.metrics["kl"])]
        rows.append([*cost_cells(point), *losses, accuracy])
    return table([*COST_HEADER, "KL", "held-out KL", "held-out accuracy"], rows)


def plus_minus(accuracy: float, n: int) -> str:
    """An accuracy over `n` questions and its standard error, as `93.2 ± 1.1 %`."""
    return f"{100 * accuracy:.1f} ± {100 * standard_error(accuracy, n):.1f} %"


def _rivalry(comparison: list[dict], name: str) -> str:
    """A table of one metric: a row for each budget, a column for each kind of competitor."""

    def show(value: float | None) -> str:
        if value is None:
            return "–"
        return f"{100 * value:.1f}" if name == "accuracy" else f"{value:.4f}"

    rows = []
    for row in comparison:
        chance, grid = row["random"].get(name, {}), row["grid"] or {}
        values = [row[name], grid.get(name), row["hindsight"].get(name), row["fitted"][name]]
        spread = f"{show(chance.get('mean'))} ± {show(chance.get('std'))}"
        share = f"{chance['beaten']:.0f} %" if chance else "–"
        cells = [*map(show, values), spread, show(chance.get("best")), share]
        rows.append([row["budget"], *cells])
    header = ["budget", "found", "grid", "hindsight", "FitPrune's fit", "random: mean ± s.d."]
    return table([*header, "best random", "random ones beaten"], rows)
