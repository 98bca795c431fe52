"""Kernel functions r_i = R(i; theta): per-layer keep ratios from a few learnable numbers.

VisPCO (arXiv 2604.15188) describes a whole schedule of `L` keep ratios by a short curve over the layer
index `i`, so that a gradient has few directions to look in. Every kernel here yields, for ANY theta, ratios
in [0, 1] that never increase and that are exactly 1 before the first layer that can be pruned.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .registry import register_kernel


class Kernel(nn.Module):
    """Base class: one unconstrained parameter vector `theta`, shape `(P,)`, and the curve it stands for.

    num_layers: number of decoder layers, L.
    first_layer: first layer whose INPUT may be pruned. Methods that rank tokens by the attention of the layer
        before need 1: there is nothing to look at before layer 0.

    A subclass writes the paper's formula as `ratios(i, ...)`, the start as `initial()` and, so that the
    formula can use the paper's letters, `named(theta)`: the constrained quantities behind theta, passed on to
    `ratios` by name.

    Raises ValueError if `num_layers` < 1 or `first_layer` is not in 0..num_layers - 1.

    >>> class Constant(Kernel):
    ...     def initial(self): return torch.zeros(1)
    ...     def ratios(self, i, theta): return theta.sigmoid().expand(*theta.shape[:-1], len(i))
    >>> Constant(num_layers=4)().tolist()
    [1.0, 0.5, 0.5, 0.5]
    """

    #: Whether every non-increasing schedule is one of its curves.
    free: bool = False
    #: Whether its curves are steps, each before one layer.
    stairs: bool = False

    def __init__(self, num_layers: int, first_layer: int = 1):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers!r}")
        if not 0 <= first_layer < num_layers:
            raise ValueError(f"first_layer must be in 0..{num_layers - 1}, got {first_layer!r}: "
                             "no layer would be left to prune; pass a smaller first_layer")
        self.num_layers, self.first_layer = num_layers, first_layer
        self.theta = nn.Parameter(self.initial())

    def initial(self) -> Tensor:
        """Where a search starts: theta `(P,)`."""
        raise NotImplementedError(f"{type(self).__name__} must define initial(): the first theta, shape (P,)")

    def starts(self) -> Tensor:
        """Thetas `(n, P)` worth a look before a search starts at the best of them, `initial()` first.

        A gradient that starts far from where a step belongs may never find it.
        """
        return self.initial()[None]

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """The formula's own quantities from theta `(..., P)`, within bounds: each `(..., 1)` or longer."""
        return {"theta": theta}

    def ratios(self, i: Tensor, *args: Any, **named: Any) -> Tensor:
        """The formula as published, before clipping: layer indices `(L,)` -> ratios `(..., L)`."""
        raise NotImplementedError(f"{type(self).__name__} must define ratios(i, ...): the curve, (..., L)")

    def _before_layers(self) -> Tensor:
        """For each layer that can be pruned, the logit of the place half a layer before it, k / L."""
        layers = torch.arange(self.first_layer, self.num_layers)
        return ((layers - 0.5).clamp(min=0.25) / self.num_layers).logit()

    def schedule(self, theta: Tensor) -> Tensor:
        """Keep ratios `(..., L)` of any theta `(..., P)`: in [0, 1], non-increasing, 1 before `first_layer`.

        Raises ValueError if the last dimension of theta is not P.

        >>> SingleLayer(num_layers=3).schedule(torch.zeros(5, 7, 2)).shape
        torch.Size([5, 7, 3])
        """
        if theta.shape[-1:] != self.theta.shape:
            raise ValueError(f"theta must have shape (..., {self.num_parameters}), got {tuple(theta.shape)}")
        i = torch.arange(self.num_layers, dtype=theta.dtype, device=theta.device)
        ratios = self.ratios(i, **self.named(theta)).clamp(0, 1)  # (..., L)
        ratios = torch.where(i < self.first_layer, 1, ratios)
        return ratios.cummin(-1).values  # rounding alone could make a ratio grow by one ulp

    def settled(self, theta: Tensor | None = None) -> Tensor:
        """The schedule to deploy `(..., L)`: the curve, with sharp steps for kernels that mean steps."""
        return self.schedule(self.theta if theta is None else theta).detach()

    def forward(self, theta: Tensor | None = None) -> Tensor:
        """`schedule` of the kernel's own theta `(L,)`, or of the given one."""
        return self.schedule(self.theta if theta is None else theta)

    @property
    def num_parameters(self) -> int:
        """P, the length of theta."""
        return self.theta.numel()

    def describe(self) -> dict[str, float | list[float]]:
        """The current quantities in the paper's letters, for logs.

        >>> SingleLayer(num_layers=28).describe()
        {'k': 14.0, 'r': 0.5}
        """
        values = {name: value.detach().tolist() for name, value in self.named(self.theta).items()}
        return {name: value[0] if len(value) == 1 else value for name, value in values.items()}


class Stairs(Kernel):
    """Mixin for kernels of steps: gamma, which gives a gradient to their places, is not what they mean; and so little
    left that no finite theta could drop it means nothing left."""

    stairs = True
    gamma: float

    def settled(self, theta: Tensor | None = None) -> Tensor:
        gamma, self.gamma = self.gamma, 1e6
        try:
            ratios = super().settled(theta)
        finally:
            self.gamma = gamma
        return ratios.where(ratios >= 0.005, 0)


@register_kernel("p_sigmoid")
class PSigmoid(Kernel):
    """Tokens leave around layer k until a fraction r is left; `gamma` is how abruptly.

    r_i = 1 + (r - 1) sigmoid(gamma (i - k)),   k = L sigmoid(theta_0) in layers,   r = sigmoid(theta_1)

    The paper calls it "multi-layer p-sigmoid" with gentle gamma (unpublished; 1 here), "single-layer" with a
    large one.
    Raises ValueError unless gamma > 0.

    >>> PSigmoid(num_layers=4)(torch.tensor([0., -100.])).tolist()[2]  # i = k: half of the drop is done
    0.5
    """

    def __init__(self, num_layers: int, first_layer: int = 1, *, gamma: float = 1.0):
        self.gamma = _positive("gamma", gamma)
        super().__init__(num_layers, first_layer)

    def initial(self) -> Tensor:
        return torch.zeros(2)  # k = L / 2, r = 1 / 2

    def starts(self) -> Tensor:
        return torch.cat([self.initial()[None], pad(self._before_layers()[:, None], (0, 1))])

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        return {"k": self.num_layers * theta[..., :1].sigmoid(), "r": theta[..., 1:].sigmoid()}

    def ratios(self, i: Tensor, k: Tensor, r: Tensor) -> Tensor:
        return 1 + (r - 1) * torch.sigmoid(self.gamma * (i - k))


@register_kernel("single_layer")
class SingleLayer(Stairs, PSigmoid):
    """All pruning at one layer k, where a fraction r is left: a p-sigmoid with gamma = 10.

    >>> [round(r, 2) for r in SingleLayer(num_layers=6)(torch.tensor([0., -1.])).tolist()]
    [1.0, 1.0, 1.0, 0.63, 0.27, 0.27]
    """

    def __init__(self, num_layers: int, first_layer: int = 1, *, gamma: float = 10.0):
        super().__init__(num_layers, first_layer, gamma=gamma)


@register_kernel("exponential")
class Exponential(Kernel):
    """A constant fraction is lost from layer to layer.

    r_i = r exp(-k i),   k = sigmoid(theta_0) per layer,   r = sigmoid(theta_1)

    >>> [round(r, 3) for r in Exponential(num_layers=3)(torch.zeros(2)).tolist()]  # k = r = 1/2
    [1.0, 0.303, 0.184]
    """

    def initial(self) -> Tensor:
        return torch.tensor([-math.log(self.num_layers), 2.0])  # k = 1 / (L + 1), r = 0.88

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        return {"k": theta[..., :1].sigmoid(), "r": theta[..., 1:].sigmoid()}

    def ratios(self, i: Tensor, k: Tensor, r: Tensor) -> Tensor:
        return r * torch.exp(-k * i)


@register_kernel("linear")
class Linear(Kernel):
    """A constant number of tokens is lost from layer to layer, until none are left.

    r_i = r - k i,   r = sigmoid(theta_1),   k = r sigmoid(theta_0) / max(1, first_layer) per layer

    The slope is tied to r so that the first prunable layer is never clipped to 0: there the gradient would
    vanish in every layer at once and a search could not come back.

    >>> Linear(num_layers=4)(torch.zeros(2)).tolist()  # r = 1/2, k = 1/4
    [1.0, 0.25, 0.0, 0.0]
    """

    def initial(self) -> Tensor:
        return torch.tensor([-math.log(self.num_layers), 2.0])  # some tokens are left at the last layer

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        r = theta[..., 1:].sigmoid()
        return {"k": r * theta[..., :1].sigmoid() / max(1, self.first_layer), "r": r}

    def ratios(self, i: Tensor, k: Tensor, r: Tensor) -> Tensor:
        return r - k * i


@register_kernel("multi_step")
class MultiStep(Stairs, Kernel):
    """A staircase of M steps, from 1 down to r (progressive pruning).

    r_i = 1 - (1 - r) sum_{j=1..M} v_j sigmoid(gamma (i - k_j))

    The paper's form has fixed places k_j = (2j - 1) L / (2M) and equal drops v_j = 1/M, that is
    `learn_positions=False, learn_weights=False`. By default these are only the start and both are learned,
    k_j = L sigmoid(.), v = softmax(.), so that single-layer pruning is a special case (all k_j equal).
    theta is [places (M), weights (M), r (1)], without what is not learned (a lone step weighs 1 in any case).
    Raises ValueError if steps < 1 or gamma <= 0.

    >>> [round(k, 4) for k in MultiStep(num_layers=12, steps=3).describe()["k"]]
    [2.0, 6.0, 10.0]
    >>> MultiStep(num_layers=12, steps=3, learn_positions=False, learn_weights=False).num_parameters
    1
    """

    def __init__(self, num_layers: int, first_layer: int = 1, *, steps: int = 3, gamma: float = 10.0,
                 learn_positions: bool = True, learn_weights: bool = True):
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps!r}")
        self.steps, self.gamma = steps, _positive("gamma", gamma)
        self.learn_positions, self.learn_weights = learn_positions, learn_weights and steps > 1
        super().__init__(num_layers, first_layer)

    def _places(self) -> Tensor:
        return (2 * torch.arange(1, self.steps + 1) - 1) / (2 * self.steps)  # (M,), as fractions of L

    def starts(self) -> Tensor:
        """Evenly spread steps; all steps at one layer, single-layer pruning, which this kernel contains; and nothing left
        after the last step, with the others at one earlier layer, at up to eight layers."""
        start, before = self.initial(), self._before_layers()
        if not self.learn_positions:
            return start[None]
        found = [start, *(torch.cat([k.expand(self.steps), start[self.steps:]]) for k in before)]
        few = before[torch.linspace(0, len(before) - 1, min(8, len(before))).round().long()]
        rest = start[self.steps:-1]
        found += [torch.cat([torch.stack([*[a] * (self.steps - 1), b]), rest, start.new_full((1,), -7.0)])
                  for a, b in itertools.combinations(few, 2) if self.steps > 1]
        return torch.stack(found)

    def initial(self) -> Tensor:
        places = self._places().logit() if self.learn_positions else torch.empty(0)
        return torch.cat([places, torch.zeros(self.steps if self.learn_weights else 0), torch.zeros(1)])

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        sizes = [self.steps * self.learn_positions, self.steps * self.learn_weights, 1]
        places, weights, r = theta.split(sizes, -1)
        k = places.sigmoid() if self.learn_positions else self._places().to(theta)
        v = weights.softmax(-1) if self.learn_weights else theta.new_full((self.steps,), 1 / self.steps)
        return {"k": self.num_layers * k, "v": v, "r": r.sigmoid()}

    def ratios(self, i: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        steps = v[..., None] * torch.sigmoid(self.gamma * (i - k[..., None]))  # (..., M, L)
        return 1 - (1 - r) * steps.sum(-2)


@register_kernel("monotone")
class Monotone(Kernel):
    """Any non-increasing schedule: a simplex over where the tokens are dropped (not in the paper).

    r_i = 1 - sum_{first_layer <= j <= i} p_j,   p = softmax(theta), L - first_layer + 1 entries

    p_j is the fraction of tokens dropped before layer j; the last entry is the fraction that is never
    dropped.

    >>> Monotone(num_layers=4)().tolist()
    [1.0, 0.75, 0.5, 0.25]
    """

    free = True

    def initial(self) -> Tensor:
        return torch.zeros(self.num_layers - self.first_layer + 1)

    def starts(self) -> Tensor:
        """The same drop everywhere, and most of the drop before one layer."""
        start = self.initial()
        return torch.cat([start[None], 3 * torch.eye(len(start))[:-1]])

    def inverse(self, ratios: Tensor) -> Tensor:
        """theta (..., P) of non-increasing schedules (..., L), nearly: a thousandth of the tokens more is dropped
        everywhere, for the softmax to have a gradient there.

        >>> kernel = Monotone(num_layers=4)
        >>> [round(r, 2) for r in kernel(kernel.inverse(torch.tensor([1.0, 1.0, 0.5, 0.0]))).tolist()]
        [1.0, 1.0, 0.5, 0.0]
        """
        levels = pad(pad(ratios[..., self.first_layer:], (1, 0), value=1.0), (0, 1))
        theta = (levels[..., :-1] - levels[..., 1:] + 1e-3).log()
        return (theta - theta.mean(-1, keepdim=True)).to(self.theta)

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        return {"p": theta.softmax(-1)}

    def ratios(self, i: Tensor, p: Tensor) -> Tensor:
        kept = p.flip(-1).cumsum(-1).flip(-1)[..., 1:]  # what is dropped later, or never: exact near 0
        return pad(kept, (self.first_layer, 0), value=1)  # (..., L)


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)
