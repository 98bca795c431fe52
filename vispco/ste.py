"""Straight-through estimators: decide hard, learn soft.

A search step masks the tokens hard and needs d loss / d k~, the derivative in the number of tokens
wanted. An estimator makes a mask (B, N) from scores. The forward pass uses its VALUE; its GRADIENT
says what one token more or less would do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .registry import did_you_mean
from .relaxation import hard_mask, normalise, soft_mask

#: (scores (B, N), keep (B,), keep_tokens (B,), alive (B, N), weight (B, N)) -> mask (B, N). See
#: `Estimator.start`.
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard` with the gradient of `soft`, tensors of one shape.

    m^ = m~ + stop_gradient(m - m~)   (VisPCO, arXiv 2604.15188)

    Summed as m + (m~ - stop_gradient(m~)), the value is m to the bit, whatever m. Summed as
    printed, it may round.

    >>> import torch
    >>> soft = torch.tensor([0.3, 0.9], requires_grad=True)
    >>> straight_through(torch.tensor([0., 1.]), soft)
    tensor([0., 1.], grad_fn=<AddBackward0>)
    """
    return hard + (soft - soft.detach())


def straight_through_mask(
    scores: Tensor,
    keep: Tensor,
    keep_tokens: Tensor,
    alive: Tensor,
    *,
    normalisation: str = "rank",
    sigma: float | None = None,
    temperature: float = 0.1,
    check: bool = True,
) -> Tensor:
    """The mask of a search step: 1 for the highest-scoring tokens, 0 for others.

    scores, alive: (B, N). keep: (B,), continuous number of tokens k~, carries the gradient.
    keep_tokens: (B,), the whole number that is kept.
    Returns (B, N), float32 (float64 if the scores are), differentiable in `keep`. See
    `vispco.relaxation` for the other arguments and the errors.

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


def default(
    generator: torch.Generator,
    *,
    normalisation: str = "rank",
    sigma: float | None = None,
    temperature: float = 0.1,
) -> MaskFunction:
    """`straight_through_mask`: a sigmoid around the soft threshold, on scores uniform in (0, 1)."""
    options: dict[str, Any] = {"normalisation": normalisation, "sigma": sigma}

    def mask(scores, keep, keep_tokens, alive, weight):
        return straight_through_mask(
            scores, keep, keep_tokens, alive, temperature=temperature, **options
        )

    return mask


def paper(
    generator: torch.Generator,
    *,
    normalisation: str = "minmax",
    sigma: float = 10.0,
    temperature: float = 0.1,
) -> MaskFunction:
    """The form of the paper: token j stands at j, sigma = 10 tokens for any number, T = 0.1.

    w_j = exp(-(j - k~)^2 / (2 sigma^2))
    tau = sum_j w_j s_(j) / sum_j w_j
    m~_j = sigmoid((s_j - tau) / T)          (VisPCO, arXiv 2604.15188)

    The value is the k highest tokens, which `s_j >= tau` is not to the token.
    """
    at_half = default(generator, normalisation=normalisation, sigma=sigma, temperature=temperature)

    def mask(scores, keep, keep_tokens, alive, weight):
        return at_half(scores, keep - 0.5, keep_tokens, alive, weight)

    return mask


#: {name: function of a generator and of options, which makes the `MaskFunction` of one pass}.
#: Noise is drawn on the CPU, so that a seed means the same on every device.
ESTIMATORS: dict[str, Callable[..., MaskFunction]] = {"default": default, "paper": paper}
#: Estimators whose gradient is not bounded by default (`vispco.pruning.Masking.losses`).
UNCLIPPED = {"paper"}


class Estimator:
    """An estimator by name, with options.

    name: one of ESTIMATORS. options: those of the function in ESTIMATORS, and `clip` (whether the
    pruner bounds the gradient of each token) and `seed` (of its noise).
    Raises ValueError for an unknown name or option; for a bad value, once it is used.

    >>> import torch
    >>> mask = Estimator("default", {"temperature": 0.5}).start()
    >>> keep, alive = torch.tensor([2.0], requires_grad=True), torch.ones(1, 4, dtype=torch.bool)
    >>> scores = torch.tensor([[.2, .7, .1, .5]])
    >>> mask(scores, keep, keep.long(), alive, torch.ones(1, 4)).tolist()
    [[0.0, 1.0, 0.0, 1.0]]
    """

    def __init__(self, name: str = "default", options: Mapping[str, Any] | None = None):
        if not isinstance(name, str) or name not in ESTIMATORS:
            hint = did_you_mean(name, ESTIMATORS)
            raise ValueError(f"unknown estimator {name!r}: {hint}there are {', '.join(ESTIMATORS)}")
        self.name, self.options = name, dict(options or {})
        self._options = dict(self.options)
        self.clip = self._options.pop("clip", name not in UNCLIPPED)
        self.seed = self._options.pop("seed", 0)
        parameters = inspect.signature(ESTIMATORS[name]).parameters.values()
        takes = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
        if unknown := sorted(set(self._options) - set(takes)):
            raise ValueError(
                f"estimator {name!r} does not take the option {unknown[0]!r}: it takes "
                f"{', '.join([*takes, 'clip', 'seed'])}"
            )

    def start(self, seed: int = 0) -> MaskFunction:
        """The mask function of one forward pass.

        seed: of this pass's noise, such as the number of the step. A resumed search draws the same.
        Where no gradient is asked for, the mask is the hard one, without noise.

        The function's arguments: scores (B, N) and which tokens are alive (B, N) bool; keep (B,),
        the number of tokens wanted, and keep_tokens (B,), the whole number; weight (B, N), the
        weight in (0, 1] that each token has had until now.
        """
        generator = torch.Generator().manual_seed(self.seed + 7919 * seed)
        soft = ESTIMATORS[self.name](generator, **self._options)

        def mask(scores, keep, keep_tokens, alive, weight):
            if keep.requires_grad and torch.is_grad_enabled():
                return soft(scores, keep, keep_tokens, alive, weight)
            precise = torch.promote_types(scores.dtype, torch.float32)
            return hard_mask(scores, keep_tokens, alive).to(precise)

        return mask


def build_estimator(estimator: str | Mapping[str, Any] | Estimator | None = None) -> Estimator:
    """An estimator from its name, or from a dict of options, with or without a "name".

    To anneal, assign to `pruner.estimator` between steps:
    `pruner.estimator = build_estimator({"name": "paper", "temperature": t})`.
    Raises ValueError as `Estimator` does.

    >>> build_estimator({"name": "paper", "temperature": 0.05}).options
    {'temperature': 0.05}
    >>> build_estimator({"sigma": 2.0}).name
    'default'
    """
    if isinstance(estimator, Estimator):
        return estimator
    if estimator is None or isinstance(estimator, str):
        return Estimator(estimator or "default")
    if not isinstance(estimator, Mapping):
        raise ValueError(
            f"estimator must be one of {', '.join(ESTIMATORS)}, or a dict of options such as "
            f"{{'name': 'paper', 'temperature': 0.05}}, got {estimator!r}"
        )
    options = dict(estimator)
    return Estimator(options.pop("name", "default"), options)
