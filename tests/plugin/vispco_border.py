"""A package of somebody else: vispco finds it by its entry points, and nobody imports it."""

import torch

import vispco
from vispco.models.llava import Llava


class Border(vispco.Method):
    """Keep the tokens at both ends of the image."""

    first_layer = 0

    def __init__(self, start: bool = True):
        self.start = start  # ties: the start before the end

    def score(self, ctx):
        """(B, n_visual), the distance from the middle."""
        middle = (ctx.n_visual[:, None] - 1) / 2
        return (ctx.slot - middle).abs() + (0.1 if self.start else -0.1) * (ctx.slot < middle)


class Line(vispco.Kernel):
    """Ratios on a line from 1 to r = sigmoid(theta)."""

    def initial(self):
        """r = 1/2."""
        return torch.zeros(1)

    def ratios(self, i, theta):
        """(..., L)."""
        return 1 - i / (self.num_layers - 1) * (1 - theta.sigmoid())


class BorderVL(Llava):
    """A family that is LLaVA by another name."""

    architectures = ("BorderVLForConditionalGeneration",)
    model_types = ("border_vl",)
