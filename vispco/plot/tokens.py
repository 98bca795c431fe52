"""`plot_tokens`: which patches of a picture survive, layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import PruningConfig
from ..utils.files import write_text
from ..pruning import apply
from ..registry import adapter_for
from .figure import COLOURS, INK, clean, picture_kind, render, require_matplotlib


@dataclass(frozen=True)
class Kept:
    """Which patches entered the layers of one prompt about one picture.

    layers: {layer: (rows, columns) bool}, where tokens were dropped.
    """

    rows: int
    columns: int
    layers: dict[int, Tensor]


def kept_patches(model, inputs: Mapping[str, Any], config: PruningConfig) -> Kept:
    """Run one prompt (`input_ids` (1, S), one picture) under `config`, and see where the kept tokens stand.

    Raises ValueError unless the model sees the picture as one grid (tiles, several pictures and videos are more).
    """
    adapter = adapter_for(model)(model)
    inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    visual = adapter.visual_mask(inputs["input_ids"], None)  # (1, S)
    if len(visual) != 1 or not bool(visual.any()):
        raise ValueError(f"kept tokens are drawn for one prompt with a picture, got {len(visual)} prompts with "
                         f"{int(visual.sum())} visual tokens")
    with torch.no_grad(), apply(model, config) as pruner:
        grid = adapter.grid(dict(inputs), visual)[visual].cpu()  # (V, 3)
        model(**inputs)
        kept = {layer: mask[visual].cpu() for layer, mask in pruner.kept().items()}
    frames, rows, columns = (grid.amax(0) + 1).tolist()
    if frames > 1 or rows * columns != len(grid):
        raise ValueError(f"kept tokens are drawn where the model sees one picture as one grid; here {type(model).__name__} "
                         f"sees {len(grid)} tokens in {frames} pictures, tiles or frames of up to {rows} x {columns}")
    layers = {}
    for layer, mask in sorted(kept.items()):
        layers[layer] = torch.zeros(rows, columns, dtype=torch.bool)
        layers[layer][grid[:, 1], grid[:, 2]] = mask
    return Kept(rows, columns, layers)


def plot_tokens(model, processor, inputs: Mapping[str, Any], picture, config: PruningConfig, path: str | os.PathLike,
                title: str = "") -> None:
    """Draw the patches of `picture` that enter each layer at which some are dropped, to an `.svg` or `.png` file.

    Of more than 11 such layers, 11 evenly spread ones. inputs: of one prompt about it, as `processor` makes them.
    picture: a PIL image. What the processor crops off is not shown. Raises ValueError as `kept_patches` does, ImportError without matplotlib.
    """
    kind = picture_kind(path)
    require_matplotlib()
    kept, pixels = _few(kept_patches(model, inputs, config)), np.asarray(seen(processor, picture).convert("RGB"))
    count = 1 + len(kept.layers)
    columns = min(4, count)
    rows = math.ceil(count / columns)
    tall = max(1.2, 2.8 * kept.rows / kept.columns)
    write_text(path, render(lambda figure: _draw(figure, pixels, kept, rows, columns, title),
                            max(5.6, 2.8 * columns), rows * (min(tall, 5.6) + 0.3) + 0.5, kind))


def _few(kept: Kept, most: int = 11) -> Kept:
    """Of many layers some, evenly spread, with the first and the last."""
    names = list(kept.layers)
    if len(names) > most:
        names = [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]
    return Kept(kept.rows, kept.columns, {name: kept.layers[name] for name in names})


def seen(processor, picture):
    """The part of a picture that the processor leaves: the middle, if it crops."""
    images = getattr(processor, "image_processor", None)
    size, crop = (getattr(images, name, None) or {} for name in ("size", "crop_size"))
    if not getattr(images, "do_center_crop", False) or "height" not in crop:
        return picture
    width, height = picture.size
    if getattr(images, "do_resize", False):
        shortest = size.get("shortest_edge")
        across, down = ((min(width, height) / shortest,) * 2 if shortest else
                        (width / size["width"], height / size["height"]))
    else:
        across = down = 1
    half_x, half_y = min(width, crop["width"] * across) / 2, min(height, crop["height"] * down) / 2
    return picture.crop((round(width / 2 - half_x), round(height / 2 - half_y),
                         round(width / 2 + half_x), round(height / 2 + half_y)))


def _draw(figure, pixels: np.ndarray, kept: Kept, rows: int, columns: int, title: str) -> None:
    from matplotlib.collections import LineCollection

    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    figure.suptitle(clean(title, 90), x=0.02, ha="left", fontsize=11, color=INK)
    edges = (0, kept.columns, kept.rows, 0)
    panels[0].imshow(pixels, extent=edges, interpolation="nearest")
    panels[0].set(xlim=(-0.15, kept.columns + 0.15), ylim=(kept.rows + 0.15, -0.15))
    panels[0].set_title(f"the picture: {kept.rows * kept.columns} tokens", fontsize=9)
    for axes, (layer, mask) in zip(panels[1:], kept.layers.items()):
        axes.imshow(pixels, extent=edges, interpolation="nearest")
        veil = np.zeros((*mask.shape, 4))
        veil[..., :3], veil[..., 3] = 1, 0.82 * (~mask.numpy())  # dropped patches fade into the paper
        axes.imshow(veil, extent=edges, interpolation="nearest")
        corners = ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))
        outlines = [[(column + x, row + y) for x, y in corners] for row, column in mask.nonzero().tolist()]
        axes.add_collection(LineCollection(outlines, colors=COLOURS[1], linewidths=0.7))
        axes.plot([0, kept.columns, kept.columns, 0, 0], [0, 0, kept.rows, kept.rows, 0], color="#8a8a8a",
                  linewidth=0.6)
        axes.set_title(f"layer {layer}: {int(mask.sum())} of {mask.numel()} enter", fontsize=9)
        axes.set(xlim=(-0.15, kept.columns + 0.15), ylim=(kept.rows + 0.15, -0.15))
