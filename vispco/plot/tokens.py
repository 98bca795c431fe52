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
from ..pruning import apply
from ..pruning.forward import on_device
from ..registry import adapter_for
from .figure import INK, clean, require_matplotlib, save

_MOST_LAYERS = 11


@dataclass(frozen=True)
class Kept:
    """Which patches entered the layers of one prompt about one picture.

    layers: {layer: (rows, columns) bool}, where tokens were dropped.
    """

    rows: int
    columns: int
    layers: dict[int, Tensor]


def kept_patches(model, inputs: Mapping[str, Any], config: PruningConfig) -> Kept:
    """See which patches are kept when one prompt runs under `config`.

    inputs: the prompt, `input_ids` (1, S), about one picture.
    Raises ValueError unless the model sees the picture as one grid (tiles, several pictures and
    videos are more).
    """
    adapter = adapter_for(model)(model)
    inputs = on_device(inputs, model.device)
    visual = adapter.visual_mask(inputs["input_ids"], None)  # (1, S)
    if len(visual) != 1 or not bool(visual.any()):
        raise ValueError(
            f"kept tokens are drawn for one prompt with a picture, got {len(visual)} prompts with "
            f"{int(visual.sum())} visual tokens"
        )
    with torch.no_grad(), apply(model, config) as pruner:
        grid = adapter.grid(dict(inputs), visual)[visual].cpu()  # (V, 3)
        model(**inputs)
        kept = {layer: mask[visual].cpu() for layer, mask in pruner.kept().items()}
    frames, rows, columns = (grid.amax(0) + 1).tolist()
    if frames > 1 or rows * columns != len(grid):
        raise ValueError(
            "kept tokens are drawn where the model sees one picture as one grid; here "
            f"{type(model).__name__} sees {len(grid)} tokens in {frames} pictures, tiles or "
            f"frames of up to {rows} x {columns}"
        )
    layers = {}
    for layer, mask in sorted(kept.items()):
        layers[layer] = torch.zeros(rows, columns, dtype=torch.bool)
        layers[layer][grid[:, 1], grid[:, 2]] = mask
    return Kept(rows, columns, layers)


def plot_tokens(
    model,
    processor,
    inputs: Mapping[str, Any],
    picture,
    config: PruningConfig,
    path: str | os.PathLike,
    title: str = "",
) -> None:
    """Draw which patches of `picture` enter each layer that drops some, to an `.svg` or `.png`.

    Of more than 11 such layers, 11 evenly spread ones. inputs: of one prompt about it, as
    `processor` makes them.
    picture: a PIL image. What the processor crops off is not shown. Raises ValueError as
    `kept_patches` does, and for another suffix; ImportError without matplotlib.
    """
    require_matplotlib()
    kept = kept_patches(model, inputs, config)
    pixels = np.asarray(seen(processor, picture).convert("RGB"))
    layers = list(kept.layers)
    if len(layers) > _MOST_LAYERS:
        last = len(layers) - 1
        layers = [layers[round(i * last / (_MOST_LAYERS - 1))] for i in range(_MOST_LAYERS)]
    count = 1 + len(layers)
    columns = _columns(count)
    rows = math.ceil(count / columns)
    height = min(max(1.2, 2.8 * kept.rows / kept.columns), 5.6) + 0.3

    def draw(figure) -> None:
        figure.suptitle(clean(title, 110), x=0.005, ha="left", fontsize=11, color=INK)
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for axes in panels:
            axes.set_axis_off()
        _draw_picture(panels[0], pixels, kept)
        panels[0].set_title(f"the picture: {kept.rows * kept.columns} tokens", fontsize=9)
        for axes, layer in zip(panels[1:], layers, strict=False):
            _draw_picture(axes, pixels, kept)
            mask = kept.layers[layer]
            _draw_mask(axes, mask)
            axes.set_title(f"layer {layer}: {int(mask.sum())} of {mask.numel()} enter", fontsize=9)

    save(path, draw, max(5.6, 2.8 * columns), rows * height + 0.5)


def _columns(count: int) -> int:
    """Columns for so many panels, four at most, that leave the fewest places empty."""
    return count if count <= 4 else min((4, 3), key=lambda n: -count % n)


def seen(processor, picture):
    """The part of a picture that the processor leaves: the middle, if it crops."""
    images = getattr(processor, "image_processor", None)
    size = getattr(images, "size", None) or {}
    crop = getattr(images, "crop_size", None) or {}
    if not getattr(images, "do_center_crop", False) or "height" not in crop:
        return picture
    width, height = picture.size
    # Pixels of the picture for one of what is cropped.
    across = down = 1.0
    if getattr(images, "do_resize", False):
        if size.get("shortest_edge"):
            across = down = min(width, height) / size["shortest_edge"]
        else:
            across, down = width / size["width"], height / size["height"]
    half_x = min(width, crop["width"] * across) / 2
    half_y = min(height, crop["height"] * down) / 2
    corners = (width / 2 - half_x, height / 2 - half_y, width / 2 + half_x, height / 2 + half_y)
    return picture.crop(tuple(map(round, corners)))


def _draw_picture(axes, pixels: np.ndarray, kept: Kept) -> None:
    """The picture, with a unit square for each token."""
    axes.imshow(pixels, extent=(0, kept.columns, kept.rows, 0), interpolation="nearest")
    axes.set(xlim=(-0.15, kept.columns + 0.15), ylim=(kept.rows + 0.15, -0.15))


def _draw_mask(axes, mask: Tensor) -> None:
    """Let the patches that were dropped fade into the paper. mask: (rows, columns), kept ones."""
    from matplotlib.patches import Rectangle

    rows, columns = mask.shape
    # Grey: a dropped patch differs from a kept one of white, and from one of black.
    veil = np.full((rows, columns, 4), 0.62)
    veil[..., 3] = 0.8 * (~mask.numpy())
    axes.imshow(veil, extent=(0, columns, rows, 0), interpolation="nearest")
    frame: dict[str, Any] = {"facecolor": "none", "edgecolor": "#8a8a8a", "linewidth": 0.7}
    axes.add_patch(Rectangle((0, 0), columns, rows, **frame))
