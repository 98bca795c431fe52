"""Kernels that lose tokens from layer to layer: by a rule of two numbers, or freely."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..registry import register_kernel
from .base import Kernel


@register_kernel("exponential")
class Exponential(Kernel):
    """A constant fraction is lost from layer to layer.

    r_i = r exp(-k i),   k = sigmoid(theta_0) per layer,   r = sigmoid(theta_1)

    With k = r = 1/2:

    >>> [round(r, 3) for r in Exponential(num_layers=3)(torch.zeros(2)).tolist()]
    [1.0, 0.303, 0.184]
    """

    def initial(self) -> Tensor:
        # k = 1 / (L + 1), r = 0.88: some tokens are left at the last layer.
        return torch.tensor([-math.log(self.num_layers), 2.0])

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        return {"k": theta[..., :1].sigmoid(), "r": theta[..., 1:].sigmoid()}

    def ratios(self, i: Tensor, k: Tensor, r: Tensor) -> Tensor:
        return r * torch.exp(-k * i)


@register_kernel("linear")
class Linear(Exponential):
    """A constant number of tokens is lost from layer to layer, until none are left.

    r_i = r - k i,   r = sigmoid(theta_1),   k = r sigmoid(theta_0) / max(1, first_layer) per layer

    k depends on r so that the first prunable layer is never clipped to 0: there the gradient of
    every layer would vanish, and a search could not come back.

    With r = 1/2 and k = 1/4:

    >>> Linear(num_layers=4)(torch.zeros(2)).tolist()
    [1.0, 0.25, 0.0, 0.0]
    """

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        k, r = super().named(theta).values()
        return {"k": r * k / max(1, self.first_layer), "r": r}

    def ratios(self, i: Tensor, k: Tensor, r: Tensor) -> Tensor:
        return r - k * i


@register_kernel("monotone")
class Monotone(Kernel):
    """Any non-increasing schedule: a simplex over where the tokens are dropped (not in the paper).

    r_i = 1 - sum_{first_layer <= j <= i} p_j,   p = softmax(theta), L - first_layer + 1 entries

    p_j is the fraction of tokens dropped before layer j. The last entry is the fraction that is
    never dropped.

    >>> Monotone(num_layers=4)().tolist()
    [1.0, 0.75, 0.5, 0.25]
    """

    free = True

    def initial(self) -> Tensor:
        return torch.zeros(self.num_layers - self.first_layer + 1)

    def starts(self) -> Tensor:
        """The same drop before every layer, and most of the drop before one layer."""
        start = self.initial()
        return torch.cat([start[None], 3 * torch.eye(len(start))[:-1]])

    def inverse(self, ratios: Tensor) -> Tensor:
        """theta `(..., P)` of non-increasing schedules `(..., L)`, nearly.

        A thousandth of the tokens more is dropped everywhere: there the softmax has a gradient.

        >>> kernel = Monotone(num_layers=4)
        >>> theta = kernel.inverse(torch.tensor([1.0, 1.0, 0.5, 0.0]))
        >>> [round(r, 2) for r in kernel(theta).tolist()]
        [1.0, 1.0, 0.5, 0.0]
        """
        levels = pad(pad(ratios[..., self.first_layer :], (1, 0), value=1.0), (0, 1))
        theta = (levels[..., :-1] - levels[..., 1:] + 1e-3).log()
        return (theta - theta.mean(-1, keepdim=True)).to(self.theta)

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        return {"p": theta.softmax(-1)}

    def ratios(self, i: Tensor, p: Tensor) -> Tensor:
        # The sum of what is dropped later, or never, is exact near 0.
        kept = p.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        return pad(kept, (self.first_layer, 0), value=1)  # (..., L)
