"""Competitors of the search, run through the same evaluation: published defaults, random schedules, a grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .budget import Budget
from .config import PruningConfig


def single_layer_grid(method: str, num_layers: int, ratios: Sequence[float], first_layer: int = 1,
                      n_visual: int | None = None) -> list[PruningConfig]:
    """Every (layer, ratio): keep everything before the layer, `ratio` from it on (the paper's "empirical frontier").

    n_visual: round the ratios to whole tokens of it, so that equal schedules appear once.

    >>> [c.keep_ratios for c in single_layer_grid("fastv", 3, [0.5])]
    [(1.0, 0.5, 0.5), (1.0, 1.0, 0.5)]
    """
    if n_visual:
        ratios = sorted({round(r * n_visual) / n_visual for r in ratios})
    return [PruningConfig(method, [1.0] * layer + [ratio] * (num_layers - layer))
            for layer in range(first_layer, num_layers) for ratio in ratios]


def random_schedules(method: str, limit: Budget, count: int, seed: int = 0) -> list[PruningConfig]:
    """Random non-increasing schedules, each filled up to the budget in whole tokens.

    Drops are uniform on the simplex (the space of the `monotone` kernel), then scaled to the budget.
    """
    generator = torch.Generator().manual_seed(seed)
    prunable = limit.layers - limit.first_layer
    configs = []
    for _ in range(count):
        drops = torch.empty(prunable + 1, dtype=torch.float64).exponential_(generator=generator)
        kept = 1 - (drops / drops.sum()).cumsum(0)[:-1]
        ratios = torch.cat([torch.ones(limit.first_layer, dtype=torch.float64), kept.clamp(min=0)])
        configs.append(PruningConfig(method, limit.harden(ratios)))
    return configs


def published_fastv(num_layers: int) -> dict[str, PruningConfig]:
    """FastV's published (K, drop) configurations, at the same layers and at the same depth of a 32-layer model."""
    published = [(2, 0.5), (3, 0.5), (3, 0.75)]
    configs = {f"K={k}, drop {drop:.0%}": PruningConfig.from_fastv(k, drop, num_layers=num_layers)
               for k, drop in published if k < num_layers}
    return configs
