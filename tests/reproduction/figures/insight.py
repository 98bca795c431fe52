"""Figures of what is learned: schedules, the path of the multipliers, transfer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from .base import BLUE, GREEN, INK, ORANGE, PINK, RED, SKY, finish, percents, plain_log, share

KERNELS = {
    "single_layer": BLUE,
    "p_sigmoid": SKY,
    "linear": ORANGE,
    "exponential": PINK,
    "multi_step": GREEN,
    "monotone": RED,
}
DASHES = {"inequality": "-", "equality": (0, (4, 1.5))}


# ---- schedules
# ------------------------------------------------------------------------------------------
def schedules(results: Mapping[str, dict]) -> Iterator[tuple[str, Callable]]:
    """Keep ratio by layer (across) and budget (up): a column a setting, a row a kernel."""
    if "kernels" in results:
        yield "kernels", lambda new: _schedules(new, results["kernels"], results.get("percentile"))


def _schedules(new, result: dict, free: dict | None):
    from matplotlib.ticker import MaxNLocator

    settings = list(dict.fromkeys((r["testbed"], r["method"]) for r in result["rows"]))
    kinds = {"multi_step": "several steps", "single_layer": "one layer"}
    if free:
        kinds = {"free": "free monotone, refined", **kinds}
    figure, panels = new(len(kinds), len(settings), width=2.7, height=2.2)
    for column, setting in enumerate(settings):
        rows = sorted(
            (r for r in result["rows"] if (r["testbed"], r["method"]) == setting),
            key=lambda r: r["budget"],
        )
        found = {
            kernel: [(r["budget"], r[kernel]["tokens"]) for r in rows]
            for kernel in ("multi_step", "single_layer")
        }
        found["free"] = [
            (r["budget"], r["tokens"])
            for r in (free or {"rows": []})["rows"]
            if (r["testbed"], r["method"]) == setting and r["verdict"] != "not reachable"
        ]
        for row, (kind, label) in enumerate(kinds.items()):
            axes = panels[row, column]
            axes.grid(False)
            if found[kind]:
                full = rows[0]["n_visual"]
                picture = axes.imshow(
                    [[t / full for t in tokens] for _, tokens in found[kind]],
                    vmin=0,
                    vmax=1,
                    cmap="viridis",
                    aspect="auto",
                    origin="lower",
                    interpolation="nearest",
                )
                axes.set_yticks(range(len(found[kind])), [share(b) for b, _ in found[kind]])
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_title((f"{', '.join(setting)}\n" if row == 0 else "") + label)
            axes.set_xlabel("decoder layer" if row == len(kinds) - 1 else "")
            axes.set_ylabel("budget" if column == 0 else "")
    bar = figure.colorbar(picture, ax=panels, shrink=0.6, pad=0.02)
    bar.set_label("visual tokens that enter")
    percents(bar.ax.yaxis)
    return finish(
        figure, panels, panels.size, "What is learned, layer by layer", result, legend=False
    )


# ---- convergence
# ----------------------------------------------------------------------------------------
def convergence(results: Mapping[str, dict]) -> Iterator[tuple[str, Callable]]:
    """A figure a testbed: slack, multiplier, penalty and gradient, step by step; a line a run."""
    if "convergence" in results:
        for testbed in dict.fromkeys(r["testbed"] for r in results["convergence"]["rows"]):
            rows = [r for r in results["convergence"]["rows"] if r["testbed"] == testbed]
            yield (
                f"convergence-{testbed}",
                lambda new, testbed=testbed, rows=rows: _convergence(
                    new, results["convergence"], testbed, rows
                ),
            )


def _convergence(new, result: dict, testbed: str, rows: list[dict]):
    from matplotlib.ticker import MaxNLocator

    names = {
        "slack": "slack",
        "multiplier": "multiplier w",
        "penalty": "penalty λ",
        "gradient": "gradient norm",
    }
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    figure, panels = new(len(kinds), len(names), width=3.2, height=2.6)
    for line, kind in enumerate(kinds):
        for axes, (name, label) in zip(panels[line], names.items(), strict=True):
            for row in (r for r in rows if r["kind"] == kind):
                for run in row["runs"]:
                    axes.plot(
                        [s["step"] for s in run["steps"]],
                        [s[name] for s in run["steps"]],
                        color=KERNELS.get(row["kernel"], INK),
                        linewidth=0.8,
                        alpha=0.7,
                        label=row["kernel"],
                    )
            if name == "slack":
                axes.axhspan(-0.01, 0.01, color=INK, alpha=0.12, linewidth=0)
                axes.set_yscale("symlog", linthresh=0.01)
                axes.set_yticks([-0.1, -0.01, 0, 0.01, 0.1], ["-10 %", "-1 %", "0", "1 %", "10 %"])
            if name in ("penalty", "gradient"):
                axes.set_yscale("log")
                plain_log(axes.yaxis)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set(title=f"{kind}: {label}", xlabel="step" if line == len(kinds) - 1 else "")
    methods = ", ".join(dict.fromkeys(r["method"] for r in rows))
    return finish(
        figure,
        panels,
        panels.size,
        f"The augmented Lagrangian on its way ({testbed}; {methods}; grey band: epsilon)",
        result,
    )


# ---- transfer
# -------------------------------------------------------------------------------------------
def transfer(results: Mapping[str, dict]) -> Iterator[tuple[str, Callable]]:
    """The matrices, as accuracies."""
    if "transfer" in results:
        yield "transfer", lambda new: _transfer(new, results["transfer"])


def _transfer(new, result: dict):
    rows = result["rows"]
    figure, panels = new(
        1, len(rows), width=4.2, height=4, width_ratios=[len(r["columns"]) + 2 for r in rows]
    )
    for axes, row in zip(panels.flat, rows, strict=True):
        values = [one["accuracy"] for one in row["rows"].values()]
        axes.grid(False)
        axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                axes.text(
                    x,
                    y,
                    f"{100 * value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if value < 0.6 else INK,
                )
        axes.set_xticks(range(len(row["columns"])), row["columns"], rotation=60, ha="right")
        axes.set_yticks(range(len(values)), list(row["rows"]))
        axes.set(
            title=f"{row['testbed']}, {row['matrix']}",
            xlabel="used on" if row["matrix"] == "tasks" else "used by",
            ylabel="found " + ("on" if row["matrix"] == "tasks" else "with"),
        )
    return finish(
        figure,
        panels,
        len(rows),
        f"Held-out accuracy in % after a move (budget {share(rows[0]['budget'])})",
        result,
        legend=False,
    )
