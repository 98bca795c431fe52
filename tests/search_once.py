"""What `test_numbers.py` runs in separate processes.

One small search, and what each configuration keeps, as JSON.
"""

import json
import sys

import torch

import vispco
from vispco import testbed

torch.set_num_threads(int(sys.argv[1]))
model, _ = testbed.load("testbed-llava")
frontier = vispco.search(
    model,
    testbed.batches("calibration", n=16, batch_size=8),
    budgets=[0.4, 0.7],
    refinement=1,
    seed=3,
    start=vispco.Gradient(steps=3, inner=3),
)
kept, inputs = [], testbed.batches("test", n=8, batch_size=8)[0]
for point in frontier.points:
    with vispco.apply(model, point.config) as handle, torch.no_grad():
        model(**{k: v for k, v in inputs.items() if k != "labels"})
        kept.append({layer: mask.int().tolist() for layer, mask in handle.kept().items()})
frontier.meta.pop("seconds")
json.dump(
    {
        "points": [p.to_dict() for p in frontier.points],
        "meta": frontier.meta,
        "tokens": [p.config.tokens(64) for p in frontier.points],
        "kept": kept,
    },
    sys.stdout,
)
