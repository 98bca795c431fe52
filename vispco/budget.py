"""Budgets: what they mean, how far a schedule is from one, and whole tokens that never exceed it.

A budget is a share of the prunable cost, 0 for the text alone and 1 for the full model (`0.5` or `"50%"`); with
`relative_to="total"` a share of the full cost; or absolute FLOPs (`1.8e12`, `"1.8 TFLOPs"`). It is about the
language model's prefill of the prompt, and it holds for EVERY sample that it is given the shape of.
"""

from __future__ import annotations

import math
import re
from numbers import Real

import torch
from torch import Tensor

from .config import whole_tokens
from .flops import CostModel

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}


def parse_budget(budget: float | str) -> tuple[float, bool]:
    """(number, whether it is absolute FLOPs). Raises ValueError with the forms that are understood.

    >>> parse_budget("50%"), parse_budget("1.8 TFLOPs"), parse_budget(0.2)
    ((0.5, False), (1800000000000.0, True), (0.2, False))
    """
    forms = "a share in [0, 1] such as 0.5 or '50%', or absolute FLOPs such as 1.8e12 or '1.8TFLOPs'"
    value, absolute = budget, False
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*([-+.\deE]*\d\.?)\s*(%|([kmgtp]?)flops?)?\s*", budget, re.IGNORECASE)
        try:
            value = float(match[1])
            value = value / 100 if match[2] == "%" else value * _UNITS[(match[3] or "").lower()]
        except (TypeError, ValueError):
            raise ValueError(f"budget {budget!r} is not understood: expected {forms}") from None
        absolute = match[3] is not None
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise ValueError(f"budget must be {forms}, got {budget!r}")
    absolute = absolute or value >= 1e6
    if not absolute and value > 1:
        raise ValueError(f"budget {budget!r} is over 1: expected {forms}")
    return float(value), absolute


class Budget:
    """One budget for samples of known shapes.

    cost: the model's FLOPs. n_visual, n_text: (samples,) tokens of each prompt. first_layer: the first layer whose
    input may be pruned. Raises ValueError if the budget is malformed, or below what dropping every token
    from `first_layer` on costs; the message names the reachable range.
    """

    def __init__(self, budget: float | str, cost: CostModel, n_visual: Tensor, n_text: Tensor,
                 first_layer: int = 1, relative_to: str = "prunable"):
        if relative_to not in ("prunable", "total"):
            raise ValueError(f"relative_to must be 'prunable' or 'total', got {relative_to!r}")
        shapes = torch.stack([n_visual, n_text], 1)[n_visual > 0].unique(dim=0)
        self.n_visual, self.n_text = shapes[:, 0], shapes[:, 1]  # (shapes,)
        self.cost, self.first_layer, self.layers = cost, first_layer, cost.dimensions.layers
        self.tokens = int(self.n_visual.max())  # whole tokens are counted out of the largest sample's
        self.full, self.text = (f.double() for f in (cost.full(self.n_visual, self.n_text), cost.text_only(self.n_text)))
        value, absolute = parse_budget(budget)
        floor = self.text if relative_to == "prunable" else torch.zeros_like(self.text)
        self.limit = torch.full_like(self.full, value) if absolute else floor + value * (self.full - floor)
        self.value = budget
        least = [self.tokens] * first_layer + [0] * (self.layers - first_layer)
        if not self.holds(least):
            lowest = self._flops(least)
            shares = ((lowest - floor) / (self.full - floor)).max()
            reach = f"{float(lowest.max()):.4g} to {float(self.full.max()):.4g} FLOPs" if absolute else \
                f"{math.ceil(float(shares) * 1e4) / 1e4:g} to 1"
            raise ValueError(f"budget {budget!r} cannot be reached: with every visual token dropped from layer {first_layer} "
                             f"on (the first that this method can prune), the reachable range is {reach}")

    def _flops(self, counts: list[int]) -> Tensor:
        """FLOPs (shapes,) of whole counts out of `tokens`, with each sample's own whole tokens."""
        ratios = torch.tensor(counts, dtype=torch.float64) / self.tokens
        return self.cost(whole_tokens(ratios, self.n_visual[:, None]), self.n_visual, self.n_text).double()

    def holds(self, counts: list[int]) -> bool:
        """Whether no sample exceeds the budget when `counts[i]` of `tokens` enter layer i."""
        return bool((self._flops(counts) <= self.limit).all())

    def slack(self, ratios: Tensor) -> Tensor:
        """Least (B - F) / (prunable cost) over the samples, differentiable in the keep ratios (L,)."""
        flops = self.cost(ratios.double() * self.n_visual[:, None], self.n_visual, self.n_text)
        return ((self.limit - flops) / (self.full - self.text)).min()

    def share(self, counts: list[int]) -> float:
        """Prunable share of the costliest sample (0 text only, 1 full)."""
        return float(((self._flops(counts) - self.text) / (self.full - self.text)).max())

    def harden(self, ratios: Tensor) -> list[float]:
        """Keep ratios in whole tokens: never above the budget, and as close below it as whole tokens allow.

        First all drops are scaled by one factor until the nearest whole tokens fit (the schedule keeps its
        shape); then tokens are added one at a time, where most was rounded away, until none fits any more.
        """
        ratios = ratios.detach().double().cpu()
        drops, n = 1 - ratios, self.tokens
        prunable = torch.arange(self.layers) >= self.first_layer

        def scaled(t: float) -> Tensor:
            return (1 - t * drops).clamp(0, 1)

        def shifted(t: float) -> Tensor:  # for schedules that keep everything where they must not
            return (ratios - t * prunable).clamp(0, 1)

        def whole(r: Tensor) -> list[int]:
            counts = (r * n).round().long()
            return torch.where(r > 0, counts.clamp(min=1), counts).tolist()

        path, high = (scaled, 1e9) if self.holds(whole(scaled(1e9))) else (shifted, 1.0)
        low = 0.0  # too dear, high: fits. On a scale of t / (1 + t), so that 60 halvings reach everywhere.
        if self.holds(whole(path(low))):
            high = low
        for _ in range(60 if high else 0):
            middle = (low / (1 + low) + high / (1 + high)) / 2
            middle /= 1 - middle
            low, high = (low, middle) if self.holds(whole(path(middle))) else (middle, high)
        wanted, counts = path(high) * n, whole(path(high))
        while self._add_token(counts, wanted):
            pass
        return [c / n for c in counts]

    def _add_token(self, counts: list[int], wanted: Tensor) -> bool:
        above = [self.tokens, *counts[:-1]]
        raisable = [i for i in range(self.first_layer, self.layers) if counts[i] < above[i]]
        for i in sorted(raisable, key=lambda i: (counts[i] - float(wanted[i]), i)):
            counts[i] += 1
            if self.holds(counts):
                return True
            counts[i] -= 1
        return False


def on_budget(ratios: Tensor, cost: CostModel, n_visual: Tensor, n_text: Tensor, limit: Tensor) -> Tensor:
    """Keep ratios (B, L) whose drops are scaled by one factor t per sample, so that each costs exactly its limit (B,).

        r' = max(0, 1 - t (1 - r)),   F(r') = B

    Differentiable in `ratios`: t is found by bisection, and its gradient is that of the implicit function,
    dt = -(dF . d(1 - r)) / (dF/dt). Where no t is large enough, everything that can be dropped is.

    >>> from vispco.flops import Dimensions
    >>> cost = CostModel(Dimensions(2, 8, 2, 2, 4, 16, 10))
    >>> n, text = torch.tensor([16]), torch.tensor([4])
    >>> half = (cost.full(n, text) + cost.text_only(text)).double() / 2
    >>> r = on_budget(torch.tensor([[1.0, 0.5]]), cost, n, text, half)
    >>> bool((cost(r * 16, n, text) - half).abs() < 1)
    True
    """
    drops = 1 - ratios.double()  # (B, L)

    def flops(t: Tensor, d: Tensor) -> Tensor:
        return cost((1 - t[:, None] * d).clamp(0, 1) * n_visual[:, None], n_visual, n_text)

    with torch.no_grad():
        low, high = torch.zeros_like(limit, dtype=torch.float64), torch.full_like(limit, 1e6, dtype=torch.float64)
        for _ in range(60):  # on a scale of t / (1 + t), which reaches everywhere
            middle = (low / (1 + low) + high / (1 + high)) / 2
            middle = middle / (1 - middle)
            over = flops(middle, drops) > limit
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    t = high.clone().requires_grad_()
    with torch.enable_grad():
        slope, = torch.autograd.grad(flops(t, drops.detach()).sum(), t)  # negative
    now = flops(high, drops)
    t = high - (now - now.detach()) / slope.clamp(max=-1e-9)
    return (1 - t[:, None] * drops).clamp(0, 1).to(ratios)
