"""Budgets: what they mean, and how far a schedule is from one.

A budget is a share of the prunable cost: 0 is the text alone, 1 the full model (`0.5` or `"50%"`).
With `relative_to="total"` it is a share of the full cost. It can also be absolute (`1.8e12` FLOPs,
`"1.5 GB"`, `"20 ms"`). A budget is about the language model's prefill of the prompt, and it holds
for EVERY sample whose shape it is given. `"192 tokens"` is in the papers' unit, visual tokens on
average over the layers. Several budgets at once are a dict: `{"flops": 0.5, "kv_cache": "40%"}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import schedule
from .config import whole_tokens
from .registry import did_you_mean
from .visual_tokens import VisualTokens

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_FLOPS = {prefix + end: x for prefix, x in _PREFIXES.items() for end in ("flop", "flops")}
_BYTES = {prefix + "b": x for prefix, x in _PREFIXES.items()}
_BYTES |= {prefix + "ib": 1024.0**i for i, prefix in enumerate("kmgt", 1)}
_BYTES["bytes"] = 1.0

#: Per unit of cost: how absolute budgets are written, and the factors of lower-case suffixes.
_UNITS = {
    "FLOPs": ("1.8e12 or '1.8TFLOPs'", _FLOPS),
    "bytes": ("1.5e9 or '1.5GB'", _BYTES),
    "seconds": ("'20ms'", {"s": 1.0, "ms": 1e-3, "us": 1e-6, "seconds": 1.0}),
    "tokens": ("'192tokens'", {"tokens": 1.0, "token": 1.0}),
}

#: What can be limited: the names in a budget of several, and the units of their costs.
LIMITS = {"flops": "FLOPs", "kv_cache": "bytes", "latency": "seconds", "tokens": "tokens"}


def limited(budget: Any) -> str:
    """What one budget limits, a name in LIMITS: its unit says so, and is FLOPs without one.

    >>> limited(0.5), limited("1.8 TFLOPs"), limited("192 tokens")
    ('flops', 'flops', 'tokens')
    """
    in_tokens = isinstance(budget, str) and re.search(r"tokens?\s*$", budget, re.IGNORECASE)
    return "tokens" if in_tokens else "flops"


def parse_budget(budget: float | str, unit: str = "FLOPs") -> tuple[float, bool]:
    """A budget as (number, whether it is absolute).

    unit: of the cost: "FLOPs", "bytes" or "seconds". A number of a million or more is absolute, and
    so is one with a unit.
    Raises ValueError with the forms that are understood.

    >>> parse_budget("50%"), parse_budget("1.8 TFLOPs"), parse_budget("20 ms", "seconds")
    ((0.5, False), (1800000000000.0, True), (0.02, True))
    """
    examples, suffixes = _UNITS.get(unit, (f"'3 {unit}'", {unit.lower(): 1.0}))
    forms = f"a share in [0, 1] such as 0.5 or '50%', or absolute {unit} such as {examples}"
    if unit == "FLOPs":
        forms += ", or visual tokens such as '192tokens'"
    value: Any = budget
    absolute = False
    if isinstance(budget, str):
        match: Any = re.fullmatch(r"\s*([-+.\deE]*\d\.?)\s*(%|[a-z]*)\s*", budget, re.IGNORECASE)
        try:
            value, suffix = float(match[1]), match[2].lower()
            value = value / 100 if suffix == "%" else value * {"": 1.0, **suffixes}[suffix]
        except (TypeError, ValueError, KeyError):
            hint = _meant(budget)
            raise ValueError(
                f"budget {budget!r} is not understood: {hint}expected {forms}"
            ) from None
        absolute = suffix not in ("", "%")
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ValueError(f"budget must be {forms}, got {budget!r}")
    absolute = absolute or value >= 1e6
    if not absolute and value > 1:
        meant = {"seconds": "ms", "bytes": "GB", "tokens": "tokens"}.get(
            unit, "%" if value <= 100 else "tokens"
        )
        hint = f"did you mean '{value:g}{meant}'? " if value >= 5 or meant == "GB" else ""
        raise ValueError(f"budget {budget!r} is over 1: {hint}expected {forms}")
    return float(value), absolute


def _meant(text: str) -> str:
    """A hint at what was meant by a budget that is written otherwise, or of another unit."""
    match = re.fullmatch(r"\s*(\d*\.?\d+)(?:/(\d*\.?\d+))?\s*([a-z]*)\s*", text, re.IGNORECASE)
    if match is None:
        return ""
    number, over, unit = match[1], match[2], match[3].lower()
    if over and not unit and float(over):
        return f"did you mean {float(number) / float(over):.4g}? "
    if unit in ("percent", "percents", "pct", "p"):
        return f"did you mean '{number}%'? "
    if unit in ("tok", "toks", "vt") or re.fullmatch("to?k?e?n?s?", unit):
        return f"did you mean '{number}tokens'? "
    for name in ("kv_cache", "latency"):
        if unit in _UNITS[LIMITS[name]][1]:
            written = f"{name}={number}{match[3]}, in Python {{{name!r}: '{number}{match[3]}'}}"
            return f"did you mean {written}? "
    return ""


def check_budget(budget: Any) -> None:
    """Check one budget of FLOPs or tokens, or a dict {name in LIMITS: budget} of several limits.

    Raises ValueError for anything else.

    >>> check_budget({"flops": 0.5, "latency": "20 ms"})
    """
    if not isinstance(budget, Mapping):
        parse_budget(budget, LIMITS[limited(budget)])
        return
    if not budget:
        raise ValueError(f"a budget of several limits is empty: limit some of {', '.join(LIMITS)}")
    for name, value in budget.items():
        if name not in LIMITS:
            hint = did_you_mean(name, LIMITS)
            raise ValueError(
                f"a budget cannot limit {name!r}: {hint}expected some of {', '.join(LIMITS)}"
            )
        parse_budget(value, LIMITS[name])


def limit_for(
    budget: float | str | Mapping,
    costs: Mapping,
    n_visual: Tensor,
    n_text: Tensor,
    first_layer: int = 1,
    relative_to: str = "prunable",
) -> Budget:
    """The limit that a budget stands for: a `Budget`, or the `Joint` of a dict of several.

    costs: {name in LIMITS: cost}. The other arguments and the errors are those of `Budget`.
    Raises ValueError for a limit on something that has no cost here.
    """
    check_budget(budget)

    def single(value: float | str, name: str) -> Budget:
        return Budget(value, costs[name], n_visual, n_text, first_layer, relative_to)

    costs = {"tokens": VisualTokens(costs["flops"].dimensions), **costs}
    if not isinstance(budget, Mapping):
        return single(budget, limited(budget))
    if missing := [name for name in budget if costs.get(name) is None]:
        raise ValueError(
            f"the budget {dict(budget)} limits {missing[0]}, which nothing measures here: pass a "
            f"table, options={{'{missing[0]}': vispco.LatencyTable.measure(model, lengths)}}"
        )
    return Joint({name: single(budget[name], name) for name in LIMITS if name in budget})


class Budget:
    """One budget for prompts of known shapes.

    cost: a cost model (`vispco.flops.Cost`). n_visual, n_text: (samples,) tokens of each prompt.
    first_layer: the first layer whose input may be pruned.
    relative_to: what a share is of, "prunable" or "total".

    value: the budget as asked for. tokens: visual tokens of the largest prompt; whole tokens are
        counted out of these. layers: of the decoder.
    full, text, limit: (shapes,) cost of the full model, of the text alone, and the most allowed.

    Raises ValueError if the budget is malformed; if it is below what dropping every token from
    `first_layer` on costs (the message names the reachable range); or if pruning saves nothing of
    a prompt.
    """

    def __init__(
        self,
        budget: float | str,
        cost,
        n_visual: Tensor,
        n_text: Tensor,
        first_layer: int = 1,
        relative_to: str = "prunable",
    ):
        if relative_to not in ("prunable", "total"):
            raise ValueError(f"relative_to must be 'prunable' or 'total', got {relative_to!r}")
        shapes = torch.stack([n_visual, n_text], 1)[n_visual > 0].unique(dim=0)
        self.n_visual, self.n_text = shapes.unbind(1)
        self.cost, self.layers = cost, cost.dimensions.layers
        self.value: Any = budget
        self.first_layer = first_layer
        self.tokens = int(self.n_visual.max())
        self.full = self._costs(self.everything)
        self.text = cost.text_only(self.n_text).double()
        value, absolute = parse_budget(budget, cost.unit)
        if flat := (self.full <= self.text).nonzero()[:, 0].tolist():
            prompt = f"{self.n_visual[flat[0]]} visual tokens beside {self.n_text[flat[0]]} of text"
            raise ValueError(
                f"{prompt} cost no {cost.unit}, so that pruning saves none: leave this limit out"
            )
        floor = self.text if relative_to == "prunable" else torch.zeros_like(self.text)
        if absolute:
            self.limit = torch.full_like(self.full, value)
        elif value == 1:
            # Exactly the full model, to the bit.
            self.limit = self.full
        else:
            self.limit = floor + value * (self.full - floor)
        if not self.holds(self.least):
            lowest = self._costs(self.least)
            share = math.ceil(float(((lowest - floor) / (self.full - floor)).max()) * 1e4) / 1e4
            reach = f"{share:g} to 1"
            if absolute:
                reach = f"{float(lowest.max()):.4g} to {float(self.full.max()):.4g} {cost.unit}"
            raise ValueError(
                f"budget {budget!r} cannot be reached: with every visual token dropped from layer "
                f"{first_layer} on (the first that this method can prune), the reachable range is "
                f"{reach}"
            )

    @property
    def everything(self) -> list[int]:
        """The counts of the full model: all visual tokens enter every layer."""
        return [self.tokens] * self.layers

    @property
    def least(self) -> list[int]:
        """The cheapest counts: no visual token from `first_layer` on."""
        return [self.tokens] * self.first_layer + [0] * (self.layers - self.first_layer)

    def _costs(self, counts: Sequence[int] | Tensor) -> Tensor:
        """Costs (..., shapes) of whole counts (..., L), out of `tokens`, at every prompt."""
        ratios = torch.as_tensor(counts, dtype=torch.float64)[..., None, :] / self.tokens
        own = whole_tokens(ratios, self.n_visual[:, None])
        return self.cost(own, self.n_visual, self.n_text).double()

    def fits(self, counts: Tensor) -> Tensor:
        """Which schedules of whole tokens (C, L) are within the budget at every prompt: (C,)."""
        return (self._costs(counts) <= self.limit).all(-1)

    def holds(self, counts: Sequence[int]) -> bool:
        """Whether no prompt exceeds the budget when `counts[i]` of `tokens` enter layer i."""
        return bool(self.fits(torch.tensor([counts])))

    def slacks(self, ratios: Tensor) -> Tensor:
        """What each constraint leaves of schedules (..., L): (..., m), negative where exceeded.

        The least (B - F) / (prunable cost) over the prompts, differentiable in the keep ratios.
        """
        counts = ratios.double()[..., None, :] * self.n_visual[:, None]
        left = self.limit - self.cost(counts, self.n_visual, self.n_text)
        return (left / (self.full - self.text)).min(-1, keepdim=True).values

    def slack(self, ratios: Tensor) -> Tensor:
        """The least of the slacks (...), differentiable in the keep ratios (..., L)."""
        return self.slacks(ratios).min(-1).values

    def share(self, counts: Sequence[int]) -> float:
        """Share of the prunable cost of the costliest prompt (0 text only, 1 full)."""
        return float(((self._costs(counts) - self.text) / (self.full - self.text)).max())

    def reachable(self, ratios: Tensor) -> bool:
        """Whether a schedule (L,) can keep its form: all its drops, made larger, fit at last."""
        everything_dropped = schedule.stretch(ratios.double(), 1e9)
        return self.holds(schedule.nearest_tokens(everything_dropped, self.tokens))

    def harden(self, ratios: Tensor) -> list[float]:
        """Keep ratios (L,) in whole tokens: never above the budget, as close below it as can be.

        See `vispco.schedule.harden`.

        >>> from vispco.flops import CostModel, Dimensions
        >>> cost = CostModel(Dimensions(3, 8, 2, 2, 4, 16, 10))
        >>> budget = Budget(0.5, cost, torch.tensor([16]), torch.tensor([4]))
        >>> counts = [round(r * 16) for r in budget.harden(torch.tensor([1.0, 0.4, 0.2]))]
        >>> counts, budget.holds(counts), budget.holds([16, 6, 4]), budget.holds([16, 7, 3])
        ([16, 6, 3], True, False, False)
        """
        return schedule.harden(ratios, self)


class Joint(Budget):
    """Several budgets of the same samples at once: a schedule is within if it is within each.

    limits: {name: budget}. `share` is that of the first budget.
    Raises ValueError without budgets, or for budgets of different samples or layers.

    >>> from vispco.flops import CostModel, Dimensions, KVCacheMemory
    >>> size, prompt = Dimensions(2, 8, 2, 2, 4, 16, 10), (torch.tensor([16]), torch.tensor([4]))
    >>> flops = Budget(0.8, CostModel(size), *prompt)
    >>> both = Joint({"flops": flops, "kv_cache": Budget(0.75, KVCacheMemory(size), *prompt)})
    >>> both.harden(torch.tensor([1.0, 0.7])), both.value
    ([1.0, 0.5], {'flops': 0.8, 'kv_cache': 0.75})
    """

    def __init__(self, limits: Mapping[str, Budget]):
        if not limits:
            raise ValueError("a Joint needs at least one budget")
        self.limits = dict(limits)
        first, *others = self.limits.values()
        for other in others:
            same = (first.layers, first.first_layer) == (other.layers, other.first_layer)
            same = same and torch.equal(first.n_visual, other.n_visual)
            if not same or not torch.equal(first.n_text, other.n_text):
                raise ValueError(
                    "the budgets of a Joint must be for the same samples, layers and first layer"
                )
        # A Joint is its first budget, with the others beside it.
        vars(self).update(vars(first))
        self.value = {name: limit.value for name, limit in self.limits.items()}

    def fits(self, counts: Tensor) -> Tensor:
        """Which schedules of whole tokens (C, L) are within each budget at every prompt: (C,)."""
        return torch.stack([limit.fits(counts) for limit in self.limits.values()]).all(0)

    def slacks(self, ratios: Tensor) -> Tensor:
        """Slack of each budget (..., m), differentiable in the keep ratios (..., L)."""
        return torch.cat([limit.slacks(ratios) for limit in self.limits.values()], -1)

    def shares(self, counts: Sequence[int]) -> dict[str, float]:
        """{name: share of that budget's prunable cost, of the costliest sample}."""
        return {name: limit.share(counts) for name, limit in self.limits.items()}
