"""Visual tokens as a cost: the unit in which papers state their configurations."""

from __future__ import annotations

from torch import Tensor

from .dimensions import Dimensions
from .flops import Cost


class VisualTokens(Cost):
    """Visual tokens of one sample, on average over the decoder's layers.

        F(n) = 1 / L sum_i n_i   of L layers, which n_i visual tokens enter

    "192 tokens" of VisionZip, VisPruner and CDPruner, which drop before layer 0, is F = 192; of
    SparseVLM (arXiv 2410.04417), which drops on the way, nearly so.

    >>> import torch
    >>> float(VisualTokens(Dimensions(2, 8, 2, 2, 4, 16, 10))(torch.tensor([16, 8]), 16, 4))
    12.0
    """

    unit = "tokens"

    def __init__(self, dimensions: Dimensions):
        self.dimensions = dimensions

    def layers(self, counts: Tensor, n_text) -> Tensor:
        return counts.double() / self.dimensions.layers
