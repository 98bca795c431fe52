"""Parts of vision towers: their shapes, and FLOPs in the convention of `vispco.flops`."""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt

import torch
from torch import Tensor


def encoder_layer(
    tokens: int, hidden: int, ffn: int, matrices: int = 2, spans: Iterable[int] | None = None
) -> int:
    """FLOPs of one transformer layer.

    matrices: of its feed-forward network. spans: lengths of the pieces within which tokens attend;
    None: all attend to all.
    """
    attention = sum(n * n for n in ([tokens] if spans is None else spans))
    return 2 * tokens * (4 * hidden * hidden + matrices * hidden * ffn) + 4 * attention * hidden


def class_token(v) -> bool:
    """Whether a tower puts a class token before its patches: CLIP and InternViT, but not SigLIP."""
    return not v.model_type.startswith(("siglip", "idefics3", "smolvlm"))


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


def vit(v) -> int:
    """FLOPs of CLIP, SigLIP or InternViT on ONE image.

    Patch embedding, every layer, and SigLIP's pooling head if there is one. Hugging Face runs
    every layer, whichever of them the projector reads.
    """
    d, n = v.hidden_size, patches(v)
    siglip = v.model_type == "siglip_vision_model"
    tokens = n + class_token(v)
    embedding = 2 * n * v.num_channels * side(v.patch_size) ** 2 * d
    layers = v.num_hidden_layers * encoder_layer(tokens, d, v.intermediate_size)
    head = 4 * d * d + 4 * n * d * d + 4 * n * d + 4 * d * v.intermediate_size
    return embedding + layers + (head if siglip and v.vision_use_head else 0)


def two_matrices(tokens: int, width: int, hidden: int, out: int | None = None) -> int:
    """FLOPs of a projector of two matrices, width -> hidden -> out (default: hidden)."""
    return 2 * tokens * (width * hidden + hidden * (out or hidden))
