"""The gradient estimators that the study compares."""

from __future__ import annotations

from collections.abc import Callable

from .gradients import central_difference, score_function

#: Tokens over which exact differences are taken.
REACHES = (1, 4, 8)
#: Questions a batch.
BATCH = 16
#: The paper's estimator, with a bound on each token's gradient.
_CLIPPED = {"name": "paper", "clip": True}

#: {label: options of `build_estimator`, or (function, options) of one without a backward pass}.
#: Spreads are in tokens.
CANDIDATES: dict[str, dict | tuple[Callable, dict]] = {
    "paper": {"name": "paper"},
    "paper, clipped": _CLIPPED,
    "paper, clipped, sigma 1": {**_CLIPPED, "sigma": 1.0},
    "paper, clipped, sigma 3": {**_CLIPPED, "sigma": 3.0},
    "paper, clipped, T 0.02": {**_CLIPPED, "temperature": 0.02},
    "paper, clipped, T 0.5": {**_CLIPPED, "temperature": 0.5},
    "paper, clipped, log-minmax": {**_CLIPPED, "normalisation": "log-minmax"},
    "rank": {"name": "rank"},
    "rank, unclipped": {"name": "rank", "clip": False},
    **{f"rank, T {t}": {"name": "rank", "temperature": t} for t in (0.02, 0.05, 0.2, 0.5, 1.0)},
    "rank, sigma 3": {"name": "rank", "sigma": 3.0},
    "rank, sigma 10": {"name": "rank", "sigma": 10.0},
    "gumbel, noise 0.3": {"name": "gumbel", "noise": 0.3},
    "gumbel, noise 1.0": {"name": "gumbel", "noise": 1.0},
    "perturbed, noise 0.1": {"name": "perturbed", "noise": 0.1},
    **{f"boundary {reach}": {"name": "boundary", "reach": reach} for reach in (1, 4, 8)},
    "fractional 1": {"name": "fractional", "reach": 1.0},
    "fractional 4": {"name": "fractional", "reach": 4.0},
    "fractional 4, midpoint": {"name": "fractional", "reach": 4.0, "midpoint": True},
    "fractional 8, midpoint": {"name": "fractional", "reach": 8.0, "midpoint": True},
    "REINFORCE, spread 2": (score_function, {"spread": 2.0, "draws": 3}),
    "REINFORCE, spread 4": (score_function, {"spread": 4.0, "draws": 3}),
    "SPSA, spread 2": (central_difference, {"spread": 2.0}),
    "SPSA, spread 4": (central_difference, {"spread": 4.0}),
}
#: Labels of those with which real steps are tried.
STEPPED = {
    *("truth on a batch, h = 4", "paper", "paper, clipped", "rank", "rank, T 0.2"),
    *("boundary 1", "fractional 1", "REINFORCE, spread 4", "SPSA, spread 4"),
}
