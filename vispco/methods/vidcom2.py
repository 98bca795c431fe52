"""VidCom2 (Liu et al., EMNLP 2025, arXiv 2505.14454): tokens unlike film and frame."""

from __future__ import annotations

import torch

from ..pruning.context import column_sum
from ..registry import register_method
from .base import Method
from .groups import numbered, shared_out, total
from .pairs import directions

#: Twice these is divided by: a in 2^-3 .. 2^1.
WIDTHS = tuple(2.0**i for i in range(-3, 2))
#: Temperature of the softmax over frames.
TEMPERATURE = 0.01


@register_method("vidcom2")
class VidCom2(Method):
    """Frames share the budget by how unlike the film they are; each keeps its own odd ones. Video.

        x   = the half of the channels of least variance, scaled to length 1
        g_j(m) = sum over a in 2^-3 .. 2^1 of exp(-|x_j - m|^2 / 2a)
        f_j = g_j(mean token of the film),   e_j = g_j(mean token of j's frame)
        p   = softmax over frames( -mean f of the frame / 0.01 )
        a frame with n tokens gets a share in proportion to   n (1 + p - mean p)
        within a frame, the tokens of LEAST f_j + e_j are kept

    of projected features. Knows nothing of the question. Source: the authors' code (Apache-2.0),
    and vLLM's, both before layer 0. Published: a quarter of the tokens of LLaVA-OneVision.

    Departs from vLLM's: shares are rounded by Sainte-Lague (`vispco.methods.groups.shared_out`),
    which gives exactly k for every k at once. So what a frame cannot take goes to the others by
    share (there by f + e), and a frame may lose all its tokens (there it keeps one). Of pictures
    that are no video, tiles count as frames.
    """

    first_layer = 0
    reads_grid = True
    reads = "features, grid"

    def score(self, ctx):
        """(B, n_visual) below 0."""
        x = self._channels(ctx.embeddings[ctx.visual].float(), ctx.valid)
        frames = numbered(ctx.grid[..., 0], ctx.valid)
        number = int(frames.max()) + 1
        sizes = total(torch.ones_like(x[..., 0]), frames, ctx.valid, number)  # (B, F)
        real = ctx.valid[..., None]
        x = x.masked_fill(~real, 0.0)
        film = column_sum(x, 1) / ctx.valid.sum(1, keepdim=True).clamp(min=1)
        where = frames[..., None].expand_as(x)
        means = x.new_zeros(len(x), number, x.shape[-1]).scatter_add(1, where, x)
        means = means / sizes[..., None].clamp(min=1).to(x)
        of_film = closeness(x, film[:, None])
        of_frame = closeness(x, means.gather(1, where))
        there = sizes > 0
        odd = -total(of_film, frames, ctx.valid, number) / sizes.clamp(min=1) / TEMPERATURE
        share = odd.masked_fill(~there, float("-inf")).softmax(-1)
        share = 1 + share - 1 / there.sum(1, keepdim=True).clamp(min=1)
        # Two tokens are equally far from their mean, whatever rounding makes of it.
        both = ((of_film + of_frame).double() * 2**14).round()
        return shared_out(-both, frames, share * sizes + ~there, ctx.valid)

    @staticmethod
    def _channels(x, valid):
        """(B, V, D / 2): the channels of least variance, scaled to length 1."""
        real = valid[..., None]
        mean = column_sum(x.masked_fill(~real, 0.0), 1) / real.sum(1).clamp(min=1)
        variance = column_sum(((x - mean[:, None]) ** 2).masked_fill(~real, 0.0), 1)  # (B, D)
        least = variance.argsort(dim=1, stable=True)[:, : max(1, x.shape[-1] // 2)]
        least = least.sort(dim=1).values
        x = x.gather(2, least[:, None].expand(-1, x.shape[1], -1))
        return directions(x)


def closeness(x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """g of `VidCom2`, (B, V), of `x` (B, V, D) to `mean` (B, V or 1, D)."""
    square = ((x - mean) ** 2).sum(-1)
    return torch.stack([(-square / (2 * a)).exp() for a in WIDTHS]).sum(0)
