"""Kernels of steps: tokens are dropped around one layer, or around a few."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..registry import register_kernel
from .base import Kernel


class SigmoidKernel(Kernel):
    """Base of the kernels whose drops are sigmoids over the layers.

    gamma: the slope at the middle of a drop, per layer. A finite gamma smooths the steps, so that
        their positions get a gradient. Where `stairs`, `settled` makes the steps sharp, and sets
        ratios below 0.005 to 0: no finite theta drops all tokens.

    Raises ValueError unless gamma > 0.
    """

    def __init__(self, num_layers: int, first_layer: int = 1, *, gamma: float = 1.0):
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma must be a positive number, got {gamma!r}")
        self.gamma = float(gamma)
        super().__init__(num_layers, first_layer)

    def settled(self, theta: Tensor | None = None) -> Tensor:
        if not self.stairs:
            return super().settled(theta)
        ratios = self(theta, gamma=1e6).detach()
        return ratios.where(ratios >= 0.005, 0)


@register_kernel("p_sigmoid")
class PSigmoid(SigmoidKernel):
    """Tokens leave around layer k until a fraction r is left; `gamma` is how abruptly.

    r_i = 1 + (r - 1) sigmoid(gamma (i - k)),   k = L sigmoid(theta_0),   r = sigmoid(theta_1)

    k is in layers. The paper's "multi-layer p-sigmoid" has a gentle gamma (unpublished; 1 here),
    its "single-layer" a large one. Raises ValueError unless gamma > 0.

    At layer i = k, half of the drop is done:

    >>> PSigmoid(num_layers=4)(torch.tensor([0., -100.])).tolist()[2]
    0.5
    """

    def initial(self) -> Tensor:
        # k = L / 2, r = 1 / 2
        return torch.zeros(2)

    def starts(self) -> Tensor:
        return torch.cat([self.initial()[None], pad(self._before_layers()[:, None], (0, 1))])

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        return {"k": self.num_layers * theta[..., :1].sigmoid(), "r": theta[..., 1:].sigmoid()}

    def ratios(self, i: Tensor, k: Tensor, r: Tensor, gamma: float = 0) -> Tensor:
        return 1 + (r - 1) * torch.sigmoid((gamma or self.gamma) * (i - k))


@register_kernel("single_layer")
class SingleLayer(PSigmoid):
    """All pruning at one layer k, where a fraction r is left: a p-sigmoid with gamma = 10.

    >>> [round(r, 2) for r in SingleLayer(num_layers=6)(torch.tensor([0., -1.])).tolist()]
    [1.0, 1.0, 1.0, 0.63, 0.27, 0.27]
    """

    stairs = True

    def __init__(self, num_layers: int, first_layer: int = 1, *, gamma: float = 10.0):
        super().__init__(num_layers, first_layer, gamma=gamma)


@register_kernel("multi_step")
class MultiStep(SigmoidKernel):
    """A staircase of M steps, from 1 down to r (progressive pruning).

    r_i = 1 - (1 - r) sum_{j=1..M} v_j sigmoid(gamma (i - k_j))

    The paper's form has fixed positions k_j = (2j - 1) L / (2M) and equal drops v_j = 1/M: here
    `learn_positions=False, learn_weights=False`. By default these are the start, and both are
    learned: k_j = L sigmoid(.), v = softmax(.). If all k_j are equal, it is single-layer pruning.
    theta is [positions (M), weights (M), r (1)], without what is not learned (one step weighs 1).
    Raises ValueError if steps < 1 or gamma <= 0.

    >>> [round(k, 4) for k in MultiStep(num_layers=12, steps=3).describe()["k"]]
    [2.0, 6.0, 10.0]
    >>> MultiStep(12, steps=3, learn_positions=False, learn_weights=False).num_parameters
    1
    """

    stairs = True

    def __init__(
        self,
        num_layers: int,
        first_layer: int = 1,
        *,
        steps: int = 3,
        gamma: float = 10.0,
        learn_positions: bool = True,
        learn_weights: bool = True,
    ):
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps!r}")
        self.steps = steps
        self.learn_positions, self.learn_weights = learn_positions, learn_weights and steps > 1
        super().__init__(num_layers, first_layer, gamma=gamma)

    def _positions(self) -> Tensor:
        """The paper's k_j / L, `(M,)`."""
        return (2 * torch.arange(1, self.steps + 1) - 1) / (2 * self.steps)

    def initial(self) -> Tensor:
        positions = self._positions().logit() if self.learn_positions else torch.empty(0)
        return pad(positions, (0, self.steps * self.learn_weights + 1))

    def starts(self) -> Tensor:
        """Evenly spread steps; all steps at one layer; and all steps but the last at one layer.

        In these the last step, at a later layer, drops the rest. Both are of up to eight layers.
        """
        start, before = self.initial(), self._before_layers()
        if not self.learn_positions:
            return start[None]
        found = [start]
        found += [torch.cat([k.expand(self.steps), start[self.steps :]]) for k in before]
        few = before[torch.linspace(0, len(before) - 1, min(8, len(before))).round().long()]
        rest = torch.cat([start[self.steps : -1], start.new_full((1,), -7.0)])
        for first, last in itertools.combinations(few, 2) if self.steps > 1 else ():
            found.append(torch.cat([first.expand(self.steps - 1), last[None], rest]))
        return torch.stack(found)

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        sizes = [self.steps * self.learn_positions, self.steps * self.learn_weights, 1]
        positions, weights, r = theta.split(sizes, -1)
        k = positions.sigmoid() if self.learn_positions else self._positions().to(theta)
        equal = theta.new_full((self.steps,), 1 / self.steps)
        v = weights.softmax(-1) if self.learn_weights else equal
        return {"k": self.num_layers * k, "v": v, "r": r.sigmoid()}

    def ratios(self, i: Tensor, k: Tensor, v: Tensor, r: Tensor, gamma: float = 0) -> Tensor:
        gamma = gamma or self.gamma
        steps = v[..., None] * torch.sigmoid(gamma * (i - k[..., None]))  # (..., M, L)
        return 1 - (1 - r) * steps.sum(-2)
