"""`vispco demo`: a search and all its competitors on the embedded testbed, in minutes on a CPU."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .. import testbed
from ..baselines.downsample import evaluate_downsampled
from ..baselines.grids import published, single_layer_grid
from ..baselines.rules import fitprune_schedule
from ..baselines.searchers import random_schedules
from ..budget import Budget
from ..calibration import prepare, run_teacher, shapes
from ..config import PruningConfig
from ..evaluate import Record, evaluate
from ..flops import CostModel
from ..frontier import Frontier
from ..plot import plot_frontier, require_matplotlib
from ..registry import adapter_for, build_method
from ..search import Gradient, search
from ..utils.console import output_folder, percent
from .answer import answer, side_by_side
from .demo_report import FLOOR, compare, report
from .options import non_negative_int
from .output import metrics, save_configs
from .progress import Progress, track

SUMMARY = "run everything on the embedded testbed, in minutes on a CPU"
EXAMPLES = ("--output vispco-demo",)
#: Sizes of a smoke test.
FAST: dict[str, Any] = {
    "budgets": (0.3, 0.7),
    "n_calibration": 32,
    "n_test": 32,
    "steps": 4,
    "grid_ratios": 3,
    "n_random": 3,
}
#: Sizes for a decoder of thirty layers and 135 million parameters.
DEEP: dict[str, Any] = {
    "budgets": (0.2, 0.3, 0.5),
    "n_calibration": 64,
    "n_test": 96,
    "grid_ratios": 4,
    "n_random": 4,
}


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of `vispco demo`."""
    add = sub.add_argument
    add("--output", "-o", default="vispco-demo", metavar="FOLDER", help="for everything it finds")
    add("--model", default="testbed-llava", help=", ".join(testbed.MODELS))
    add("--seed", type=non_negative_int, default=0, help="draws questions, orders the search")
    add("--fast", action="store_true", help="a smoke test with tiny sizes")
    add("--quiet", "-q", action="store_true", help="no progress on stderr")


def run(options: argparse.Namespace) -> None:
    """Run the demonstration, in full or with tiny sizes."""
    sizes = FAST if options.fast else DEEP if options.model == "testbed-smollm" else {}
    demonstrate(options.output, options.seed, options.quiet, model_name=options.model, **sizes)


def demonstrate(
    output: str | os.PathLike = "vispco-demo",
    seed: int = 0,
    quiet: bool = False,
    *,
    model_name: str = "testbed-llava",
    budgets: Sequence[float] = (0.2, 0.35, 0.5, 0.7, 0.9),
    n_calibration: int = 128,
    n_test: int = 256,
    steps: int = 20,
    refinement: int = 6,
    grid_ratios: int = 10,
    n_random: int = 24,
    batch_size: int = 16,
) -> Frontier:
    """Search the testbed's frontier, and measure it on held-out questions beside its competitors.

    Competitors, on the same questions: FastV's published configurations, `n_random` random
    schedules per budget, FitPrune's fit of attention statistics, tokens pooled in squares, smaller
    pictures, and every single-layer configuration with `grid_ratios` keep ratios a layer. The
    grid's best are chosen in hindsight, on the test questions themselves: by KL, and by accuracy.
    The search never sees these questions.

    batch_size: questions per gradient step.
    Writes frontier.json (metrics in the points, competitors in meta), pruning_config-<budget>.json,
    frontier.svg and frontier.png to `output`; prints the report on stdout, and progress on stderr
    unless `quiet`. Returns the frontier.
    """
    require_matplotlib()
    started = time.perf_counter()

    def say(stage: int, message: str) -> None:
        if not quiet:
            seconds = time.perf_counter() - started
            print(f"[{stage}/5] {message} ({seconds:.0f} s)", file=sys.stderr, flush=True)

    with output_folder(output) as folder:
        model, processor = testbed.load(model_name)
        say(1, f"searching {len(budgets)} budgets on {n_calibration} calibration questions")
        where: dict[str, Any] = {"seed": seed, "model": model_name}
        calibration = testbed.batches("calibration", n_calibration, batch_size, **where)
        how: dict[str, Any] = {"start": Gradient(steps), "refinement": refinement, "seed": seed}
        with Progress(len(budgets) * (steps + refinement), "search", quiet) as bar:
            found = search(model, calibration, "fastv", budgets=budgets, callback=bar, **how)

        say(2, f"held-out accuracy on {n_test} test questions")
        arena = Arena(model, calibration, testbed.batches("test", n_test, 64, **where))
        frontier = arena.measure(found)

        ratios = [i / grid_ratios for i in range(grid_ratios)]
        grid = single_layer_grid("fastv", arena.layers, ratios, arena.first_layer, arena.n_visual)
        say(3, f"the exhaustive grid: {len(grid)} single-layer configurations")
        competitors = []
        for config in track(grid, "grid", quiet):
            ((layer, ratio),) = config.steps.items()
            label = f"layer {layer}, keep {ratio:.3g}"
            more = {"layer": layer, "keep_ratio": ratio}
            competitors.append(arena.competitor("grid", label, config, **more))

        fixed = "published and fitted configurations, pooling"
        say(4, f"{fixed}, and {n_random} random schedules per budget")
        for name, config in published("fastv", arena.layers, at="layer").items():
            competitors.append(arena.competitor("published", name, config))
        competitors += arena.coarse()
        for point in frontier.points:
            budget = {"budget": point.budget}
            config = fitprune_schedule(model, calibration, point.budget, "fastv")
            competitors.append(arena.competitor("fitted", "FitPrune's fit", config, **budget))
            drawn = random_schedules("fastv", arena.limit(point.budget), n_random, seed)
            for i, config in enumerate(track(drawn, f"random, {point.budget:g}", quiet)):
                competitors.append(arena.competitor("random", f"random {i}", config, **budget))

        say(5, "writing the results")
        comparison = [compare(point, competitors) for point in frontier.points]
        for row in comparison:
            if row["grid"]:
                competitors.append({**row["grid"], "kind": "selected", "budget": row["budget"]})
        frontier.meta |= {
            "competitors": competitors,
            "comparison": comparison,
            "n_test": n_test,
            "grid_size": len(grid),
            "cost_in_forward_passes": {
                "search": found.meta["forward_passes"],
                "grid": len(grid) * n_calibration,
                "random": len(frontier) * n_random * n_calibration,
            },
            "seconds_in_all": round(time.perf_counter() - started, 1),
        }
        save_configs(frontier, folder, "pruning_config")
        plot_frontier(frontier, folder / "frontier.svg")
        plot_frontier(frontier, folder / "frontier.png")
        frontier.save(folder / "frontier.json")
    print(report(frontier))
    config = frontier.points[len(frontier) // 3].config
    example = testbed.examples("test", n_test, seed)[0]
    inputs = testbed.collate([example], with_answers=False, model=model_name)
    full, pruned = (answer(model, processor, inputs, c) for c in (None, config))
    print(f"\nOne test question, within {percent(config.budget, 0)} of the prunable compute:\n")
    print(side_by_side(full, pruned, f"{example.question}?", example.answer))
    files = "frontier.json, frontier.svg, frontier.png"
    configs = f"{len(frontier)} configurations, pruning_config-<budget>.json"
    print(f"\n{folder}{os.sep} holds {files} and {configs}")
    return frontier


class Arena:
    """The held-out questions, answered once by the full model. All competitors meet here."""

    def __init__(self, model, calibration: Sequence[dict], test: Sequence[dict]):
        adapter, method = adapter_for(model)(model), build_method("fastv")
        self.model = model
        self.test = run_teacher(model, prepare(model, test))
        self.layers, self.first_layer = len(adapter.layers), method.first_layer
        self.cost = CostModel(adapter.dimensions(adapter.config), method)
        self.shapes = shapes(prepare(model, calibration))
        self.everything = self.limit(1.0)
        self.n_visual = self.everything.tokens

    def limit(self, budget: float) -> Budget:
        """The budget, exactly as the search was held to it."""
        return Budget(budget, self.cost, *self.shapes, self.first_layer)

    def measure(self, found: Frontier) -> Frontier:
        """The points with held-out metrics; full model and floor go into meta."""
        points = []
        for point in found.points:
            record = evaluate(self.model, self.test, point.config)
            points.append(replace(point, metrics=metrics(record)))
        dropped = self.layers - self.first_layer
        nothing = PruningConfig("fastv", [1.0] * self.first_layer + [0.0] * dropped)
        full, floor = evaluate(self.model, self.test), evaluate(self.model, self.test, nothing)
        accuracy = {"full_accuracy": full.accuracy, "floor_accuracy": floor.accuracy}
        return Frontier(points, {**found.meta, **accuracy, "floor": FLOOR, "floor_kl": floor.kl})

    def competitor(self, kind: str, label: str, config: PruningConfig, **more) -> dict:
        """An item of `meta["competitors"]`; its share is counted as the budgets count theirs."""
        record = evaluate(self.model, self.test, config)
        share = self.everything.share(config.tokens(self.n_visual))
        return {**_entry(kind, label, record), "share": share, **more}

    def coarse(self) -> list[dict]:
        """Fewer tokens from the start: squares of tokens averaged, and smaller pictures."""
        entries = []
        for share in (0.5, 0.25):
            config = PruningConfig("pool", [share] * self.layers)
            record = evaluate(self.model, self.test, config)
            entries.append(_entry("coarse", f"pooled to {share:.0%} at layer 0", record))
        for scale in (0.75, 0.5):
            record = evaluate_downsampled(self.model, self.test, scale)
            entries.append(_entry("coarse", f"pictures of {scale:.0%} of the side", record))
        return entries


def _entry(kind: str, label: str, record: Record) -> dict:
    cost = {"share": record.prunable_share, "flops": record.flops}
    return {"kind": kind, "label": label, **cost, "accuracy": record.accuracy, "kl": record.kl}
