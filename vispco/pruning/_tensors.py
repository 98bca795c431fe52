"""Products, softmax, sums and gathers of tensors: what methods and pruning share."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

#: Keys that `products` converts at a time.
BLOCK = 512


def products(query: Tensor, key: Tensor) -> Tensor:
    """The products q k^T (..., R, N) of (..., R, E) and (..., N, E), in float32 at least.

    In bfloat16 they would be rounded to 8 bits, and many tokens would have equal scores; in float16
    they may exceed 65504. The model's fused attention does neither. Keys are converted a block at a
    time, so that only the rows take memory.

    >>> q, k = torch.tensor([[256.0, 1.0]]).bfloat16(), torch.ones(1, 2).bfloat16()
    >>> (q @ k.T).item(), products(q, k).item()
    (256.0, 257.0)
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    # Autocast would round them again.
    with torch.autocast(query.device.type, enabled=False):
        query = query.to(precise)
        if key.dtype == precise:
            return query @ key.transpose(-1, -2)
        rows = query.new_empty(*query.shape[:-1], key.shape[-2])
        for first in range(0, key.shape[-2], BLOCK):
            some = key[..., first : first + BLOCK, :].to(precise)
            rows[..., first : first + BLOCK] = query @ some.transpose(-1, -2)
        return rows


def masked_softmax(scores: Tensor, hidden: Tensor) -> Tensor:
    """Softmax of `scores` (..., N) over those that are not `hidden`.

    Those hidden get 0, all of them if need be; NaN stays NaN.

    >>> hidden = torch.tensor([[False, False, True], [True, True, True]])
    >>> masked_softmax(torch.tensor([[1.0, 1.0, 9.0], [1.0, 2.0, 3.0]]), hidden)
    tensor([[0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 0.0000]])
    """
    least = torch.finfo(scores.dtype).min
    return scores.masked_fill(hidden, least).softmax(-1).masked_fill(hidden, 0.0)


def column_sum(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Sum over `dim`, not the last, as if in exact arithmetic: equal columns have equal sums.

    On a CPU, PyTorch adds up the last few columns in another order than the others. In float32,
    tokens with equal scores would come to differ by a rounding, and ties would not go to the first.
    """
    # mps has no float64.
    precise = torch.float32 if x.device.type == "mps" else torch.float64
    return x.sum(dim, dtype=precise).to(x.dtype)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather `index` (B, K) along dim 1 of `x` (B or 1, N, ...)."""
    if len(index) == 1 == len(x):
        return x.index_select(1, index[0])
    if x.ndim == 2:
        return x.expand(len(index), -1).gather(1, index)
    rows = torch.arange(len(index), device=index.device)[:, None]
    # Copies whole rows. `gather` would look up each number.
    return x.expand(len(index), *x.shape[1:])[rows, index]


def on_device(x: Any, device: torch.device) -> Any:
    """`x` with all its tensors on `device`: a dataclass, of tensors, dicts or dataclasses."""

    def moved(value: Any) -> Any:
        if is_dataclass(value):
            return on_device(value, device)
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)

    return replace(x, **{each.name: moved(getattr(x, each.name)) for each in fields(x)})
