"""The frontiers of all methods: each searched alone, and one search over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from .base import BLUE, GREEN, GREY, ORANGE, RED, finish, level, percents, shape

ALL, RIVAL, SMALLER = "auto", "fastv", "smaller pictures"


def winner(results: Mapping[str, dict]) -> Iterator[tuple[str, Callable]]:
    """One panel a testbed: held-out accuracy at each budget."""
    if "winner" in results:
        yield "winner", lambda new: _draw(new, results["winner"])


def _draw(new, result: dict):
    testbeds = list(dict.fromkeys(row["testbed"] for row in result["rows"]))
    figure, panels = new(*shape(len(testbeds)), width=4.2, height=3.9, sharey=True)
    for axes, testbed in zip(panels.flat, testbeds, strict=False):
        rows = {r["method"]: r for r in result["rows"] if r["testbed"] == testbed}
        level(axes, rows[ALL]["full"], "full model", above=True)
        level(axes, rows[ALL]["floor"], "no visual tokens")
        alone = {name: row for name, row in rows.items() if name not in (ALL, SMALLER)}
        best = max(alone, key=lambda name: alone[name]["hypervolume"]["mean"])
        for name, row in alone.items():
            if name not in (best, RIVAL):
                _curve(axes, row, GREY, "every other method alone", linewidth=0.8, alpha=0.5)
        _curve(axes, rows[SMALLER], GREEN, SMALLER, marker="v", linestyle=(0, (1, 1)))
        if best != RIVAL:
            label = "the best method alone (in hindsight)"
            _curve(axes, rows[best], RED, label, marker="s", linestyle=(0, (5, 1.5)))
        _curve(axes, rows[RIVAL], ORANGE, "FastV alone", marker="D", linestyle=(0, (4, 1, 1, 1)))
        _curve(axes, rows[ALL], BLUE, "one search over all methods", marker="o", linewidth=2.2)
        own = rows[ALL]["n_test"]
        asked = f", {own} held out" if own != result["test"] else ""
        title = testbed + asked if best == RIVAL else f"{testbed}{asked} (best alone: {best})"
        axes.set(
            title=title, xlabel="share of the prunable FLOPs", xlim=(-0.03, 0.83), ylim=(0.2, 1.03)
        )
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8])
        percents(axes.xaxis)
        percents(axes.yaxis)
    for axes in panels[:, 0]:
        axes.set_ylabel("held-out accuracy")
    title = "What the compute buys, by who ranks the tokens"
    return finish(figure, panels, len(testbeds), title, result)


def _curve(axes, row: dict, colour: str, label: str, **look) -> None:
    """One method's points, by what they cost."""
    points = sorted((p["share"], p["accuracy"]["mean"]) for p in row["points"])
    look = {"markeredgecolor": "white", "markersize": 6, **look}
    axes.plot(*zip(*points, strict=True), color=colour, label=label, **look)
