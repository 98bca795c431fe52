"""What a frontier costs, in seconds and in forward passes.

One search with start="shared" is compared with a grid of 700 configurations.

    python -m benchmarks.frontier_cost --model testbed-llava --output frontier_cost.json

The grid is the paper's: 20 keep ratios at 35 layers. A model with fewer layers gets as many ratios
as make 700, rounded up. The time of the grid is extrapolated from `--sample` of its configurations,
evenly spread; its forward passes are exact.
"""

from __future__ import annotations

from math import ceil

import torch

import vispco
from vispco import PruningConfig, testbed
from vispco.baselines.grids import single_layer_grid
from vispco.calibration import prepare, run_teacher
from vispco.evaluate import evaluate
from vispco.registry import METHODS, adapter_for

from .side_by_side import arguments, run

BUDGETS = [0.2, 0.35, 0.5, 0.7, 0.9]


def grid(method: str, layers: int, count: int) -> list[PruningConfig]:
    """A single-layer grid of `count` configurations.

    >>> len(grid("fastv", 36, 700)), len(grid("fastv", 8, 700))
    (700, 700)
    """
    first = METHODS.get(method).first_layer
    ratios = ceil(count / (layers - first))
    return single_layer_grid(method, layers, [i / ratios for i in range(ratios)], first)[:count]


def measure(options) -> list[dict]:
    """Seconds of the search over those of the grid, one pair a round.

    Also the forward passes of both.
    """
    if options.sample < 1 or options.configurations < options.sample:
        raise ValueError(
            "--sample must be from 1 to the number of configurations, "
            f"{options.configurations}, got {options.sample}"
        )
    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    model = testbed.load(options.model)[0].to(options.device, getattr(torch, options.dtype))
    batches = testbed.batches(
        "calibration", options.questions, options.batch, options.seed, model=options.model
    )
    configs = grid(options.method, len(adapter_for(model)(model).layers), options.configurations)
    chosen = torch.linspace(0, len(configs) - 1, options.sample).round().long().tolist()
    ratios, passes = [], {"grid": options.questions * (1 + len(configs))}
    for turn in range(-options.warmup, options.rounds):

        def search():
            with torch.enable_grad():
                learned = vispco.search(
                    model,
                    batches,
                    options.method,
                    budgets=(),
                    seed=options.seed,
                    start=vispco.Shared(steps=options.steps),
                )
                passes["search"] = learned.frontier(BUDGETS, options.refinement, options.seed).meta[
                    "forward_passes"
                ]

        def few():
            prepared = run_teacher(model, prepare(model, batches))
            for i in chosen:
                evaluate(model, prepared, configs[i])

        ours, part = options.timer(search), options.timer(few)
        if turn >= 0:
            # `few` runs the full model once, too: it is one configuration more.
            ratios.append(ours / (part * (1 + len(configs)) / (1 + len(chosen))))
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    low, middle, high = torch.tensor(ratios, dtype=torch.float64).quantile(quantiles).tolist()
    passes_ratio = passes["search"] / passes["grid"]
    print(
        f"{options.model}: the search takes {middle:.3f} ({low:.3f} to {high:.3f}) of the grid's "
        f"time and {passes_ratio:.3f} of its forward passes "
        f"({passes['search']} of {passes['grid']})"
    )
    figure = {
        "model": options.model,
        "method": options.method,
        "questions": options.questions,
        "batch": options.batch,
        "steps": options.steps,
        "refinement": options.refinement,
        "budgets": BUDGETS,
        "configurations": len(configs),
        "timed": len(chosen),
        "extrapolated": len(chosen) < len(configs),
        "ratio": middle,
        "low": low,
        "high": high,
        "passes": passes,
        "passes_ratio": passes_ratio,
    }
    return [figure]


def main(argv=None) -> int:
    """Run the command; returns the exit code."""
    parser = arguments("benchmarks.frontier_cost", __doc__, "frontier_cost.json")
    models, methods = testbed.MODELS, METHODS.names()
    parser.add_argument("--model", default="testbed-llava", choices=models, help="of the testbed")
    parser.add_argument("--method", default="fastv", choices=methods, help="that ranks the tokens")
    parser.add_argument("--questions", type=int, default=256, help="calibration data of both")
    parser.add_argument("--batch", type=int, default=8, help="questions in a batch, of both")
    parser.add_argument("--steps", type=int, default=200, help="of the search")
    parser.add_argument("--refinement", type=int, default=0, help="rounds of local moves after it")
    parser.add_argument("--configurations", type=int, default=700, help="of the grid")
    parser.add_argument("--sample", type=int, default=14, help="configurations that are timed")
    return run(parser, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
