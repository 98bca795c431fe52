"""`vispco demo`: a search and all its competitors on the embedded testbed, in minutes on a CPU."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import testbed
from ..baselines.downsample import evaluate_downsampled
from ..baselines.grids import published, single_layer_grid
from ..baselines.rules import fitprune_schedule
from ..baselines.searchers import random_schedules
from ..budget import Budget
from ..config import PruningConfig
from ..utils.console import (
    Progress,
    flops,
    output_folder,
    percent,
    standard_error,
    table,
    tokens,
    wilson,
)
from ..evaluate import Record, evaluate
from ..flops import CostModel
from ..frontier import Frontier, FrontierPoint
from ..plot import plot_frontier, require_matplotlib
from ..registry import adapter_for, build_method
from ..solvers.descent import search
from ..calibration import prepare, shapes, run_teacher
from .answer import answer, side_by_side

#: Sizes of a smoke test.
FAST: dict[str, Any] = {"budgets": (0.3, 0.7), "n_calibration": 32, "n_test": 32, "steps": 4,
                        "grid_ratios": 3, "n_random": 3}
FLOOR = "no visual tokens after layer 0"


def run(output: str | os.PathLike = "vispco-demo", seed: int = 0, quiet: bool = False, *,
        model_name: str = "testbed-llava", budgets: Sequence[float] = (0.2, 0.35, 0.5, 0.7, 0.9),
        n_calibration: int = 128, n_test: int = 256, steps: int = 20, refinement: int = 6, grid_ratios: int = 10,
        n_random: int = 24, batch_size: int = 16) -> Frontier:
    """Search the testbed's frontier, measure it on held-out questions beside its competitors, write it down.

    Competitors, on the same questions: FastV's published configurations, `n_random` random schedules per
    budget, FitPrune's fit of attention statistics, tokens pooled in squares, smaller pictures, and every
    single-layer configuration with `grid_ratios` keep ratios a layer. The grid is chosen
    from in hindsight, on the test questions themselves: by KL, and by accuracy. The search never sees them.

    batch_size: questions per gradient step.
    Writes frontier.json (metrics in the points, competitors in meta), pruning_config-<budget>.json,
    frontier.svg and frontier.png to `output`; prints the report on stdout, and progress on stderr unless
    `quiet`. Returns the frontier.
    """
    require_matplotlib()
    started, say = time.perf_counter(), _speaker(quiet, stages=5)
    with output_folder(output) as folder:
        model, processor = testbed.load(model_name)
        say(f"searching {len(budgets)} budgets on {n_calibration} calibration questions")
        calibration = testbed.batches("calibration", n_calibration, batch_size, seed, model=model_name)
        with Progress(len(budgets) * (steps + refinement), "search", quiet) as bar:
            found = search(model, calibration, "fastv", budgets=budgets, steps=steps,
                           refinement=refinement, seed=seed, callback=bar)
        say(f"held-out accuracy on {n_test} test questions")
        arena = Arena(model, calibration, testbed.batches("test", n_test, 64, seed, model=model_name), quiet)
        frontier = _measure(arena, found)
        ratios = [i / grid_ratios for i in range(grid_ratios)]
        grid = single_layer_grid("fastv", arena.layers, ratios, arena.first_layer, arena.tokens)
        say(f"the exhaustive grid: {len(grid)} single-layer configurations")
        entries = _run_grid(arena, grid)
        say(f"published and fitted configurations, pooling, and {n_random} random schedules per budget")
        chance = {p.budget: _run_random(arena, p.budget, n_random, seed) for p in frontier.points}
        fitted = _run_fitted(arena, calibration, [p.budget for p in frontier.points])
        comparison = [_compare(p, entries, chance[p.budget], f) for p, f in zip(frontier.points, fitted)]
        chosen = [{**row["grid"], "kind": "selected", "budget": row["budget"]}
                  for row in comparison if row["grid"]]
        say("writing the results")
        frontier.meta |= {
            "competitors": entries + chosen + _run_published(arena) + _run_coarse(arena) + fitted
            + sum(chance.values(), []),
            "comparison": comparison, "n_test": n_test, "grid_size": len(grid),
            "cost_in_forward_passes": {"search": found.meta["forward_passes"],
                                       "grid": len(grid) * n_calibration,
                                       "random": len(frontier) * n_random * n_calibration},
            "seconds_in_all": round(time.perf_counter() - started, 1)}
        _write(frontier, folder)
    print(report(frontier))
    middle, example = frontier.points[len(frontier) // 3].config, testbed.examples("test", n_test, seed)[0]
    print(f"\nOne test question, within {percent(middle.budget, 0)} of the prunable compute:\n")
    inputs = testbed.collate([example], with_answers=False, model=model_name)
    print(side_by_side(answer(model, processor, inputs), answer(model, processor, inputs, middle), example.question + "?",
                       example.answer))
    print(f"\n{folder}{os.sep} holds frontier.json, frontier.svg, frontier.png and {len(frontier)} "
          "configurations, pruning_config-<budget>.json")
    return frontier


class Arena:
    """One model and two sets of questions, answered once by the full model: everybody meets here."""

    def __init__(self, model, calibration: Sequence[dict], test: Sequence[dict], quiet: bool):
        self.model, self.quiet = model, quiet
        adapter, method = adapter_for(model)(model), build_method("fastv")
        self.test = run_teacher(model, prepare(model, test))
        self.layers, self.first_layer = len(adapter.layers), method.first_layer
        self.cost = CostModel(adapter.dimensions(adapter.config), method)
        self.shapes = shapes(prepare(model, calibration))
        self.everything = self.limit(1.0)
        self.tokens = self.everything.tokens

    def limit(self, budget: float) -> Budget:
        """The budget, exactly as the search was held to it."""
        return Budget(budget, self.cost, *self.shapes, self.first_layer)

    def run(self, configs: Sequence[PruningConfig], label: str) -> list[Record]:
        """A record per configuration, on the test questions."""
        records = []
        with Progress(len(configs), label, self.quiet) as bar:
            for config in configs:
                records.append(evaluate(self.model, self.test, config))
                bar.update()
        return records

    def entry(self, kind: str, label: str, config: PruningConfig, record: Record, **more) -> dict:
        """An item of `meta["competitors"]`; its share is counted as the budgets count theirs."""
        share = self.everything.share(config.tokens(self.tokens))
        return {"kind": kind, "label": label, "share": share, "flops": record.flops,
                "accuracy": record.accuracy, "kl": record.kl, **more}


def metrics(record: Record) -> dict:
    """What a frontier's point keeps of a held-out record."""
    return {"accuracy": record.accuracy, "standard_error": standard_error(record.accuracy, record.n),
            "interval": list(wilson(int(record.correct.sum()), record.n)), "kl": record.kl,
            "flops": record.flops, "share": record.prunable_share, "n": record.n}


def _measure(arena: Arena, frontier: Frontier) -> Frontier:
    """The same points with held-out metrics, and the full model's and the floor's accuracy in meta."""
    nothing = PruningConfig("fastv", [1.0] * arena.first_layer + [0.0] * (arena.layers - arena.first_layer))
    full, floor = evaluate(arena.model, arena.test), evaluate(arena.model, arena.test, nothing)
    records = arena.run([p.config for p in frontier.points], "found")
    points = [replace(p, metrics=metrics(r)) for p, r in zip(frontier.points, records)]
    return Frontier(points, {**frontier.meta, "full_accuracy": full.accuracy, "floor": FLOOR,
                             "floor_accuracy": floor.accuracy, "floor_kl": floor.kl})


def _run_grid(arena: Arena, grid: list[PruningConfig]) -> list[dict]:
    entries = []
    for config, test in zip(grid, arena.run(grid, "grid")):
        (layer, ratio), = config.steps.items()
        entries.append(arena.entry("grid", f"layer {layer}, keep {ratio:.3g}", config, test, layer=layer,
                                   keep_ratio=ratio))
    return entries


def _run_published(arena: Arena) -> list[dict]:
    configs = published("fastv", arena.layers, at="layer")
    records = arena.run(list(configs.values()), "published")
    return [arena.entry("published", label, configs[label], r) for label, r in zip(configs, records)]


def _run_coarse(arena: Arena) -> list[dict]:
    """Fewer tokens from the start, no search: squares of tokens averaged, and smaller pictures."""
    pools = {f"pooled to {share:.0%} at layer 0": PruningConfig("pool", [share] * arena.layers) for share in (0.5, 0.25)}
    records = dict(zip(pools, arena.run(list(pools.values()), "pooled")))
    records |= {f"pictures of {scale:.0%} of the side": evaluate_downsampled(arena.model, arena.test, scale)
                for scale in (0.75, 0.5)}
    return [{"kind": "coarse", "label": label, "share": r.prunable_share, "flops": r.flops, "accuracy": r.accuracy, "kl": r.kl}
            for label, r in records.items()]


def _run_fitted(arena: Arena, calibration: Sequence[dict], budgets: Sequence[float]) -> list[dict]:
    configs = [fitprune_schedule(arena.model, calibration, budget, "fastv") for budget in budgets]
    return [arena.entry("fitted", "FitPrune's fit", config, record, budget=budget)
            for budget, config, record in zip(budgets, configs, arena.run(configs, "fitted"))]


def _run_random(arena: Arena, budget: float, count: int, seed: int) -> list[dict]:
    configs = random_schedules("fastv", arena.limit(budget), count, seed)
    records = arena.run(configs, f"random, {budget:g}")
    return [arena.entry("random", f"random {i}", c, r, budget=budget)
            for i, (c, r) in enumerate(zip(configs, records))]


def _compare(point: FrontierPoint, grid: list[dict], chance: list[dict], fitted: dict) -> dict:
    """One budget: the configuration found, the grid's within it, the random ones, and FitPrune's."""
    affordable = [g for g in grid if g["share"] <= point.budget + 1e-9]
    row: dict[str, Any] = {
        "budget": point.budget, "accuracy": point.metrics["accuracy"], "kl": point.metrics["kl"],
        "grid": min(affordable, key=lambda g: g["kl"], default=None),
        "hindsight": {}, "random": {}, "fitted": fitted}
    for name, best, sign in (("accuracy", max, 1), ("kl", min, -1)):
        values = [entry[name] for entry in chance]
        if values:
            row["random"][name] = {
                "mean": statistics.fmean(values), "std": statistics.pstdev(values), "best": best(values),
                "beaten": beaten(sign * row[name], [sign * v for v in values])}
        if affordable:
            row["hindsight"][name] = best(g[name] for g in affordable)
    return row


def beaten(value: float, others: Sequence[float]) -> float:
    """Percentage of `others` below `value`; ties count half.

    >>> beaten(3, [1, 2, 3, 4])
    62.5
    """
    return 100 * sum((o < value) + (o == value) / 2 for o in others) / len(others)


# ---- words ----------------------------------------------------------------------------------------------
def report(frontier: Frontier) -> str:
    """The demo's tables as text: what was found, how it compares, what it cost."""
    meta, costs = frontier.meta, frontier.meta["cost_in_forward_passes"]
    named = {"published": "FastV's published ", "coarse": ""}
    others = [[named[r["kind"]] + r["label"], percent(r["share"]), f"{r['kl']:.4f}", percent(r["accuracy"])]
              for r in meta["competitors"] if r["kind"] in named]
    floor = [FLOOR, "", f"{meta['floor_kl']:.4f}", percent(meta["floor_accuracy"])]
    return "\n\n".join([
        f"Found by gradient ({meta['method']}, {meta['kernel']} kernel, {meta['steps']} steps a budget):",
        _found(frontier),
        table(["for comparison", "share", "held-out KL", "held-out accuracy"], [floor, *others]),
        "Held-out accuracy at each budget, % (grid: of least KL on these questions; hindsight: of best "
        "accuracy):",
        _rivalry(meta["comparison"], "accuracy"),
        "Held-out KL at each budget, nats:", _rivalry(meta["comparison"], "kl"),
        f"Cost in forward passes of one question (a backward pass counts 2): search {costs['search']:,} "
        f"for {len(frontier)} budgets;\non the same calibration questions the grid's {meta['grid_size']} configurations "
        f"would be {costs['grid']:,}, the random schedules {costs['random']:,}. {meta['seconds_in_all']:.0f} s in all."])


def _found(frontier: Frontier) -> str:
    meta = frontier.meta
    rows = [[p.budget, flops(p.flops), percent(p.share), tokens(p.config.tokens(meta["n_visual"])),
             f"{p.loss:.4f}", f"{p.metrics['kl']:.4f}",
             plus_minus(p.metrics["accuracy"], p.metrics["standard_error"])] for p in frontier.points]
    full = plus_minus(meta["full_accuracy"], standard_error(meta["full_accuracy"], meta["n_test"]))
    rows += [["full", flops(meta["full_flops"]), percent(1), tokens([meta["n_visual"]] * meta["num_layers"]),
              "0.0000", "0.0000", full]]
    return table(["budget", "FLOPs", "share", "visual tokens entering each layer", "KL", "held-out KL",
                  "held-out accuracy"], rows)


def plus_minus(accuracy: float, error: float) -> str:
    """An accuracy and its standard error, as `93.2 ± 1.1 %`."""
    return f"{100 * accuracy:.1f} ± {100 * error:.1f} %"


def _rivalry(comparison: list[dict], name: str) -> str:
    def show(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}" if name == "accuracy" else f"{value:.4f}"

    rows = []
    for row in comparison:
        chance, grid = row["random"].get(name, {}), row["grid"] or {}
        rows.append([row["budget"], show(row[name]), show(grid.get(name)), show(row["hindsight"].get(name)),
                     show(row["fitted"][name]),
                     f"{show(chance.get('mean'))} ± {show(chance.get('std'))}", show(chance.get("best")),
                     f"{chance['beaten']:.0f} %" if chance else "–"])
    return table(["budget", "found", "grid", "hindsight", "FitPrune's fit", "random: mean ± s.d.", "best random",
                  "random ones beaten"], rows)


def _write(frontier: Frontier, folder: Path) -> None:
    for point in frontier.points:
        point.config.save(folder / f"pruning_config-{point.budget:g}.json")
    for name in ("frontier.svg", "frontier.png"):
        plot_frontier(frontier, folder / name)
    frontier.save(folder / "frontier.json")


def _speaker(quiet: bool, stages: int) -> Callable[[str], None]:
    """Numbered stage messages on stderr, with the time since the start."""
    numbers, started = iter(range(1, stages + 1)), time.perf_counter()

    def say(message: str) -> None:
        if not quiet:
            seconds = time.perf_counter() - started
            print(f"[{next(numbers)}/{stages}] {message} ({seconds:.0f} s)", file=sys.stderr, flush=True)

    return say
