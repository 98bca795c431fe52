"""A surrogate of the calibration loss: one Gaussian process over schedules, shared by all budgets.

Schedules of near budgets have near losses, so what is measured for one budget tells about the
others. Where something predicts the losses already, such as a profile, it is the prior, and the
process is of what it misses. The kernel is Matern-3/2 in the keep ratios and their square roots (a
token matters most where few are left):

    log(loss + 0.01) ~ GP(mean + trust prior, s^2 k)
    k(x, y) = (1 + sqrt(3) d) exp(-sqrt(3) d),   d = |x - y| / length

(Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, sections 2.2 and 4.2.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: prior(ratios (C, L)) -> log(loss + 0.01) (C,), as far as it is known beforehand.
Prior = Callable[[Tensor], Tensor]
TRUSTS = (1.0, 0.75, 0.5, 0.25, 0.0)
LENGTHS, NOISES = (0.2, 0.4, 0.8, 1.6), (1e-3, 3e-3, 1e-2, 3e-2)


class Surrogate:
    """The process given some losses. Trust, length and noise are those of the largest marginal
    likelihood on a small grid.

    ratios: (N, L) schedules. losses: (N,) what they measured, not negative. prior: None: nothing is
    known beforehand.

    >>> schedules = torch.linspace(0, 1, 9)[:, None]
    >>> known = Surrogate(schedules, (schedules[:, 0] - 0.5).abs() + 0.1)
    >>> mean, deviation = known(torch.tensor([[0.5], [0.9]]))
    >>> bool(mean[0] < mean[1]), bool((deviation > 0).all())
    (True, True)
    """

    def __init__(
        self, ratios: Tensor, losses: Sequence[float] | Tensor, prior: Prior | None = None
    ):
        self.prior = prior or (lambda ratios: torch.zeros(len(ratios), dtype=torch.float64))
        values = log_loss(torch.as_tensor(losses, dtype=torch.float64))  # (N,)
        self.points, known = _features(ratios), self.prior(ratios)
        distances, best = torch.cdist(self.points, self.points), math.inf
        trusts = TRUSTS if prior else (0.0,)
        for trust, length, noise in itertools.product(trusts, LENGTHS, NOISES):
            mean = (values - trust * known).mean()
            centred = values - trust * known - mean
            covariance = _matern(distances / length) + noise * torch.eye(*distances.shape).double()
            root = torch.linalg.cholesky(covariance)
            weights = torch.cholesky_solve(centred[:, None], root)[:, 0]
            # The s^2 of the largest likelihood, given length and noise.
            variance = (centred @ weights / len(values)).clamp(min=1e-12)
            surprise = float(0.5 * len(values) * variance.log() + root.diag().log().sum())
            if surprise < best:
                best = surprise
                self.trust, self.mean = trust, mean
                self.length, self.variance = length, variance
                self.root, self.weights = root, weights

    def __call__(self, ratios: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,) of log(loss + 0.01) of schedules (C, L)."""
        near = _matern(torch.cdist(_features(ratios), self.points) / self.length)  # (C, N)
        known = torch.linalg.solve_triangular(self.root, near.T, upper=False).square().sum(0)
        mean = self.trust * self.prior(ratios) + self.mean + near @ self.weights
        return mean, (self.variance * (1 - known).clamp(min=1e-9)).sqrt()

    def expected_improvement(self, ratios: Tensor, loss: float) -> Tensor:
        """How far (C,) schedules (C, L) are expected to fall below a loss, in its logarithm (Mockus
        1975).

            EI = sd (z Phi(z) + phi(z)),   z = (log(loss + 0.01) - mean) / sd
        """
        mean, deviation = self(ratios)
        z = (log_loss(torch.tensor(loss, dtype=torch.float64)) - mean) / deviation
        density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
        return deviation * (z * torch.special.ndtr(z) + density)


def log_loss(loss: Tensor) -> Tensor:
    """log(loss + 0.01): what is near 0 nats is as good as 0."""
    return (loss.clamp(min=0) + 1e-2).log()


def _features(ratios: Tensor) -> Tensor:
    """(..., L) -> (..., 2 L), so scaled that a distance of 1 is far in any number of layers."""
    ratios = ratios.double()
    return torch.cat([ratios, ratios.sqrt()], -1) / ratios.shape[-1] ** 0.5


def _matern(distance: Tensor) -> Tensor:
    scaled = math.sqrt(3) * distance
    return (1 + scaled) * torch.exp(-scaled)
