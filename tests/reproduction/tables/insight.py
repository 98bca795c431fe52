"""Tables of what is learned: kernels, transfer, convergence, estimators."""

from __future__ import annotations

from collections.abc import Callable

from vispco.utils.console import percent, tokens

from .base import HEAD, HEAD_BUDGET, NOTHING, Columns, Markdown, kl, points, written

_KERNELS: Columns = {
    **HEAD_BUDGET,
    "seeds": lambda row: row["seeds"],
    "KL, several steps": lambda row: kl(row["multi_step"]["kl"]),
    "KL, one layer": lambda row: kl(row["single_layer"]["kl"]),
    "several steps are": lambda row: row["outcome"],
    "accuracy, several steps, %": lambda row: points(row["multi_step"]["accuracy"]),
    "accuracy, one layer, %": lambda row: points(row["single_layer"]["accuracy"]),
    "gain, points ± s.e.": lambda row: (
        f"{100 * row['gain']['mean']:+.1f} ± {100 * row['noise']:.1f}"
    ),
    "tokens, several steps": lambda row: tokens(row["multi_step"]["tokens"]),
    "tokens, one layer": lambda row: tokens(row["single_layer"]["tokens"]),
}


def kernels(result: dict, table: Markdown) -> list[str]:
    """Pruning in several steps and at one layer."""
    return [written(result["rows"], _KERNELS, table)]


def transfer(result: dict, table: Markdown) -> list[str]:
    """A matrix for each testbed, between tasks and between methods."""
    parts = []
    for one in result["rows"]:
        rows = [
            [name, *map(_point, found["accuracy"]), tokens(found["tokens"])]
            for name, found in one["rows"].items()
        ]
        if "full" in one:
            rows.append(["full model", *map(_point, one["full"]), ""])
        of_tasks = one["matrix"] == "tasks"
        what, each = ("task", " a task") if of_tasks else ("method", "")
        corner = "found with \\ used on" if of_tasks else "found with \\ used by"
        parts += [
            f"{one['testbed']}, budget {one['budget']}, held-out accuracy in % on "
            f"{one['n_test']} questions{each}; rows: the {what} of the search, "
            f"columns: the {what} of use.",
            table([corner, *one["columns"], "tokens entering each layer"], rows),
        ]
    return parts


def _point(accuracy: float) -> str:
    return f"{100 * accuracy:.1f}"


_CONVERGENCE: Columns = {
    **HEAD,
    "kernel": lambda row: row["kernel"],
    "form": lambda row: row["kind"],
    "runs within epsilon": lambda row: f"{row['arrived']} of {row['count']}",
    "worst final violation": lambda row: f"{row['worst']:.4f}",
    "budgets out of reach": lambda row: ", ".join(map(str, row["unreachable"])) or NOTHING,
    "verdict": lambda row: row["verdict"],
}


def convergence(result: dict, table: Markdown) -> list[str]:
    """How many runs of the augmented Lagrangian arrive at their budget."""
    return [written(result["rows"], _CONVERGENCE, table)]


def _figure(name: str) -> Callable[[dict], str]:
    return lambda row: f"{row[name]:.2f}"


_ESTIMATORS: Columns = {
    "testbed": lambda row: row["testbed"],
    "estimator": lambda row: row["estimator"] + (" (default)" if row["default"] else ""),
    "cosine of the mean": _figure("cosine"),
    "cosine of a batch": _figure("batch"),
    "scale": _figure("scale"),
    "bias": _figure("bias"),
    "s.d.": _figure("std"),
}


def estimators(result: dict, table: Markdown) -> list[str]:
    """Estimators against exact differences, and searches that differ in nothing else."""
    parts = [written(result["rows"], _ESTIMATORS, table)] if result["rows"] else []
    searched = result.get("searched")
    if not searched:
        return parts
    budgets = list(enumerate(searched[0]["budgets"]))
    columns: Columns = {
        "testbed": lambda row: row["testbed"],
        "estimator": lambda row: row["estimator"],
        **{f"KL, {percent(b, 0)}": lambda row, i=i: kl(row["kl"][i]) for i, b in budgets},
        **{
            f"accuracy, %, {percent(b, 0)}": lambda row, i=i: points(row["accuracy"][i])
            for i, b in budgets
        },
        "KL over the default's, mean": lambda row: (
            f"{row['ratio']['mean']:.2f} ± {row['ratio']['std']:.2f}"
        ),
        "passes": lambda row: f"{row['passes']:,.0f}",
    }
    text = (
        "Searches that differ in the estimator alone, without refinement; "
        "calibration KL, and held-out accuracy:"
    )
    return [*parts, text, written(searched, columns, table)]
