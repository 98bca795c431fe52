"""Schedules: keep ratios and drops, and how a schedule is brought onto a budget in whole tokens.

A schedule has L keep ratios r_0 >= r_1 >= ... in [0, 1], one per layer. Seen the other way, it has
drops: the share of the tokens dropped before each layer that can be pruned, and last the share that
is never dropped. They sum to 1.

Every way onto a budget is a bisection along a path on which the cost only rises, or only falls:

    stretch    r' = max(0, 1 - t (1 - r))         all drops times t
    lower      r' = max(0, r - t), or s r          all ratios less
    cut        r' = r ** gamma                     a schedule that ends with nothing keeps its zeros

`limit` below is anything like `vispco.budget.Budget`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad


def to_drops(ratios: Tensor, first_layer: int) -> Tensor:
    """Drops (..., L - first_layer + 1) of schedules (..., L): before each layer from `first_layer`
    on, and never.

    >>> to_drops(torch.tensor([1.0, 0.75, 0.25]), first_layer=1).tolist()
    [0.25, 0.5, 0.25]
    """
    levels = pad(pad(ratios[..., first_layer:], (1, 0), value=1.0), (0, 1))
    return levels[..., :-1] - levels[..., 1:]


def from_drops(drops: Tensor, first_layer: int) -> Tensor:
    """Schedules (..., L) of drops (..., L - first_layer + 1): the inverse of `to_drops`.

    >>> from_drops(torch.tensor([0.25, 0.5, 0.25]), first_layer=1).tolist()
    [1.0, 0.75, 0.25]
    """
    kept = (1 - drops.cumsum(-1)[..., :-1]).clamp(0, 1)
    return pad(kept, (first_layer, 0), value=1.0)


def without_small_drops(ratios: Tensor, smallest: float = 0.05) -> Tensor:
    """The schedule (L,) without its drops of less than `smallest` of all tokens.

    A softmax never gives exactly 0, so a kernel cannot switch such a drop off by itself.

    >>> [round(r, 2) for r in without_small_drops(torch.tensor([1.0, 0.97, 0.96, 0.4])).tolist()]
    [1.0, 1.0, 1.0, 0.44]
    """
    drops = torch.cat([torch.ones_like(ratios[:1]), ratios[:-1]]) - ratios
    return 1 - drops.where(drops >= smallest, 0.0).cumsum(0)


def to_whole_tokens(ratios: Tensor, tokens: int) -> Tensor:
    """Ratios rounded to whole tokens of `tokens`, with the gradient of the ratios as they were
    (straight through).

    A search step therefore sees what will be deployed.

    >>> to_whole_tokens(torch.tensor([1.0, 0.52]), 4).tolist()
    [1.0, 0.5]
    """
    return (ratios.detach() * tokens).round() / tokens + (ratios - ratios.detach())


def stretch(ratios: Tensor, t: float | Tensor) -> Tensor:
    """The schedule with all its drops times t, clipped to [0, 1].

    >>> stretch(torch.tensor([1.0, 0.75, 0.5]), 2.0).tolist()
    [1.0, 0.5, 0.0]
    """
    return (1 - t * (1 - ratios)).clamp(0, 1)


def bisect(
    above: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    halvings: int = 60,
    *,
    odds: bool = False,
) -> tuple[Tensor, Tensor]:
    """Halve [low, high] around the boundary of a monotone test, elementwise; returns both ends.

    above: whether the boundary lies above a point. odds: halve on the scale t / (1 + t), on which
    60 halvings reach from 0 to a billion.

    >>> low, high = bisect(lambda x: x * x < 2, torch.tensor(0.0), torch.tensor(2.0), halvings=20)
    >>> round(float(low), 3), round(float(high), 3)
    (1.414, 1.414)
    """
    for _ in range(halvings):
        if odds:
            middle = (low / (1 + low) + high / (1 + high)) / 2
            middle = middle / (1 - middle)
        else:
            middle = (low + high) / 2
        up = above(middle)
        low, high = torch.where(up, middle, low), torch.where(up, high, middle)
    return low, high


def ramp(limit, width: float = 0.5) -> Tensor:
    """Keep ratios (L,) that fall from 1 to 0 along a line over `width` of the layers, as late as
    the limit allows.

        r_i = clip(1/2 + (k - i) / (width L), 0, 1)    from the first layer that can be pruned on

    Tokens are needed less the deeper the layer, which is why every published configuration drops
    them late (PyramidDrop's stages and the p-sigmoid of the VisPCO paper are such curves). The rule
    costs no forward pass.
    """
    layers = torch.arange(limit.layers, dtype=torch.float64)

    def around(k: Tensor) -> Tensor:
        line = (0.5 + (k - layers) / (width * limit.layers)).clamp(0, 1)
        return line.where(layers >= limit.first_layer, 1.0)

    first, last = torch.tensor([-1.0, 2.0], dtype=torch.float64) * limit.layers
    latest, _ = bisect(lambda k: limit.slack(around(k)) >= 0, first, last, halvings=30)
    return around(latest)


def project(ratios: Tensor, cost, n_visual: Tensor, n_text: Tensor, limit: Tensor) -> Tensor:
    """Keep ratios (B, L) stretched by one factor t per sample, so that each costs exactly its limit
    (B,).

        r' = max(0, 1 - t (1 - r)),   F(r') = B

    Differentiable in `ratios`. The gradient of t is that of the implicit function, dt = -(dF . d(1
    - r)) / (dF/dt). Where no t is large enough, everything that can be dropped is dropped.

    >>> from vispco.flops import CostModel, Dimensions
    >>> cost = CostModel(Dimensions(2, 8, 2, 2, 4, 16, 10))
    >>> n, text = torch.tensor([16]), torch.tensor([4])
    >>> half = (cost.full(n, text) + cost.text_only(text)).double() / 2
    >>> r = project(torch.tensor([[1.0, 0.5]]), cost, n, text, half)
    >>> bool((cost(r * 16, n, text) - half).abs() < 1)
    True
    """
    exact = ratios.double()

    def spent(t: Tensor, r: Tensor) -> Tensor:
        return cost(stretch(r, t[:, None]) * n_visual[:, None], n_visual, n_text)

    with torch.no_grad():
        nothing = torch.zeros_like(limit, dtype=torch.float64)
        _, found = bisect(lambda t: spent(t, exact) > limit, nothing, nothing + 1e6, odds=True)
    t = found.clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(spent(t, exact.detach()).sum(), t)
    now = spent(found, exact)
    # The slope is negative: more is dropped. Newton's step has the value 0 and the gradient of the
    # implicit function.
    t = found - (now - now.detach()) / slope.clamp(max=-1e-9)
    return stretch(exact, t[:, None]).to(ratios)


def fit(ratios: Tensor, limit, *, hold_cuts: bool = True, lower: bool = True) -> Tensor:
    """Schedules (C, L) brought onto the limit, as fractions of tokens; those that cannot be are
    left out.

    A schedule above the limit is stretched. One below it is shrunk: all drops by one factor. That
    would bring back the layers in which it keeps nothing, so with `hold_cuts` such a schedule grows
    as `r ** gamma` instead. Stretching lets the steepest drop take everything; with `lower`,
    schedules above the limit come a second time, their ratios times one factor.
    """
    over = (limit.slack(ratios) < 0)[:, None]
    cut = (ratios[:, -1:] <= 0) & hold_cuts
    prunable = torch.arange(limit.layers) >= limit.first_layer

    # Along each path the cost rises with s in [0, 1].
    def scaled(s: Tensor) -> Tensor:
        grown = torch.where(ratios > 0, ratios ** (1 - s), 0)
        kept = torch.where(cut, grown, 1 - (1 - s) * (1 - ratios))
        dropped = (1 - (1 - ratios) / s.clamp(min=1e-9)).clamp(min=0)
        return torch.where(over, dropped, kept)

    def lowered(s: Tensor) -> Tensor:
        return torch.where(prunable, s * ratios, ratios)

    def highest(path: Callable[[Tensor], Tensor]) -> Tensor:
        start = torch.zeros(len(ratios), 1, dtype=torch.float64)
        best, _ = bisect(
            lambda s: limit.slack(path(s))[:, None] >= 0, start, start + 1, halvings=25
        )
        return path(best)

    found = highest(scaled)
    if lower:
        found = torch.cat([found, highest(lowered)[over[:, 0]]])
    return found[limit.slack(found) >= 0]


def harden(ratios: Tensor, limit) -> list[float]:
    """Keep ratios (L,) in whole tokens: never above the limit, and as close below it as whole
    tokens allow.

    First all drops are stretched by one factor until the nearest whole tokens fit, so that the
    schedule keeps its shape. (One that keeps everything where it must not is lowered instead.) Then
    tokens are added one at a time, where most was rounded away, until none fits any more.

    The result is within one token of the best: one more token in any single layer would exceed the
    limit, or let the schedule rise. Ranking tokens costs FLOPs, and each layer that drops tokens
    ranks them. So a token more in several layers at once may still fit, where one more in a single
    layer would be one more drop to pay for.
    Raises FloatingPointError if a ratio is not finite.
    """
    wanted = ratios.detach().double()
    if not wanted.isfinite().all():
        raise FloatingPointError(f"keep ratios to harden must be finite, got {wanted.tolist()}")
    prunable = torch.arange(limit.layers) >= limit.first_layer

    def stretched(t: Tensor) -> Tensor:
        return stretch(wanted, t)

    def lowered(t: Tensor) -> Tensor:
        return (wanted - t * prunable).clamp(0, 1)

    reachable = limit.reachable(ratios)
    path = stretched if reachable else lowered
    # Neighbouring factors give the same whole tokens.
    holds = functools.cache(limit.holds)

    def too_dear(t: Tensor) -> Tensor:
        return torch.tensor(not holds(nearest_tokens(path(t), limit.tokens)))

    factor = torch.zeros((), dtype=torch.float64)
    if too_dear(factor):
        most = factor + (1e9 if reachable else 1.0)
        _, factor = bisect(too_dear, factor, most, odds=True)
    shape = path(factor)
    counts = list(nearest_tokens(shape, limit.tokens))
    while _add_token(counts, (shape * limit.tokens).tolist(), limit):
        pass
    return [count / limit.tokens for count in counts]


def nearest_tokens(ratios: Tensor, tokens: int) -> tuple[int, ...]:
    """Nearest whole numbers of `tokens`, but one where there is a fraction of one.

    >>> nearest_tokens(torch.tensor([1.0, 0.3, 0.01, 0.0]), 10)
    (10, 3, 1, 0)
    """
    counts = (ratios * tokens).round().clamp(min=1).where(ratios > 0, 0.0)
    return tuple(counts.long().tolist())


def _add_token(counts: list[int], wanted: list[float], limit) -> bool:
    """Add one token in place, at the layer where most was rounded away; False if none fits any
    more."""
    above = [limit.tokens, *counts[:-1]]
    raisable = [i for i in range(limit.first_layer, limit.layers) if counts[i] < above[i]]
    raisable.sort(key=lambda i: (counts[i] - wanted[i], i))
    fits = limit.fits(torch.tensor(counts) + torch.eye(limit.layers, dtype=torch.long)[raisable])
    for layer in itertools.compress(raisable, fits.tolist()):
        counts[layer] += 1
        return True
    return False
