"""The page's tables, claim by claim."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean

from vispco.utils.console import percent, tokens
from .claims.base import spread

Markdown = Callable[[list, list], str]


def _kl(values: Mapping) -> str:
    return spread(values["values"], 4)


def _points(values: Mapping) -> str:
    return spread([100 * v for v in values["values"]], 1)


def _head(row: Mapping) -> list:
    return [row["testbed"], row["method"], *([row["budget"]] if "budget" in row else [])]


def _hypervolume(result: dict, table: Markdown) -> list[str]:
    rows = [[*_head(r), spread(r["hypervolume"]["values"], 4), len(r["grid"]), f"{r['grid_chosen']:.4f}", f"{r['grid_hindsight']:.4f}",
             f"{r['grid_halves']:.4f}", *(spread(r[f"ratio_{name}"]["values"]) for name in ("chosen", "hindsight", "halves")), f"{r['passes']:,}",
             f"1/{1 / r['share_of_grid_cost']:.1f}", f"{spread(r['ratio_refined']['values'])} (1/{1 / r['refined_share']:.1f})",
             spread(r["ratio_ungraded"]["values"]), f"{r['ratio_ramp']:.3f}", r["verdict"]]
            for r in result["rows"]]
    return [table(["testbed", "method", "learned", "configurations of the grid", "grid, chosen by KL", "grid, hindsight",
                   "grid, hindsight of half on half", "ratio to chosen", "ratio to hindsight", "ratio to hindsight of half on half", "passes", "of the 700-point grid's cost",
                   "refined: ratio to hindsight (cost)", "the same without the gradient", "a ramp, no search", "verdict"], rows)]


def _percentile(result: dict, table: Markdown) -> list[str]:
    rows = []
    for r in result["rows"]:
        if r["verdict"] == "not reachable":
            rows.append([*_head(r), *["–"] * 7, f"not reachable: at least {percent(r['least'])}"])
            continue
        against = [100 * p["difference"] for p in r["against_best"]]
        noise = 196 * fmean(p["error"] for p in r["against_best"])
        rows.append([*_head(r), r["pool"], spread(r["percentile"]["values"], 1), _kl(r["kl"]), f"{r['random_kl']:.4f}, "
                     f"{r['random_best_kl']:.4f}", _points(r["accuracy"]),
                     f"{100 * r['random_accuracy']['mean']:.1f} ± {100 * r['random_accuracy']['std']:.1f} ({r['held_out']})",
                     f"{fmean(against):+.1f} ± {noise:.1f}", r["verdict"]])
    return [table(["testbed", "method", "budget", "pool", "percentile on KL", "KL", "random KL: mean, best", "held-out accuracy, %",
                   "random: mean ± s.d. (of so many)", "against the 99th percentile's, points", "verdict"], rows)]


def _cost(result: dict, table: Markdown) -> list[str]:
    rows, accuracies = [], []
    for r in result["rows"]:
        if r["verdict"] == "not reachable":
            rows.append([*_head(r), *["–"] * 12, "not reachable"])
            continue
        by_name = {one["name"]: one for one in r["rivals"]}
        draws = {d["n"]: d for d in r["random"]}
        rival = max(n for n in draws if n <= 160)

        def kl(name: str, by_name=by_name) -> str:
            return spread(by_name[name]["kl"], 4) if name in by_name else "–"

        def accuracy(name: str, by_name=by_name) -> str:
            return spread([100 * a for a in by_name[name]["accuracy"]], 1) if name in by_name else "–"

        rows.append([*_head(r), f"{r['passes']:,.0f} (1/{1 / r['share_of_random_cost']:.1f})", kl("learned"),
                     f"{kl('no gradient')} ({r['no gradient']})",
                     kl("learned, cheap"), f"{draws[10]['mean']:.4f}" if 10 in draws else "–",
                     f"{draws[rival]['mean']:.4f} ({rival})", percent(r["won"]["mean"], 0), kl("NSGA-II"), kl("TPE"),
                     kl("greedy per layer"), kl(_FIT), kl(_RAMP), f"{kl('learned, thorough')} ({r['thorough']})", r["verdict"] if r["verdict"] != "not testable" else "pool too small" if r["differs"] else "configurations do not differ"])
        best = draws[rival]["accuracy"]
        coarse = {one["name"]: f"{100 * one['accuracy']:.1f}" for one in r["coarse"]}
        accuracies.append([*_head(r), *map(accuracy, ("learned", "no gradient", "learned, cheap")), "–" if best is None else f"{100 * best:.1f}",
                           *map(accuracy, ("NSGA-II", "TPE", "greedy per layer", _FIT, _RAMP, "VTW's rule")),
                           *(coarse.get(n, "–") for n in ("pooled", "strided", "random tokens", "smaller pictures"))])
    header = ["testbed", "method", "budget"]
    return ["Calibration KL:", table([*header, "passes a budget (of random best-of-160)", "learned",
                                      "without the gradient (learned is)", "learned, cheap",
                                      "random best of 10", "random best of 160 (or all)", "chance to beat it", "NSGA-II", "TPE",
                                      "greedy per layer", _FIT, _RAMP, "learned, thorough (than best of 160)", "verdict"], rows),
            "Held-out accuracy, %:", table([*header, "learned", "without the gradient", "learned, cheap", "random best of 160 (or all)", "NSGA-II", "TPE",
                                            "greedy per layer", _FIT, _RAMP, "VTW's rule", "pooled", "strided",
                                            "random tokens", "smaller pictures"], accuracies)]


_FIT, _RAMP = "FitPrune's fit", "a ramp, no search"


def _depth(result: dict, table: Markdown) -> list[str]:
    rows = [[r["layers"], r["budget"], _kl(r["kl"]), _kl(r["ungraded"]), f"{r['passes']:,.0f}", f"{r['random_equal']['mean']:.4f}",
             f"{r['random_most']['mean']:.4f} ({r['random_most']['n']})", f"{r['lead']:.2f}", f"{r['lead_most']:.2f}",
             r["verdict"]] for r in result["rows"]]
    return [table(["layers", "budget", "learned KL", "without the gradient", "passes", "random of equal cost", "random best of all", "lead at equal cost",
                   "lead over all", "verdict"], rows)]


def _kernels(result: dict, table: Markdown) -> list[str]:
    rows = [[*_head(r), r["seeds"], _kl(r["multi_step"]["kl"]), _kl(r["single_layer"]["kl"]), r["outcome"],
             _points(r["multi_step"]["accuracy"]), _points(r["single_layer"]["accuracy"]),
             f"{100 * r['gain']['mean']:+.1f} ± {100 * r['noise']:.1f}", tokens(r["multi_step"]["tokens"]),
             tokens(r["single_layer"]["tokens"])] for r in result["rows"]]
    return [table(["testbed", "method", "budget", "seeds", "KL, several steps", "KL, one layer", "several steps are",
                   "accuracy, several steps, %", "accuracy, one layer, %", "gain, points ± s.e.", "tokens, several steps",
                   "tokens, one layer"], rows)]


def _transfer(result: dict, table: Markdown) -> list[str]:
    parts = []
    for r in result["rows"]:
        rows = [[name, *(f"{100 * a:.1f}" for a in one["accuracy"]), tokens(one["tokens"])] for name, one in r["rows"].items()]
        if "full" in r:
            rows.append(["full model", *(f"{100 * a:.1f}" for a in r["full"]), ""])
        what = "task" if r["matrix"] == "tasks" else "method"
        parts += [f"{r['testbed']}, budget {r['budget']}, held-out accuracy in % on {r['n_test']} questions"
                  f"{' a task' if what == 'task' else ''}; rows: the {what} of the search, columns: the {what} of use.",
                  table(["found with \\ used on" if what == "task" else "found with \\ used by", *r["columns"],
                         "tokens entering each layer"], rows)]
    return parts


def _convergence(result: dict, table: Markdown) -> list[str]:
    rows = [[*_head(r), r["kernel"], r["kind"], f"{r['arrived']} of {r['count']}", f"{r['worst']:.4f}",
             ", ".join(map(str, r["unreachable"])) or "–", r["verdict"]] for r in result["rows"]]
    return [table(["testbed", "method", "kernel", "form", "runs within epsilon", "worst final violation",
                   "budgets out of reach", "verdict"], rows)]


def _estimators(result: dict, table: Markdown) -> list[str]:
    rows = [[r["testbed"], r["estimator"] + (" (default)" if r["default"] else ""),
             *(f"{r[k]:.2f}" for k in ("cosine", "batch", "scale", "bias", "std"))] for r in result["rows"]]
    parts = [table(["testbed", "estimator", "cosine of the mean", "cosine of a batch", "scale", "bias", "s.d."], rows)] if rows else []
    if searched := result.get("searched"):
        head = [f"{what}, {percent(b, 0)}" for what in ("KL", "accuracy, %") for b in searched[0]["budgets"]]
        parts += ["Searches that differ in the estimator alone, without refinement; calibration KL, and held-out accuracy:",
                  table(["testbed", "estimator", *head, "KL over the default's, mean", "passes"],
                        [[r["testbed"], r["estimator"], *map(_kl, r["kl"]), *map(_points, r["accuracy"]),
                          f"{r['ratio']['mean']:.2f} ± {r['ratio']['std']:.2f}", f"{r['passes']:,.0f}"] for r in searched])]
    return parts


TABLES: dict[str, Callable[[dict, Markdown], list[str]]] = {
    "hypervolume": _hypervolume, "percentile": _percentile, "cost": _cost, "depth": _depth, "kernels": _kernels,
    "transfer": _transfer, "convergence": _convergence, "estimators": _estimators}
