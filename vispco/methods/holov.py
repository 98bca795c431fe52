"""HoloV (arXiv 2510.02912): crops share the budget."""

from __future__ import annotations

import torch

from ..pruning.context import positions, take
from ..registry import register_method
from .base import Method
from .groups import shared_out, total
from .pairs import directions
from .shared import count

#: What the variance of cosines counts beside attention.
WEIGHT = 0.09


@register_method("holov")
class HoloV(Method):
    """Crops of neighbouring tokens share the budget; within one, attention in the tower decides.

        v_j = variance of cos(x_j, x_i) over the tokens i of j's crop
        s_j = a_j + 0.09 v_j mean(a) / mean(v)
        a crop gets a share in proportion to its mean s; within it, the largest a_j are kept

    a: attention that the token's patches receive in the tower (`vispco.pruning._tower`). x:
    projected features. Crops are runs of tokens in reading order, as equal as can be. Knows nothing
    of the question. Source: the authors' code (Apache-2.0). Published: before layer 0, 11 % of
    LLaVA-1.5's tokens.

    crops: how many. The authors' number is not known to us. The default is our choice: of LLaVA's
    576 tokens, it makes runs of 36.

    Departs from it: exactly the count, with shares rounded by Sainte-Lague
    (`vispco.methods.groups.shared_out`). Their factor 10^3 of a is left out. As we read it, v is
    scaled to the mean of what it is added to: the factor is then one of all of s, and changes no
    share. That crops are runs in reading order is our choice.
    """

    first_layer = 0
    reads_vision = True
    reads = "tower attention, features"

    def __init__(self, crops: int = 16):
        self.crops = count("crops", crops)

    def score(self, ctx):
        """(B, n_visual) below 0."""
        attention, valid = ctx.vision_attention.double(), ctx.valid
        n = valid.sum(1, keepdim=True)
        place = (valid.cumsum(1) - 1).clamp(min=0)
        crop = (place * self.crops // n.clamp(min=1)).clamp(max=self.crops - 1)  # (B, V)
        variance = self._variance(directions(ctx.embeddings[ctx.visual]), crop, valid)

        def mean(x):
            return x.masked_fill(~valid, 0.0).sum(1, keepdim=True) / n.clamp(min=1)

        scale = mean(attention) / mean(variance).clamp(min=1e-30)
        score = attention + WEIGHT * variance * scale
        sizes = total(torch.ones_like(score), crop, valid, self.crops)
        weights = total(score, crop, valid, self.crops) / sizes.clamp(min=1)
        return shared_out(attention, crop, weights.clamp(min=1e-30), valid)

    def _variance(self, unit, crop, valid):
        """(B, V) variance of the cosines within each crop."""
        width = -(-unit.shape[1] // self.crops)
        found = torch.zeros(crop.shape, dtype=torch.float64, device=crop.device)
        for number in range(self.crops):
            index, real = positions((crop == number) & valid, width)  # (B, width)
            x = take(unit, index[1])
            cosine = (x @ x.transpose(1, 2)).double().masked_fill(~real[:, None], 0.0)
            size = real.sum(1)[:, None, None].clamp(min=1)
            mean = cosine.sum(-1, keepdim=True) / size
            square = ((cosine - mean) ** 2).masked_fill(~real[:, None], 0.0).sum(-1) / size[..., 0]
            found = found.scatter_add(1, index[1], square.masked_fill(~real, 0.0))
        return found

    def flops(self, dimensions, n_visual, n_text):
        """FLOPs of the cosines of all pairs within each crop."""
        width = (n_visual + self.crops - 1) // self.crops
        return 2 * self.crops * width * width * dimensions.hidden
