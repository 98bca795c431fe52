"""Configurations that need no search: grids of them, and what was published."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import PruningConfig
from .presets import presets


def single_layer_grid(
    method: str,
    num_layers: int,
    ratios: Sequence[float],
    first_layer: int = 1,
    n_visual: int | None = None,
) -> list[PruningConfig]:
    """Every (layer, ratio): keep everything before the layer, `ratio` from it on.

    This is the paper's "empirical frontier". n_visual: round the ratios to whole tokens of it, so
    that equal schedules appear once.

    >>> [c.keep_ratios for c in single_layer_grid("fastv", 3, [0.5])]
    [(1.0, 0.5, 0.5), (1.0, 1.0, 0.5)]
    """
    if n_visual:
        ratios = sorted({round(r * n_visual) / n_visual for r in ratios})
    return [
        PruningConfig(method, [1.0] * layer + [ratio] * (num_layers - layer))
        for layer in range(first_layer, num_layers)
        for ratio in ratios
    ]


def paper_grid(
    method: str, num_layers: int, first_layer: int = 1, n_visual: int | None = None
) -> list[PruningConfig]:
    """The paper's single-layer grid: all layers that can be pruned, keep ratios 0, 0.05, ... 0.95.

    In a decoder of 36 layers these are 35 x 20 = 700. With few visual tokens some ratios coincide,
    and there are fewer.

    >>> len(paper_grid("fastv", 36)), len(paper_grid("fastv", 8, n_visual=16))
    (700, 112)
    """
    return single_layer_grid(method, num_layers, [i / 20 for i in range(20)], first_layer, n_visual)


def published(method: str, num_layers: int, at: str = "depth") -> dict[str, PruningConfig]:
    """A method's published configurations by name: those of `presets`, without their sources.

    Arguments and errors are those of `presets`.

    >>> published("fastv", 4, at="layer")["k3-r75"].keep_ratios
    (1.0, 1.0, 1.0, 0.25)
    """
    return {name: preset.config for name, preset in presets(method, num_layers, at).items()}
