"""`vispco demo`: search, evaluation and every competitor on the embedded testbed, in minutes on a CPU."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import testbed
from .baselines import published_fastv, random_schedules, single_layer_grid
from .budget import Budget
from .config import PruningConfig
from .evaluate import Record, evaluate
from .files import write_text
from .flops import CostModel, count_flops
from .frontier import Frontier, FrontierPoint
from .plot import plot_frontier
from .pruning import apply
from .registry import METHODS, adapter_for
from .report import Progress, flops, layers_entered, percent, standard_error, table, token_grid, tokens, wilson
from .search import search
from .teacher import Lesson, prepare, teach

#: Sizes of a smoke test.
FAST: dict[str, Any] = {"budgets": (0.3, 0.7), "n_calibration": 32, "n_test": 32, "steps": 4, "grid_ratios": 3,
                        "n_random": 3}
FLOOR = "no visual tokens after layer 0"


def run(output: str | os.PathLike = "vispco-demo", seed: int = 0, quiet: bool = False, *,
        model_name: str = "testbed-llava", budgets: Sequence[float] = (0.2, 0.3, 0.4, 0.5, 0.7, 0.9),
        n_calibration: int = 256, n_test: int = 512, steps: int = 60, grid_ratios: int = 20, n_random: int = 20,
        batch_size: int = 64) -> Frontier:
    """Search the testbed's frontier, measure it on held-out questions beside its competitors, and write it all down.

    Competitors, on the same questions: FastV's published configurations, `n_random` random schedules per budget,
    and every single-layer configuration with `grid_ratios` keep ratios a layer. The grid's entry at a budget is
    chosen as a user would have to choose it, by calibration KL; the best on the test itself is shown as hindsight.

    Writes frontier.json (metrics in the points, competitors in meta), pruning_config-<budget>.json, frontier.svg and
    frontier.png to `output`; prints the report on stdout, and progress on stderr unless `quiet`.
    Returns the frontier.
    """
    say, folder, started = _speaker(quiet, stages=5), Path(output), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "frontier.svg", "")  # a folder that cannot be written shows now, not after the search
    model, processor = testbed.load(model_name)

    say(f"searching {len(budgets)} budgets on {n_calibration} calibration questions")
    calibration = testbed.batches("calibration", n_calibration, batch_size, seed)
    with Progress(len(budgets) * steps, "search", quiet) as bar:
        frontier = search(model, calibration, "fastv", budgets=budgets, steps=steps, seed=seed, callback=bar)

    say(f"the full model on {n_calibration} calibration and {n_test} test questions")
    arena = Arena(model, calibration, testbed.batches("test", n_test, batch_size, seed), quiet)
    measured = _measure_frontier(arena, frontier)

    say("the exhaustive single-layer grid, on both")
    ratios = [i / grid_ratios for i in range(grid_ratios)]
    grid = single_layer_grid("fastv", arena.layers, ratios, arena.first_layer, arena.tokens)
    rivals = [_grid_rival(arena, *found) for found in zip(grid, arena.on_test(grid, "grid, test"),
                                                          arena.on_calibration(grid, "grid, calibration"))]
    say(f"FastV's published configurations, and {n_random} random schedules per budget")
    published = published_fastv(arena.layers)
    rivals += [arena.rival("published", label, config, record) for (label, config), record in
               zip(published.items(), arena.on_test(list(published.values()), "published"))]
    comparison = []
    for point, record in zip(measured.points, arena.records):
        limit = arena.limit(point.budget)
        drawn = random_schedules("fastv", limit, n_random, seed)
        some = [arena.rival("random", f"random {i}", config, found, budget=point.budget) for i, (config, found) in
                enumerate(zip(drawn, arena.on_test(drawn, f"random, {point.budget:g}")))]
        affordable = [r for r, config in zip(rivals, grid) if limit.holds(config.tokens(limit.tokens))]
        comparison.append(_compare(point, record, some, affordable))
        rivals += some
    rivals += [{**row["grid"], "kind": "selected", "budget": row["budget"]} for row in comparison if row["grid"]]

    say("writing the results")
    costs = {"search": frontier.meta["forward_passes"], "grid": len(grid) * n_calibration}
    measured.meta.update(competitors=rivals, comparison=comparison, cost_in_forward_passes=costs, n_test=n_test,
                         grid_size=len(grid), full=None, seconds_in_all=round(time.perf_counter() - started, 1))
    measured.meta.pop("full")
    _write(measured, folder)
    print(report(measured))
    print("\n" + show_one(model, processor, measured.points[len(measured) // 3].config,
                          testbed.examples("test", n_test, seed)[0]))
    print(f"\nwritten to {folder}{os.sep}: frontier.json, frontier.svg, frontier.png, "
          f"{len(measured)} pruning_config-<budget>.json")
    return measured


class Arena:
    """One model and two sets of questions, each answered once by the full model: everybody meets here."""

    def __init__(self, model, calibration: Sequence[dict], test: Sequence[dict], quiet: bool):
        self.model, self.quiet = model, quiet
        self.adapter = adapter_for(model)(model)
        self.calibration, self.test = (teach(model, prepare(model, batches)) for batches in (calibration, test))
        method = METHODS.get("fastv")()
        self.layers, self.first_layer = len(self.adapter.layers), method.first_layer
        self.cost = CostModel(self.adapter.dimensions(self.adapter.config), method)
        self.shape = tuple(torch.cat([getattr(x, n) for x in self.calibration]) for n in ("n_visual", "n_text"))
        self.everything = self.limit(1.0)
        self.tokens = self.everything.tokens
        self.records: list[Record] = []

    def limit(self, budget: float) -> Budget:
        """The budget that the search was given."""
        return Budget(budget, self.cost, *self.shape, self.first_layer)

    def on_test(self, configs: Sequence[PruningConfig], label: str) -> list[Record]:
        """A record per configuration, on held-out questions."""
        return self._run(self.test, configs, label)

    def on_calibration(self, configs: Sequence[PruningConfig], label: str) -> list[Record]:
        """A record per configuration, on the questions that the search saw."""
        return self._run(self.calibration, configs, label)

    def _run(self, lessons: list[Lesson], configs: Sequence[PruningConfig], label: str) -> list[Record]:
        records = []
        with Progress(len(configs), label, self.quiet) as bar:
            for config in configs:
                records.append(evaluate(self.model, lessons, config))
                bar.update()
        return records

    def rival(self, kind: str, label: str, config: PruningConfig, record: Record, **more) -> dict:
        """An entry of `meta["competitors"]`; the share is counted as the budgets count it."""
        return {"kind": kind, "label": label, "share": self.everything.share(config.tokens(self.tokens)),
                "flops": record.flops, "accuracy": record.accuracy, "kl": record.kl, **more}


def metrics(record: Record) -> dict:
    """What a frontier's point keeps of a held-out record."""
    right = int(record.correct.sum())
    return {"accuracy": record.accuracy, "standard_error": standard_error(record.accuracy, record.n),
            "interval": list(wilson(right, record.n)), "kl": record.kl, "flops": record.flops,
            "share": record.prunable_share, "n": record.n}


def _measure_frontier(arena: Arena, frontier: Frontier) -> Frontier:
    """The same points with held-out metrics, and the full model's and the floor's accuracy in meta."""
    full = evaluate(arena.model, arena.test)
    floor = arena.on_test([PruningConfig("fastv", [1.0] + [0.0] * (arena.layers - 1))], "floor")[0]
    arena.records = arena.on_test([p.config for p in frontier.points], "frontier")
    points = [FrontierPoint(**{**vars(p), "metrics": metrics(r)}) for p, r in zip(frontier.points, arena.records)]
    return Frontier(points, {**frontier.meta, "full_accuracy": full.accuracy, "floor": FLOOR,
                             "floor_accuracy": floor.accuracy, "floor_kl": floor.kl})


def _grid_rival(arena: Arena, config: PruningConfig, test: Record, calibration: Record) -> dict:
    (layer, ratio), = config.steps.items()
    return arena.rival("grid", f"layer {layer}, keep {ratio:.3g}", config, test, calibration_kl=calibration.kl)


def _compare(point: FrontierPoint, record: Record, some: list[dict], affordable: list[dict]) -> dict:
    """One budget: the learned configuration against the random ones and the grid."""
    row: dict[str, Any] = {"budget": point.budget, "accuracy": record.accuracy, "kl": record.kl, "random": {},
                           "grid": min(affordable, key=lambda r: r["calibration_kl"], default=None), "hindsight": {}}
    for name, best, sign in (("accuracy", max, 1), ("kl", min, -1)):
        values = [r[name] for r in some]
        if values:
            row["random"][name] = {"mean": statistics.fmean(values), "std": statistics.pstdev(values),
                                   "best": best(values), "percentile": beaten(sign * getattr(record, name),
                                                                              [sign * v for v in values])}
        if affordable:
            row["hindsight"][name] = best(r[name] for r in affordable)
    return row


def beaten(value: float, others: Sequence[float]) -> float:
    """Percentage of `others` below `value`; ties count half.

    >>> beaten(3, [1, 2, 3, 4])
    62.5
    """
    return 100 * (sum(o < value for o in others) + sum(o == value for o in others) / 2) / len(others)


# ---- words -----------------------------------------------------------------------------------------------------
def report(frontier: Frontier) -> str:
    """The demo's tables as text: what was found, how it compares, what it cost."""
    meta, first = frontier.meta, frontier.points[0].metrics
    rows = [[p.budget, flops(p.flops), percent(p.share), tokens(p.config.tokens(meta["n_visual"])), f"{p.loss:.4f}",
             f"{p.metrics['kl']:.4f}", plus_minus(p.metrics["accuracy"], p.metrics["standard_error"])]
            for p in frontier.points]
    rows += [["full", flops(meta["full_flops"]), percent(1), tokens([meta["n_visual"]] * meta["num_layers"]), "0.0000",
              "0.0000", plus_minus(meta["full_accuracy"], standard_error(meta["full_accuracy"], first["n"]))]]
    found = table(["budget", "FLOPs", "share", "visual tokens entering each layer", "KL", "held-out KL",
                   "held-out accuracy"], rows)
    published = table(["FastV's published", "share", "held-out KL", "held-out accuracy"],
                      [[r["label"], percent(r["share"]), f"{r['kl']:.4f}", percent(r["accuracy"])]
                       for r in meta["competitors"] if r["kind"] == "published"])
    costs = meta["cost_in_forward_passes"]
    return "\n\n".join([
        f"Found by gradient ({meta['method']}, {meta['kernel']} kernel, {meta['steps']} steps a budget):", found,
        f"{FLOOR}: {percent(meta['floor_accuracy'])}", published,
        "Held-out accuracy at each budget (grid: chosen by calibration KL; hindsight: best on the test itself):",
        _rivalry(meta["comparison"], "accuracy"), "Held-out KL at each budget:", _rivalry(meta["comparison"], "kl"),
        f"Cost in forward passes of one question (a backward pass counts 2): search {costs['search']:,} for "
        f"{len(frontier)} budgets; grid {costs['grid']:,} for {meta['grid_size']} configurations "
        f"({costs['grid'] / costs['search']:.2g} times the search). {meta['seconds_in_all']:.0f} s in all."])


def plus_minus(accuracy: float, error: float) -> str:
    """`93.2 ± 1.1 %`."""
    return f"{100 * accuracy:.1f} ± {100 * error:.1f} %"


def _rivalry(comparison: list[dict], name: str) -> str:
    def show(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}" if name == "accuracy" else f"{value:.4f}"

    rows = []
    for row in comparison:
        chance = row["random"].get(name, {})
        rows.append([row["budget"], show(row[name]), show(row["grid"] and row["grid"][name]),
                     show(row["hindsight"].get(name)), f"{show(chance.get('mean'))} ± {show(chance.get('std'))}",
                     show(chance.get("best")), f"{chance['percentile']:.0f} %" if chance else "–"])
    return table(["budget", "found", "grid", "hindsight", "random (mean ± s.d.)", "best random",
                  "random ones beaten"], rows)


def answer(model, processor, inputs: dict, config: PruningConfig | None = None) -> dict:
    """One question, answered greedily in full or under `config`: the answer, tokens, FLOPs, share.

    inputs: one unpadded prompt. `depth`: how many layers each visual token entered.
    """
    adapter = adapter_for(model)(model)
    visual = adapter.visual_mask(inputs["input_ids"], None)[0]
    n_visual, layers = int(visual.sum()), len(adapter.layers)
    depth = [layers] * n_visual
    options = {"max_new_tokens": 16, "do_sample": False}
    with torch.no_grad():
        if config is None:
            output = model.generate(**inputs, **options)
        else:
            with apply(model, config) as pruner:
                output = model.generate(**inputs, **options)
                depth = layers_entered({i: kept[0] for i, kept in pruner.kept().items()}, visual, layers)
    text = processor.decode(output[0, visual.shape[0]:], skip_special_tokens=True).strip()
    count = count_flops(model, config, n_visual, visual.shape[0] - n_visual)
    return {"answer": text, "tokens": count.tokens, "flops": count.total, "share": count.prunable_share,
            "depth": depth}


def side_by_side(model, processor, config: PruningConfig, inputs: dict, question: str, expected: str | None) -> str:
    """One question answered by the full and by the pruned model, as text."""
    full, pruned = answer(model, processor, inputs), answer(model, processor, inputs, config)
    rows = [[name, a["answer"] or "(nothing)", flops(a["flops"]), percent(a["share"]), tokens(a["tokens"])]
            for name, a in (("full", full), ("pruned", pruned))]
    head = f"question: {question}" + (f"\nexpected: {expected}" if expected else "")
    body = table(["model", "answer", "FLOPs", "share", "visual tokens entering each layer"], rows)
    return (f"{head}\n\n{body}\n\nwhere the visual tokens are, and how long they stay (█ longest, · shortest):\n"
            f"{token_grid(pruned['depth'])}")


def show_one(model, processor, config: PruningConfig, example) -> str:
    """`side_by_side` for an example of the testbed."""
    inputs = testbed.collate([example], with_answers=False)
    title = f"One test question at budget {config.budget} ({config.describe()}):\n\n" if config.budget else ""
    return title + side_by_side(model, processor, config, inputs, example.question + "?", example.answer)


def _write(frontier: Frontier, folder: Path) -> None:
    for point in frontier.points:
        point.config.save(folder / f"pruning_config-{point.budget:g}.json")
    for name in ("frontier.svg", "frontier.png"):
        plot_frontier(frontier, folder / name)
    frontier.save(folder / "frontier.json")


def _speaker(quiet: bool, stages: int) -> Callable[[str], None]:
    """Numbered stage messages on stderr."""
    done = 0

    def say(message: str) -> None:
        nonlocal done
        done += 1
        if not quiet:
            print(f"[{done}/{stages}] {message}", file=sys.stderr, flush=True)

    return say
