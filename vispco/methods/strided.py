"""Strided: evenly spaced tokens, the other baseline that embarrasses careful methods."""

from __future__ import annotations

import torch

from ..registry import register_method
from .base import Method


@register_method("strided")
class Strided(Method):
    """Evenly spaced tokens, nested: a lower ratio keeps some of those that a higher one keeps.

        s_j = -van_der_Corput(j),   the binary digits of j mirrored about the point

    so the top n/2, n/4, ... tokens are exactly every 2nd, 4th, ... token, and any other number is
    as even as a nested order allows.
    """

    first_layer = 0
    reads = "nothing"

    def score(self, ctx):
        """(B, n_visual) in (-1, 0]."""
        return -mirrored_number(ctx.slot)


def mirrored_number(x: torch.Tensor) -> torch.Tensor:
    """The binary digits of whole numbers, mirrored about the point: floats in [0, 1)."""
    bits = torch.arange(24, device=x.device)
    return ((x[..., None] >> bits & 1) * 0.5 ** (bits + 1)).sum(-1)
