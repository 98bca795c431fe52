"""`vispco demo`: a search and its competitors on the embedded testbed, in minutes on a CPU."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from .. import testbed
from ..baselines.downsample import evaluate_downsampled
from ..baselines.grids import published
from ..budget import Budget
from ..calibration import prepare, run_teacher, shapes
from ..config import PruningConfig
from ..evaluate import Record, evaluate
from ..flops import CostModel
from ..frontier import Frontier
from ..plot import plot_frontier, plot_profile, require_matplotlib
from ..registry import adapter_for, build_method
from ..search import ProfiledFrontier, search
from ..solvers.before import most
from ..utils.console import output_folder, percent
from .answer import answer, side_by_side
from .demo_report import FLOOR, compare, report
from .options import non_negative_int
from .output import metrics, save_configs

SUMMARY = "run everything on the embedded testbed, in minutes on a CPU"
EXAMPLES = ("--output vispco-demo",)
#: Sizes of a smoke test.
FAST: dict[str, Any] = {
    "budgets": (0.3, 0.7),
    "n_calibration": 32,
    "n_test": 32,
    "method": ["fastv", "visionzip"],
    "refinement": 1,
}
#: Sizes for a decoder of thirty layers and 135 million parameters.
DEEP: dict[str, Any] = {"budgets": (0.2, 0.3, 0.5), "n_calibration": 64, "n_test": 96}
#: Sides of smaller pictures, as shares of the whole ones.
SCALES = 0.75, 0.5


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
    method: str | Sequence[str] = "auto",
    budgets: Sequence[float] = (0.2, 0.35, 0.5, 0.7, 0.9),
    n_calibration: int = 96,
    n_test: int = 256,
    refinement: int = 4,
) -> Frontier:
    """Find methods and schedules on the testbed, and measure them beside what costs no search.

    Competitors, on the same held-out questions, which the search never sees: FastV's published
    configurations, tokens chosen at random within the schedules that were found, tokens pooled
    before the first layer on the same budgets, and smaller pictures.

    method: what the search may rank with; see `vispco.search`.
    Writes frontier.json (metrics in the points, competitors in meta), profile.json, a
    pruning_config-<budget>.json for each budget, and the pictures frontier and profile, as .svg and
    .png, to `output`. Prints the report on stdout, and progress on stderr unless `quiet`. Returns
    the frontier.
    """
    require_matplotlib()
    started = time.perf_counter()

    def say(stage: int, message: str) -> None:
        if not quiet:
            seconds = time.perf_counter() - started
            print(f"[{stage}/4] {message} ({seconds:.0f} s)", file=sys.stderr, flush=True)

    with output_folder(output) as folder:
        model, processor = testbed.load(model_name)
        say(1, f"profile, and a search for {len(budgets)} budgets, on {n_calibration} questions")
        where: dict[str, Any] = {"seed": seed, "model": model_name}
        calibration = testbed.batches("calibration", n_calibration, 16, **where)
        how: dict[str, Any] = {"start": "profile", "refinement": refinement, "seed": seed}
        shown = False if quiet else None
        found = search(model, calibration, method, budgets, progress=shown, **how)
        profile = cast(ProfiledFrontier, found).profile

        say(2, f"accuracy on {n_test} held-out questions")
        arena = Arena(model, calibration, testbed.batches("test", n_test, 64, **where))
        frontier = arena.measure(found)

        say(3, "published settings, random and pooled tokens, smaller pictures")
        competitors = arena.published()
        for point in frontier.points:
            competitors += arena.rivals(point.budget, point.config.keep_ratios)
        competitors += arena.smaller_pictures()

        say(4, "writing the results")
        frontier.meta |= {
            "model": model_name,
            "data": f"{n_test} held-out questions",
            "competitors": competitors,
            "comparison": [compare(point, competitors) for point in frontier.points],
            "profile_passes": profile.forward_passes,
            "n_test": n_test,
            "seconds_in_all": round(time.perf_counter() - started, 1),
        }
        save_configs(frontier, folder, "pruning_config")
        named = {f"found, with the best of {len(profile.methods)} methods": frontier}
        for suffix in ("svg", "png"):
            plot_frontier(named, folder / f"frontier.{suffix}")
            plot_profile(profile, folder / f"profile.{suffix}")
        profile.save(folder / "profile.json")
        frontier.save(folder / "frontier.json")
    print(report(frontier, profile))
    print(
        "\n" + _example(arena, processor, frontier, testbed.examples("test", n_test, seed), where)
    )
    files = "frontier.json and profile.json, both as .svg and .png,"
    configs = f"{len(frontier)} configurations, pruning_config-<budget>.json"
    print(f"\n{folder}{os.sep} holds {files} and {configs}")
    return frontier


def _example(arena: Arena, processor, frontier: Frontier, examples: Sequence, where: dict) -> str:
    """One question that the full and the pruned model answer rightly, and how the latter does."""
    i = len(frontier) // 3
    config, right = frontier.points[i].config, arena.right[i]
    both = (right & arena.full.correct).nonzero()[:, 0].tolist()
    n = int(right.sum())
    budget, number = percent(config.budget, 0), both[0] if both else 0
    why = "the first that both answer rightly" if both else "the first one: no answer is right"
    inputs = testbed.collate([examples[number]], with_answers=False, model=where["model"])
    full, pruned = (answer(arena.model, processor, inputs, c) for c in (None, config))
    head = f"One held-out question at {budget} of the prunable compute. It was chosen: {why}.\n"
    head += f"Over all {len(right)} questions the pruned model is right {n} times, the full one "
    head += f"{int(arena.full.correct.sum())} times.\n\n"
    example = examples[number]
    return head + side_by_side(full, pruned, f"{example.question}?", example.answer)


class Arena:
    """The held-out questions, answered once by the full model. All competitors meet here.

    full: what the full model answers. right: (N,) bool for each configuration found: which answers
    are right.
    """

    def __init__(self, model, calibration: Sequence[dict], test: Sequence[dict]):
        self.model, self.adapter = model, adapter_for(model)(model)
        self.test = run_teacher(model, prepare(model, test))
        self.layers = len(self.adapter.layers)
        self.shapes = shapes(prepare(model, calibration))
        self.full = evaluate(model, self.test)
        self.right: list[Any] = []

    def limit(self, budget: float, method: str) -> Budget:
        """A budget, held exactly as the search holds it, with what a method's ranking costs."""
        scorer = build_method(method)
        cost = CostModel(self.adapter.dimensions(self.adapter.config), scorer)
        return Budget(budget, cost, *self.shapes, scorer.first_layer)

    def measure(self, found: Frontier) -> Frontier:
        """The points with held-out metrics; full model and floor go into meta."""
        points = []
        for point in found.points:
            record = evaluate(self.model, self.test, point.config)
            points.append(replace(point, metrics=metrics(record)))
            self.right.append(record.correct)
        nothing = PruningConfig("random", [0.0] * self.layers)
        floor = evaluate(self.model, self.test, nothing)
        accuracy = {"full_accuracy": self.full.accuracy, "floor_accuracy": floor.accuracy}
        return Frontier(points, {**found.meta, **accuracy, "floor": FLOOR, "floor_kl": floor.kl})

    def competitor(self, kind: str, label: str, config: PruningConfig, **more) -> dict:
        """An item of `meta["competitors"]`."""
        return {**_entry(kind, label, evaluate(self.model, self.test, config)), **more}

    def published(self) -> list[dict]:
        """FastV's published configurations."""
        known = published("fastv", self.layers, at="layer")
        return [self.competitor("published", name, config) for name, config in known.items()]

    def rivals(self, budget: float, ratios: Sequence[float]) -> list[dict]:
        """On one budget: random tokens in the schedule (L,) found for it, and pooled tokens."""
        limit = self.limit(budget, "pool")
        fits = most(limit)
        pooled = PruningConfig("pool", [fits / limit.tokens] * self.layers)
        blind, own = PruningConfig("random", ratios), {"budget": budget}
        return [
            self.competitor("blind", f"random tokens, {budget:.0%}", blind, **own),
            self.competitor("coarse", f"pooled to {fits} tokens", pooled, **own),
        ]

    def smaller_pictures(self) -> list[dict]:
        """Pictures of fewer pixels, of which everything is kept."""
        found = ((scale, evaluate_downsampled(self.model, self.test, scale)) for scale in SCALES)
        return [_entry("coarse", f"pictures of {s:.0%} of the side", record) for s, record in found]


def _entry(kind: str, label: str, record: Record) -> dict:
    cost = {"share": record.prunable_share, "flops": record.flops}
    return {"kind": kind, "label": label, **cost, "accuracy": record.accuracy, "kl": record.kl}
