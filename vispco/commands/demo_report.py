"""The demo's frontier beside its competitors, in numbers and as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import PruningConfig
from ..frontier import Frontier, FrontierPoint
from ..plot.profile import findings
from ..profiling import Profile
from ..utils.console import COST_HEADER, cost_cells, percent, standard_error, table

FLOOR = "no visual tokens at all"
#: The columns of the comparison, by the kind of competitor.
RIVALS = {
    "blind": "random tokens, same schedule",
    "coarse": "pooled before layer 0",
    "published": "best published FastV",
}


def compare(point: FrontierPoint, competitors: Sequence[dict]) -> dict[str, Any]:
    """One budget: the configuration found, and the best competitor of each kind within it.

    competitors: all of them, as in `Frontier.meta`. What is on no budget of its own counts where it
    fits. The best is that of least KL on the held-out questions, so it is chosen in hindsight.
    """

    def within(c: dict) -> bool:
        return c.get("budget", point.budget) == point.budget and c["share"] <= point.budget + 1e-9

    row = {"budget": point.budget}
    row |= {name: point.metrics[name] for name in ("accuracy", "kl")}
    for kind in RIVALS:
        own = [c for c in competitors if c["kind"] == kind and within(c)]
        best = min(own, key=lambda c: c["kl"], default=None)
        row[kind] = best and {name: best[name] for name in ("label", "accuracy", "kl")}
    return row


def report(frontier: Frontier, profile: Profile) -> str:
    """The demo's tables as text: what was found, how it compares, what it cost."""
    meta = frontier.meta
    rows = [[FLOOR, "", f"{meta['floor_kl']:.4f}", percent(meta["floor_accuracy"])]]
    named = {"published": "FastV's published ", "coarse": ""}
    for c in meta["competitors"]:
        if c["kind"] in named:
            label, kl = named[c["kind"]] + c["label"], f"{c['kl']:.4f}"
            rows.append([label, percent(c["share"]), kl, percent(c["accuracy"])])
    parts = [
        "What the model does with its image:\n" + "\n".join(findings(profile)),
        "Found (" + ", ".join(profile.methods) + "; each drop by whoever ranks best there):",
        _found(frontier),
        table(["for comparison", "share", "held-out KL", "held-out accuracy"], rows),
        "Held-out accuracy within each budget, % (KL, nats):",
        _rivalry(meta["comparison"]),
        f"Cost: {meta['forward_passes']:,.0f} forward passes of one question for "
        f"{len(frontier)} budgets, of which the profile {meta['profile_passes']:,.0f}. "
        f"{meta['seconds_in_all']:.0f} s in all.",
    ]
    return "\n\n".join(parts)


def _found(frontier: Frontier) -> str:
    """A table of the configurations found, and of the full model."""
    meta = frontier.meta
    config = PruningConfig("random", [1.0] * meta["num_layers"], n_visual=meta["n_visual"])
    metrics = {"accuracy": meta["full_accuracy"], "kl": 0.0, "n": meta["n_test"]}
    full = FrontierPoint(config, "full", meta["full_flops"], 1.0, 0.0, metrics)
    rows = []
    for point in [*frontier.points, full]:
        method = "" if point is full else point.config.method
        accuracy = plus_minus(point.metrics["accuracy"], point.metrics["n"])
        losses = [f"{loss:.4f}" for loss in (point.loss, point.metrics["kl"])]
        rows.append([*cost_cells(point), method, *losses, accuracy])
    return table([*COST_HEADER, "method", "KL", "held-out KL", "held-out accuracy"], rows)


def plus_minus(accuracy: float, n: int) -> str:
    """An accuracy over `n` questions and its standard error, as `93.2 ± 1.1 %`."""
    return f"{100 * accuracy:.1f} ± {100 * standard_error(accuracy, n):.1f} %"


def _rivalry(comparison: list[dict]) -> str:
    """A row for each budget, a column for each kind of competitor."""

    def show(own: dict | None) -> str:
        return f"{100 * own['accuracy']:.1f} ({own['kl']:.3f})" if own else "–"

    rows = [
        [row["budget"], *(show(each) for each in (row, *map(row.get, RIVALS)))]
        for row in comparison
    ]
    return table(["budget", "found", *RIVALS.values()], rows)
