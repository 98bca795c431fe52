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


def video_inputs(frames: Sequence[np.ndarray] | np.ndarray) -> dict[str, torch.Tensor]:
    """testbed-qwen-video's inputs for B clips, each (frames, height, width, 3) uint8.

    They are what Qwen's video processor makes: pixel_values_videos (P, 96), and video_grid_thw
    (B, 3), how many moments, rows and columns of patches each clip has. A moment is two frames.
    """
    grids = [
        [len(clip) // FRAMES, clip.shape[1] // QWEN_PATCH, clip.shape[2] // QWEN_PATCH]
        for clip in frames
    ]
    patches = torch.cat([_cut(np.asarray(clip)) for clip in frames])
    return {"pixel_values_videos": patches, "video_grid_thw": torch.tensor(grids)}


def _patches(image: np.ndarray) -> torch.Tensor:
    """Qwen's patches (P, 96) of a picture: a video of the same frame, again and again."""
    return _cut(np.stack([image] * FRAMES))


def _cut(frames: np.ndarray) -> torch.Tensor:
    """Qwen's patches (P, 96) of frames; those of one visual token are next to each other."""
    times, rows, columns = len(frames) // FRAMES, *(side // PATCH for side in frames.shape[1:3])
    cut = _pixels(frames).view(
        times, FRAMES, 3, rows, MERGE, QWEN_PATCH, columns, MERGE, QWEN_PATCH
    )
    cut = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return cut.reshape(times * rows * columns * MERGE**2, -1)
