"""Straight-through estimator: decide hard, learn soft."""

from __future__ import annotations

from torch import Tensor

from .relaxation import hard_mask, normalise, soft_mask


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
