"""Gradient estimators under study; importing this module adds them to `vispco.ste.ESTIMATORS`."""

from __future__ import annotations

import torch
from torch import Tensor

from vispco.relaxation import descending_ranks, hard_mask, normalise
from vispco.ste import ESTIMATORS, MaskFunction, default, straight_through_mask


def gumbel(
    generator: torch.Generator,
    *,
    noise: float = 1.0,
    sigma: float | None = None,
    temperature: float = 0.1,
) -> MaskFunction:
    """Gumbel top-k: the highest of log s_j + noise g_j.

    It draws tokens in proportion to s_j^(1 / noise). The value differs from what will be deployed:
    it is one draw of a randomised method.
    """

    def mask(scores, keep, keep_tokens, alive, weight):
        s = scores.to(torch.promote_types(scores.dtype, torch.float32))
        positive = alive & (s > 0)
        least = s.masked_fill(~positive, torch.inf).amin(-1, keepdim=True).clamp(max=1)  # (B, 1)
        uniform = torch.rand(s.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(s)
        noisy = torch.where(s > least, s, least).log() - noise * (-uniform.log()).log()
        # NaN is for `hard_mask` to find.
        noisy = noisy.where(~s.isnan(), s)
        return straight_through_mask(
            noisy, keep, keep_tokens, alive, sigma=sigma, temperature=temperature
        )

    return mask


def perturbed(
    generator: torch.Generator,
    *,
    normalisation: str = "rank",
    noise: float = 0.1,
    samples: int = 16,
) -> MaskFunction:
    """The highest tokens, with the gradient of the mean top-k of noisy copies of the scores.

    dm_j / dk~ = 1/2 P(j is the k-th of s + noise z) + 1/2 P(j is the next),   z ~ N(0, 1)

    It is the central difference in k of E[top-k]. Over all tokens it sums to 1.
    Raises ValueError unless samples >= 1.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples!r}")

    def mask(scores, keep, keep_tokens, alive, weight):
        hard = hard_mask(scores, keep_tokens, alive)
        s = normalise(scores, alive, normalisation)
        slope = torch.zeros_like(s)
        for _ in range(samples):
            z = torch.randn(s.shape, generator=generator).to(s)
            ranks = descending_ranks(s.detach() + noise * z, alive)
            slope += _window(ranks, keep_tokens, alive, 1)
        return _linear(hard.to(s.dtype), slope / samples, keep)

    return mask


def boundary(generator: torch.Generator, *, reach: int = 1) -> MaskFunction:
    """The highest tokens; the last `reach` tokens kept and the next `reach` share the gradient.

    dm_j / dk~ = 1 / (number of such tokens)

    Over all tokens it sums to 1: one token for one token.
    Raises ValueError unless reach >= 1.
    """
    if reach < 1:
        raise ValueError(f"reach must be at least 1 token, got {reach!r}")

    def mask(scores, keep, keep_tokens, alive, weight):
        precise = torch.promote_types(scores.dtype, torch.float32)
        hard = hard_mask(scores, keep_tokens, alive).to(precise)
        window = _window(descending_ranks(scores, alive), keep_tokens, alive, reach)
        return _linear(hard, window.to(hard), keep)

    return mask


def fractional(
    generator: torch.Generator, *, reach: float = 1.0, midpoint: bool = False
) -> MaskFunction:
    """The highest tokens up to a total weight of k~ + reach u, the last of them in part.

    p'_j = min(p_j, max(0, k~ + reach u - sum of p over the tokens ranked higher))
    m_j = p'_j / p_j

    p_j is the weight a token has had so far (1 at first); u is uniform in (-1, 1). No relaxation:
    the derivative of the loss in the weight of the one token on the edge, over all weights from 0
    to 1, IS the difference of the loss with and without it. So on average over u, the gradient is
    that of E[loss(k~ + reach u)]: (loss(k~ + reach) - loss(k~ - reach)) / (2 reach). u is the same
    for all layers of a pass. So layers without a drop stay without one, and a token that an earlier
    layer takes is not taken twice. The price is variance: one token says it all.

    reach: in tokens. midpoint: give the edge token a weight of 1/2: less variance, a little bias.
    Raises ValueError unless reach > 0.
    """
    if not reach > 0:
        raise ValueError(f"reach must be a positive number of tokens, got {reach!r}")
    drawn: list[Tensor] = []

    def mask(scores, keep, keep_tokens, alive, weight):
        if not drawn:
            drawn.append(2 * torch.rand(len(scores), generator=generator) - 1)
        # Looks for NaN.
        hard_mask(scores, keep_tokens, alive)
        precise = torch.promote_types(scores.dtype, torch.float32)
        weight = weight.to(precise).masked_fill(~alive, 0)
        wanted = keep.detach() + reach * drawn[0].to(keep)
        # The slope at 0 knows no bound.
        part = 0.5 if midpoint else (wanted - wanted.floor()).clamp(0.02, 0.98)
        wanted = torch.where(keep_tokens > 0, (wanted.floor() + part).clamp(min=0.5), 0)
        wanted = wanted + (keep - keep.detach())  # (B,)
        order = descending_ranks(scores, alive).argsort(dim=-1, stable=True)
        in_order = weight.gather(1, order)
        above = torch.zeros_like(weight).scatter(1, order, in_order.cumsum(-1) - in_order)
        room = (wanted.to(weight)[:, None] - above).clamp(min=0)
        # At the boundary use `room`: same value, but its gradient in k~ is not zero.
        left = torch.where(room <= weight + 1e-4, room, weight)
        return torch.where(alive, left / weight.where(alive, 1), 0)

    return mask


def _window(ranks: Tensor, keep_tokens: Tensor, alive: Tensor, reach: int) -> Tensor:
    """Equal shares (B, N) of 1 over the alive tokens at most `reach` places from the edge."""
    edge = keep_tokens[:, None]
    near = alive & (ranks >= edge - reach) & (ranks < edge + reach)
    return near / near.sum(-1, keepdim=True).clamp(min=1)


def _linear(value: Tensor, slope: Tensor, keep: Tensor) -> Tensor:
    """`value` (B, N) to the bit, with d/d keep = `slope`."""
    return value + slope.detach() * (keep - keep.detach())[:, None].to(slope)


ESTIMATORS |= {
    "rank": default,
    "gumbel": gumbel,
    "perturbed": perturbed,
    "boundary": boundary,
    "fractional": fractional,
}
