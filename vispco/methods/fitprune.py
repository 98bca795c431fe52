"""FitPrune (Ye et al., AAAI 2025, arXiv 2409.10197): attention from the text and from the image."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pruning.context import Context, column_sum
from ..registry import register_method
from .base import Method
from .shared import question

#: Rows of attention that are computed at a time, and numbers in all heads: this bounds the memory.
ROWS, NUMBERS = 512, 2**21


@register_method("fitprune")
class FitPrune(Method):
    """Attention from the text times attention from the image, each with the strongest head.

        c_j = 1/|T| sum_{t in T} max_h A^h_tj,   e_j = 1/|V| sum_{i in V} max_h A^h_ij
        s_j = c_j e_j

    of the layer just run. T: prompt text after the image's first token (without any, s_j = e_j). V:
    visual tokens present. Published: some tokens dropped before every layer, as many as a fit of
    attention statistics finds for the budget: `vispco.fitprune_schedule`.

    All rows count in the means, as in the authors' code: those that a causal mask keeps from seeing
    j add 0, so early tokens are favoured. Departs from it: the rows are computed here, so the model
    may run any attention implementation; means are over the sample's own tokens, whatever the batch
    and the padding.
    """

    first_layer = 1
    reads = "attention"

    def score(self, ctx):
        """(B, n_visual) products of attention probabilities."""
        cross, own = received(ctx)
        return cross * own

    def flops(self, dimensions, n_visual, n_text):
        """FLOPs of one row of q k^T for each token."""
        n = n_visual + n_text
        return 2 * n * n * dimensions.heads * dimensions.head_dim


def received(ctx: Context) -> tuple[Tensor, Tensor]:
    """Attention that visual tokens receive from text and from visual tokens, (B, V) each.

    These are c and e of `FitPrune`; c is 1 without text.
    """
    text, after = question(ctx)
    cross, own = mean_of(ctx, text[1], after), mean_of(ctx, ctx.visual[1], ctx.valid)
    return cross.where(after.any(1, keepdim=True), 1.0), own


def mean_of(ctx: Context, rows: Tensor, real: Tensor) -> Tensor:
    """Attention (B, V) to visual tokens, of the strongest head, averaged over the `real` rows."""
    total = torch.zeros(ctx.present.shape, device=real.device)
    held = ctx.queries().shape[1] * total.numel()
    number = max(1, min(ROWS, NUMBERS // max(1, held)))
    for at, there in zip(rows.split(number, 1), real.split(number, 1), strict=True):
        most = ctx.attention(at=at).amax(1)  # (B, rows, N)
        total = total + column_sum(most.masked_fill_(~there[..., None], 0.0), 1)
    return total[ctx.visual] / real.sum(1, keepdim=True).clamp(min=1)
