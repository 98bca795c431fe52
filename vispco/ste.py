"""Straight-through estimators: decide hard, learn soft.

A search step masks the tokens hard and needs d loss / d k~, the number of tokens wanted. An estimator is a function
from scores to a mask (B, N) whose VALUE is what the forward pass uses and whose GRADIENT says what one token more or
less would do. `ESTIMATORS` lists them; `tests.reproduction.estimators` measures their bias and variance.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .relaxation import descending_ranks, hard_mask, normalise, soft_mask


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard` with the gradient of `soft`, tensors of one shape.

    m^ = m~ + stop_gradient(m - m~)   (VisPCO, arXiv 2604.15188)

    Summed as m + (m~ - stop_gradient(m~)), the value is m to the bit, whatever m; as printed it may round.

    >>> import torch
    >>> soft = torch.tensor([0.3, 0.9], requires_grad=True)
    >>> straight_through(torch.tensor([0., 1.]), soft)
    tensor([0., 1.], grad_fn=<AddBackward0>)
    """
    return hard + (soft - soft.detach())


def straight_through_mask(scores: Tensor, keep: Tensor, keep_tokens: Tensor, alive: Tensor, *,
                          normalisation: str = "rank", sigma: float | None = None, temperature: float = 0.1,
                          check: bool = True) -> Tensor:
    """The mask of a search step: 1 for the highest-scoring tokens, 0 for others, differentiable in `keep`.

    scores, alive: `(B, N)`; keep: continuous number of tokens k~, `(B,)`, carries the gradient; keep_tokens:
    the whole number that is kept, `(B,)`. Returns `(B, N)`, float32 (float64 if the scores are). See
    `relaxation` for the other arguments and the errors.

    >>> import torch
    >>> keep = torch.tensor([1.6], requires_grad=True)
    >>> alive = torch.ones(1, 3, dtype=torch.bool)
    >>> mask = straight_through_mask(torch.tensor([[.2, .7, .1]]), keep, keep.long(), alive)
    >>> mask.tolist()
    [[0.0, 1.0, 0.0]]
    >>> mask.sum().backward(); bool(keep.grad > 0)
    True
    """
    hard = hard_mask(scores, keep_tokens, alive, check)
    soft = soft_mask(normalise(scores, alive, normalisation), keep, alive, sigma, temperature)
    return straight_through(hard.to(soft.dtype), soft)


@dataclass
class Pass:
    """What the estimators share during one forward pass.

    weight: (B, N) weight that each token had until now, in (0, 1]. dither: (B,) uniform in (-1, 1), the same for all
    layers. generator: where further noise comes from; noise is drawn on the CPU, so that a seed means the same on
    every device.
    """

    weight: Tensor
    dither: Tensor
    generator: torch.Generator


def rank(scores: Tensor, keep: Tensor, keep_tokens: Tensor, alive: Tensor, at: Pass, *,
         normalisation: str = "rank", sigma: float | None = None, temperature: float = 0.1) -> Tensor:
    """`straight_through_mask`: a sigmoid around the soft threshold, on scores that are uniform in (0, 1)."""
    return straight_through_mask(scores, keep, keep_tokens, alive, normalisation=normalisation, sigma=sigma,
                                 temperature=temperature)


def paper(scores: Tensor, keep: Tensor, keep_tokens: Tensor, alive: Tensor, at: Pass, *,
          normalisation: str = "minmax", sigma: float = 10.0, temperature: float = 0.1) -> Tensor:
    """The form of the paper: token j stands at j, sigma = 10 tokens however many there are, T = 0.1.

        w_j = exp(-(j - k~)^2 / (2 sigma^2)),   tau = sum_j w_j s_(j) / sum_j w_j,   m~_j = sigmoid((s_j - tau) / T)

    The value is the k highest tokens, which `s_j >= tau` is not to the token.
    """
    return straight_through_mask(scores, keep - 0.5, keep_tokens, alive, normalisation=normalisation, sigma=sigma,
                                 temperature=temperature)


def gumbel(scores: Tensor, keep: Tensor, keep_tokens: Tensor, alive: Tensor, at: Pass, *, noise: float = 1.0,
           sigma: float | None = None, temperature: float = 0.1) -> Tensor:
    """Gumbel top-k: the highest of log s_j + noise g_j, which draws tokens in proportion to s_j^(1 / noise).

    The value differs from what will be deployed: it is one draw of a randomised method.
    """
    s = scores.to(torch.promote_types(scores.dtype, torch.float32))
    least = s.masked_fill(~(alive & (s > 0)), torch.inf).amin(-1, keepdim=True).clamp(max=1)  # (B, 1)
    uniform = torch.rand(s.shape, generator=at.generator).clamp(1e-6, 1 - 1e-6).to(s)
    noisy = torch.where(s > least, s, least).log() - noise * (-uniform.log()).log()
    noisy = noisy.where(~s.isnan(), s)  # NaN is for `hard_mask` to find
    return straight_through_mask(noisy, keep, keep_tokens, alive, sigma=sigma, temperature=temperature)


def perturbed(scores: Tensor, keep: Tensor, keep_tokens: Tensor, alive: Tensor, at: Pass, *,
              normalisation: str = "rank", noise: float = 0.1, samples: int = 16) -> Tensor:
    """The highest tokens, with the gradient of the mean top-k of `samples` noisy copies of the scores.

        dm_j / dk~ = 1/2 P(j is the k-th of s + noise z) + 1/2 P(j is the next),   z ~ N(0, 1)

    the central difference in k of E[top-k]; over all tokens it sums to 1.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples!r}")
    hard = hard_mask(scores, keep_tokens, alive)
    s = normalise(scores, alive, normalisation)
    slope = torch.zeros_like(s)
    for _ in range(samples):
        z = torch.randn(s.shape, generator=at.generator).to(s)
        slope += _window(descending_ranks(s.detach() + noise * z, alive), keep_tokens, alive, 1)
    return _linear(hard.to(s.dtype), slope / samples, keep)


def boundary(scores: Tensor, keep: Tensor, keep_tokens: Tensor, alive: Tensor, at: Pass, *, reach: int = 1) -> Tensor:
    """The highest tokens; the gradient is spread evenly over the `reach` last tokens kept and the `reach` next.

        dm_j / dk~ = 1 / (number of such tokens):  over all tokens it sums to 1, one token for one token

    Raises ValueError unless reach >= 1.
    """
    if reach < 1:
        raise ValueError(f"reach must be at least 1 token, got {reach!r}")
    hard = hard_mask(scores, keep_tokens, alive).to(torch.promote_types(scores.dtype, torch.float32))
    return _linear(hard, _window(descending_ranks(scores, alive), keep_tokens, alive, reach).to(hard), keep)


def fractional(scores: Tensor, keep: Tensor, keep_tokens: Tensor, alive: Tensor, at: Pass, *, reach: float = 1.0,
               midpoint: bool = False) -> Tensor:
    """The highest tokens up to a total weight of k~ + reach u, the last of them in part; u uniform in (-1, 1).

        p'_j = min(p_j, max(0, k~ + reach u - sum of p over the tokens ranked higher)),   m_j = p'_j / p_j

    with p_j the weight a token has had so far (1 at first). No relaxation: the derivative of the loss in the weight of
    the one token on the edge, over all weights from 0 to 1, IS the difference of the loss with and without it. On
    average over u the gradient is therefore that of E[loss(k~ + reach u)]: (loss(k~ + reach) - loss(k~ - reach)) /
    (2 reach). u is the same for all layers of a pass, so that layers without a drop stay so, and a token that an
    earlier layer takes is not taken twice. The price is variance: one token says it all.

    reach: in tokens. midpoint: give the edge token a weight of 1/2: less variance, a little bias.
    Raises ValueError unless reach > 0.
    """
    if not reach > 0:
        raise ValueError(f"reach must be a positive number of tokens, got {reach!r}")
    hard_mask(scores, keep_tokens, alive)  # looks for NaN
    weight = at.weight.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~alive, 0)
    wanted = keep.detach() + reach * at.dither.to(keep)
    part = 0.5 if midpoint else (wanted - wanted.floor()).clamp(0.02, 0.98)  # the slope at 0 knows no bound
    wanted = torch.where(keep_tokens > 0, (wanted.floor() + part).clamp(min=0.5), 0) + (keep - keep.detach())  # (B,)
    order = descending_ranks(scores, alive).argsort(dim=-1, stable=True)
    in_order = weight.gather(1, order)
    above = torch.zeros_like(weight).scatter(1, order, in_order.cumsum(-1) - in_order)
    room = (wanted.to(weight)[:, None] - above).clamp(min=0)
    left = torch.where(room <= weight + 1e-4, room, weight)  # where nothing is lost, k~ still says what would be
    return torch.where(alive, left / weight.where(alive, 1), 0)


def _window(ranks: Tensor, keep_tokens: Tensor, alive: Tensor, reach: int) -> Tensor:
    """Equal shares (B, N) of 1 over the alive tokens at most `reach` places from the edge."""
    near = alive & (ranks >= keep_tokens[:, None] - reach) & (ranks < keep_tokens[:, None] + reach)
    return near / near.sum(-1, keepdim=True).clamp(min=1)


def _linear(value: Tensor, slope: Tensor, keep: Tensor) -> Tensor:
    """`value` (B, N) to the bit, with d/d keep = `slope`."""
    return value + slope.detach() * (keep - keep.detach())[:, None].to(slope)


#: Every estimator by name. The default is the one whose steps on batches of 16 questions lower the divergence most;
#: "boundary" has the least bias, and wants more questions.
ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "default": rank, "rank": rank, "paper": paper, "gumbel": gumbel, "perturbed": perturbed, "boundary": boundary,
    "fractional": fractional}
_UNCLIPPED = {"paper"}  # all others bound each token's gradient by its sample's divergence


class Estimator:
    """An estimator with its options and its noise.

    name, options: what it was made of. clip: whether the pruner bounds the gradient of each token.

    >>> import torch
    >>> estimator = Estimator("boundary", {"reach": 1})
    >>> keep = torch.tensor([2.0], requires_grad=True)
    >>> mask = estimator(torch.tensor([[.2, .7, .1, .5]]), keep, keep.long(), torch.ones(1, 4, dtype=torch.bool))
    >>> mask.tolist()
    [[0.0, 1.0, 0.0, 1.0]]
    >>> (mask * torch.tensor([1., 2., 3., 4.])).sum().backward(); keep.grad.tolist()  # the tokens 0.2 and 0.5
    [2.5]
    """

    def __init__(self, name: str = "default", options: Mapping[str, Any] | None = None):
        if not isinstance(name, str) or name not in ESTIMATORS:
            near = difflib.get_close_matches(str(name), ESTIMATORS, n=1)
            raise ValueError(f"unknown estimator {name!r}: {f'did you mean {near[0]!r}? ' if near else ''}there are "
                             f"{', '.join(ESTIMATORS)}")
        options = dict(options or {})
        self.name, self.options = name, dict(options)
        self.clip, self._seed = options.pop("clip", name not in _UNCLIPPED), options.pop("seed", 0)
        self._function, self._options = ESTIMATORS[name], options
        takes = [p.name for p in inspect.signature(self._function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        if unknown := sorted(set(options) - set(takes)):
            raise ValueError(f"estimator {name!r} does not take the option {unknown[0]!r}: it takes "
                             f"{', '.join([*takes, 'clip', 'seed'])}")
        self._generator = torch.Generator().manual_seed(self._seed)
        self._dither = torch.zeros(0)

    def reseed(self, step: int) -> None:
        """Draw what step `step` draws from now on, whatever was drawn before: a resumed search skips what it knows."""
        self._generator.manual_seed(self._seed + 7919 * step)

    def __call__(self, scores: Tensor, keep: Tensor, keep_tokens: Tensor, alive: Tensor,
                 weight: Tensor | None = None) -> Tensor:
        """The mask (B, N) of one layer; the hard one, without noise, where no gradient is asked for.

        weight: (B, N) weights of the tokens before, None at the first layer of a forward pass.
        """
        if not (keep.requires_grad and torch.is_grad_enabled()):
            return hard_mask(scores, keep_tokens, alive).to(torch.promote_types(scores.dtype, torch.float32))
        if weight is None:
            weight = torch.ones_like(scores)
            self._dither = (2 * torch.rand(len(scores), generator=self._generator) - 1).to(scores.device)
        at = Pass(weight, self._dither, self._generator)
        return self._function(scores, keep, keep_tokens, alive, at, **self._options)


def build_estimator(estimator: str | Mapping[str, Any] | Estimator | None = None) -> Estimator:
    """An estimator from its name, or from a dict of options, with or without a "name".

    Options are those of the function in `ESTIMATORS`, and `clip` and `seed`. Raises ValueError for an unknown name or
    option; for a bad value, once the estimator is used. To anneal, set `pruner.estimator` between steps:
    `pruner.estimator = build_estimator({"name": "paper", "temperature": t})`.

    >>> build_estimator({"name": "paper", "temperature": 0.05}).options, build_estimator({"sigma": 2.0}).name
    ({'temperature': 0.05}, 'default')
    """
    if isinstance(estimator, Estimator):
        return estimator
    if estimator is None or isinstance(estimator, str):
        return Estimator(estimator or "default")
    if not isinstance(estimator, Mapping):
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, or a dict of options such as "
                         f"{{'name': 'paper', 'temperature': 0.05}}, got {estimator!r}")
    options = dict(estimator)
    return Estimator(options.pop("name", "default"), options)
