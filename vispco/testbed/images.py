"""Pictures as inputs of the testbed models, without an image processor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .model import FRAMES, MERGE, QWEN_PATCH
from .processor import MEAN, PATCH, STD


def image_inputs(name: str, images: Sequence[np.ndarray] | np.ndarray) -> dict[str, torch.Tensor]:
    """Inputs of the model `name` for B pictures, each (height, width, 3) uint8.

    They are what its processor makes. testbed-qwen: pixel_values (P, 96), the patches of all
    pictures, and image_grid_thw (B, 3), how many frames, rows and columns of patches each picture
    has. The others: pixel_values (B, 3, 64, 64).
    """
    if name != "testbed-qwen":
        return {"pixel_values": _pixels(np.stack(list(images)))}
    grids = [[1, image.shape[0] // QWEN_PATCH, image.shape[1] // QWEN_PATCH] for image in images]
    patches = torch.cat([_patches(image) for image in images])
    return {"pixel_values": patches, "image_grid_thw": torch.tensor(grids)}


def _pixels(images: np.ndarray) -> torch.Tensor:
    """(B, height, width, 3) uint8 -> (B, 3, height, width) float32, normalised."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0 - MEAN) / STD


def _patches(image: np.ndarray) -> torch.Tensor:
    """Qwen's patches (P, 96) of a picture; those of one visual token are next to each other."""
    rows, columns = image.shape[0] // PATCH, image.shape[1] // PATCH
    pixels = _pixels(np.stack([image]))[0]
    cut = pixels.view(3, rows, MERGE, QWEN_PATCH, columns, MERGE, QWEN_PATCH)
    cut = cut.permute(1, 4, 2, 5, 0, 3, 6)
    # A still picture is a video of the same frame, again and again.
    cut = cut.unsqueeze(5).expand(-1, -1, -1, -1, -1, FRAMES, -1, -1)
    return cut.reshape(rows * columns * MERGE**2, -1)
