"""What several methods share: the text that can see the image, directions of features, greedy picking."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..pruning.context import Context, column_sum, positions, take


def question(ctx: Context) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Index pair of the prompt's text (B, T), and which of it (B, T) comes after the image's first token.

    Text before the image cannot see it.
    """
    text, real = positions(ctx.text_mask, max(1, int(ctx.text_mask.sum(1).max())))
    first = ctx.order.masked_fill(~ctx.visual_mask, ctx.order.max() + 1).amin(1, keepdim=True)
    return text, real & (take(ctx.order, text[1]) > first)


def masked_mean(rows: Tensor, real: Tensor) -> Tensor:
    """Mean (B, K) of the `real` (B, R) among `rows` (B, R, K); 0 if none is."""
    return column_sum(rows.masked_fill(~real[..., None], 0.0), 1) / real.sum(1, keepdim=True).clamp(
        min=1
    )


def head_mean(attention: Tensor) -> Tensor:
    """Mean (B, R, N) of `attention` (B, H, R, N) over the heads."""
    return column_sum(attention, 1) / attention.shape[1]


def directions(x: Tensor) -> Tensor:
    """`x` (..., D) scaled to length 1, in float32."""
    return normalize(x.float(), dim=-1)


def cosines(x: Tensor) -> Tensor:
    """Cosines (B, V, V) of all pairs of `x` (B, V, D), to the bit the same both ways: a pair is a pair."""
    unit = directions(x)
    products = unit @ unit.transpose(1, 2)
    return (products + products.transpose(1, 2)) / 2


def greedy(ctx: Context, gains: Tensor, update: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Scores (B, V) of slots picked one by one, the one of largest gain next: 1 for the first, 1/2, 1/3, ...

    gains: (B, V) for the first pick, of the order of 1 and told apart to a millionth. update: called with the number of picks before and the slot picked (B,
    1),
    returns the next gains. Unless all ranks matter, stops after the `ctx.keep` that are kept; others score 0.
    """
    steps = ctx.valid.shape[1] if ctx.exhaustive else int(ctx.keep.max())
    scores, left = torch.zeros_like(gains), ctx.valid
    for step in range(steps):
        # Tokens with equal features (newlines) are ties, whatever rounding made of them; argmax takes the first.
        gains = (gains * 2**20).round()
        pick = gains.masked_fill(~left, float("-inf")).argmax(1, keepdim=True)
        # amax: a sample with nothing left picks some slot again, which must not lower it.
        scores = scores.scatter_reduce(
            1, pick, torch.full_like(gains[:, :1], 1 / (step + 1)), "amax"
        )
        left = left.scatter(1, pick, False)
        gains = update(step, pick)
    return scores
