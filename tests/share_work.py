"""What `test_distributed.py` runs in one process and in two.

Everything that a search sums over questions.
"""

import json
import sys

import torch

import vispco
from vispco import testbed
from vispco.evaluate import evaluate
from vispco.utils.distributed import broadcast, gathered, launched, processes, rank, share, total

torch.set_num_threads(1)
with launched():
    model, _ = testbed.load("testbed-llava")
    examples = testbed.examples("calibration", 24, 0)
    batches = [testbed.collate(share(examples[i : i + 8])) for i in range(0, 24, 8)]
    found = {
        "processes": processes(),
        "total": total(torch.tensor([1.0, rank()])).tolist(),
        "gathered": gathered(torch.full((rank() + 1, 2), rank())).tolist(),
        "told": [
            broadcast(f"é, said process {rank()}"),
            broadcast(""),
            broadcast(None if not rank() else "not heard"),
        ],
    }
    found["accuracy"] = evaluate(
        model, batches, vispco.PruningConfig("fastv", [1, 1, 1, 0.5, 0.5, 0.2, 0.2, 0])
    ).to_dict()
    steps = []
    frontiers = {
        "search": vispco.search(
            model,
            batches,
            budgets=[0.4, 0.7],
            refinement=2,
            callback=steps.append,
            start=vispco.Gradient(steps=4, inner=2),
        ),
        "multi_step": vispco.search(
            model,
            batches,
            kernel="multi_step",
            budgets=[{"flops": 0.5, "kv_cache": 0.6}],
            refinement=1,
            start=vispco.Gradient(steps=2),
            options={"objective": "task"},
        ),
        "profiled": vispco.search(
            model,
            batches,
            ["fastv", "pdrop"],
            budgets=[0.5],
            refinement=1,
            start=vispco.Profiled(questions=8, measurements=2),
        ),
        "amortised": vispco.search(
            model, batches, budgets=(), start=vispco.Shared(steps=4, between=(0.3, 0.8))
        ).frontier([0.4, 0.6], refinement=1),
        "conditioned": vispco.search(
            model,
            batches,
            budgets=(),
            start=vispco.Shared(steps=2, between=(0.3, 0.8), conditioned=True),
        ).frontier([0.5]),
    }
    found["steps"] = [
        {k: s[k] for k in ("loss", "gradient", "violation", "multiplier")}
        for s in steps
        if "step" in s
    ]
    found["refinement"] = [s for s in steps if "schedule" in s]
    found["frontiers"] = {
        name: {
            "tokens": [p.config.tokens(64) for p in f.points],
            "loss": [p.loss for p in f.points],
            "passes": f.meta["forward_passes"],
            "samples": f.meta["samples"],
            "flops": [p.flops for p in f.points],
        }
        for name, f in frontiers.items()
    }
    with open(f"{sys.argv[1]}/{processes()}-{rank()}.json", "w") as file:
        json.dump(found, file)
