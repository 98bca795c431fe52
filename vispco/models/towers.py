"""Shapes of vision towers, and of their tokens."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor


def class_token(v) -> bool:
    """Whether a tower puts a class token before its patches: CLIP and InternViT, but not SigLIP."""
    return v.model_type.startswith(("clip", "internvl"))


def patches(v) -> int:
    """Number of patches of a square image of the tower's own size."""
    return patches_a_side(v) ** 2


def patches_a_side(v) -> int:
    """Number of patches along the side of a square image of the tower's own size."""
    return side(v.image_size) // side(v.patch_size)


def rectangle(frame: int, height: int, width: int) -> Tensor:
    """Frame, row and column (height * width, 3) of the tokens of one frame, row by row."""
    return torch.cartesian_prod(torch.tensor([frame]), torch.arange(height), torch.arange(width))


def side(size) -> int:
    """A size given as one number or as a pair of equal ones."""
    return size if isinstance(size, int) else size[0]


def squares(x: Tensor, size: int) -> Tensor:
    """Means over squares of size x size patches, row by row.

    x: (tiles, n, C). Returns (tiles, n / size^2, C).
    """
    across = isqrt(x.shape[1]) // size
    return x.unflatten(1, (across, size, across, size)).mean((2, 4)).flatten(1, 2)
