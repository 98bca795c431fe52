"""Gradients without a backward pass: from the losses of perturbed parameters alone.

Both take any loss of parameters, (B, P) one vector per sample -> (B,), and return the mean gradient
(P,). In the pruner the parameters are keep ratios (`Pruner.ratios` may be (B, L)), or whatever a
schedule is made of. Every sample is perturbed on its own, and compared with itself only: losses
differ far more between questions than between schedules.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def score_function(
    loss: Callable[[Tensor], Tensor],
    point: Tensor,
    samples: int,
    *,
    spread: float,
    draws: int = 2,
    generator: torch.Generator | None = None,
    mean: bool = True,
) -> Tensor:
    """REINFORCE with a leave-one-out baseline: an unbiased gradient of E[loss(x + spread z)], z ~
    N(0, 1), in x.

        g = mean over samples b and draws m of (l_mb - b_mb) z_mb / spread,
        b_mb = mean of l_nb over n != m

    loss: (B, P) -> (B,). point: x (P,). samples: B. draws: how often each sample is drawn, so
    `draws * B` losses. mean: over the samples; else (B, P), to measure their spread. Raises
    ValueError unless spread > 0 and draws >= 2.

    >>> g = torch.Generator().manual_seed(0)
    >>> point = torch.tensor([1.0, -2.0])
    >>> score_function(lambda x: (x**2).sum(-1), point, 4000, spread=0.1, generator=g).round()
    tensor([ 2., -4.])
    """
    _check(point, spread)
    if draws < 2:
        raise ValueError(f"draws must be at least 2, to be each other's baseline, got {draws!r}")
    z = torch.randn(draws, samples, len(point), generator=generator, dtype=point.dtype)
    losses = torch.stack([loss(point + spread * shift) for shift in z]).to(z)  # (M, B)
    advantage = (losses - losses.mean(0)) * draws / (draws - 1)  # minus the mean of the others
    gradient = (advantage[..., None] * z).mean(0) / spread  # (B, P)
    return gradient.mean(0) if mean else gradient


def central_difference(
    loss: Callable[[Tensor], Tensor],
    point: Tensor,
    samples: int,
    *,
    spread: float,
    generator: torch.Generator | None = None,
    mean: bool = True,
) -> Tensor:
    """Simultaneous perturbation (SPSA): all parameters move at once, each by +-spread, and back.

        g = mean over samples of (l(x + spread e) - l(x - spread e)) / (2 spread) e,   e_p = +-1

    `2 B` losses. Its bias is that of a central difference, O(spread^2): none for a quadratic. Both
    ends see the same sample. Raises ValueError unless spread > 0.

    >>> g = torch.Generator().manual_seed(0)
    >>> point = torch.tensor([1.0, -2.0])
    >>> central_difference(lambda x: (x**2).sum(-1), point, 4000, spread=0.1, generator=g).round()
    tensor([ 2., -4.])
    """
    _check(point, spread)
    sign = torch.randint(0, 2, (samples, len(point)), generator=generator).to(point) * 2 - 1
    slope = (loss(point + spread * sign) - loss(point - spread * sign)).to(sign) / (
        2 * spread
    )  # (B,)
    gradient = slope[:, None] * sign  # (B, P)
    return gradient.mean(0) if mean else gradient


def _check(point: Tensor, spread: float) -> None:
    if point.ndim != 1 or not point.is_floating_point():
        raise ValueError(
            "point must be one vector of parameters, (P,) floating, got "
            f"{tuple(point.shape)} of {point.dtype}"
        )
    if not spread > 0:
        raise ValueError(f"spread must be positive, got {spread!r}")
