"""Pareto frontiers: which points are on it, what it dominates, and what it offers at a cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_non_dominated(points, maximize: bool | Sequence[bool] = False) -> Tensor:
    """Which points no other point beats: `(N, M)` -> `(N,)` bool.

    A point is dominated if another is at least as good in every objective and better in one.
    Duplicates do not dominate each other, so all copies stay.

    points: list, array or tensor. All objectives are minimised by default.
    maximize: one bool, or one per objective. A frontier of (FLOPs, accuracy) is
        `maximize=(False, True)`.
    Raises ValueError for NaN, another shape or a wrong number of bools.

    >>> points = [(1, .5), (2, .7), (2, .6), (3, .7)]
    >>> is_non_dominated(points, maximize=(False, True)).tolist()
    [True, True, False, False]
    """
    p = _minimised(points, maximize)  # (N, M)
    no_worse = torch.ones(len(p), len(p), dtype=torch.bool, device=p.device)
    better = torch.zeros_like(no_worse)
    # One objective at a time needs N^2 entries, not N^2 M. [j, i]: j is no worse (better) than i.
    for column in p.T:
        no_worse &= column[:, None] <= column
        better |= column[:, None] < column
    return ~(no_worse & better).any(0)


def hypervolume(points, reference, maximize: bool | Sequence[bool] = False) -> float:
    """The volume that the points dominate, bounded by a reference point worse than all of interest.

    HV = volume of the union of the boxes [point, reference], in the product of the objectives'
    units. It is exact in float64 for any number of objectives M: a sweep in 2-D, slices along the
    last objective above. Points that are not better than the reference in every objective add 0.

    points: `(N, M)`. reference: `(M,)`. maximize: as in `is_non_dominated`.
    Raises ValueError for NaN, infinities or shapes that do not fit.

    >>> hypervolume([(1, 2), (2, 1)], reference=(3, 3))
    3.0
    >>> hypervolume([(1., .5), (2., .75)], reference=(4., 0.), maximize=(False, True))
    2.0
    """
    reference = torch.as_tensor(reference, dtype=torch.float64).reshape(1, -1)
    if not reference.isfinite().all():
        raise ValueError(f"the reference must be finite, got {reference[0].tolist()}")
    r = _minimised(reference, maximize)[0]  # (M,)
    p = _minimised(points, maximize, objectives=len(r)).to(r.device)
    p = p[(p < r).all(-1)]
    if not p.isfinite().all():
        raise ValueError("points must be finite: an infinitely good one has no finite volume")
    return _volume(p, r)


def interpolate(points, cost) -> Tensor:
    """The best quality among the points of at most this cost; -inf below the cheapest point.

    It is a step function: between two measured configurations nothing is promised.

    points: `(N, 2)` of (cost, quality), on the frontier or not.
    cost: a number or a tensor; the result is float64 of its shape.
    Raises ValueError for NaN or another shape.

    >>> interpolate([(1, .5), (2, .7), (3, .6)], [0.5, 1, 2.9, 3]).tolist()
    [-inf, 0.5, 0.7, 0.7]
    """
    costs, quality = _minimised(points, False, objectives=2).T
    cost = torch.as_tensor(cost, dtype=torch.float64, device=costs.device)
    if cost.isnan().any():
        raise ValueError("cost is NaN: expected numbers in the units of the points' first column")
    reachable = torch.where(costs <= cost[..., None], quality, -torch.inf)  # (..., N)
    # One more entry, for the case of no points.
    nothing = reachable.new_full((*cost.shape, 1), -torch.inf)
    return torch.cat([reachable, nothing], -1).amax(-1)


def _volume(p: Tensor, r: Tensor) -> float:
    """The hypervolume of minimised points `(N, M)`, all strictly below `r` `(M,)`."""
    if len(p) == 0:
        return 0.0
    p = p[p[:, -1].argsort(stable=True)]
    # From each point to the next, along the last objective.
    thickness = torch.cat([p[:, -1], r[-1:]]).diff()  # (N,)
    if p.shape[1] == 1:
        return float(thickness.sum())
    if p.shape[1] == 2:
        return float(thickness @ (r[0] - p[:, 0].cummin(0).values))
    total = 0.0
    for n in (thickness > 0).nonzero()[:, 0].tolist():
        # The points that reach this slice.
        slab = p[: n + 1, :-1]
        total += float(thickness[n]) * _volume(slab[is_non_dominated(slab)], r[:-1])
    return total


def _minimised(points, maximize: bool | Sequence[bool], objectives: int | None = None) -> Tensor:
    """Points as float64 `(N, M)`, negated where they are to be maximised."""
    flags = [maximize] if isinstance(maximize, bool) else list(maximize)
    p = torch.as_tensor(points, dtype=torch.float64).detach()
    # An empty list has lost its number of columns.
    if p.dim() == 1 and p.numel() == 0:
        p = p.reshape(0, objectives or len(flags))
    if p.dim() != 2 or p.shape[1] == 0 or p.shape[1] != (objectives or p.shape[1]):
        expected = f"points of shape (N, {objectives or 'M'}), one row per point"
        raise ValueError(f"expected {expected}, got {tuple(p.shape)}")
    if p.isnan().any():
        row = int(p.isnan().any(-1).nonzero()[0, 0])
        advice = "drop failed evaluations first, NaN has no order"
        raise ValueError(f"points contain NaN in row {row}: {advice}")
    m = p.shape[1]
    flags = flags * m if isinstance(maximize, bool) else flags
    if len(flags) != m:
        expected = f"one bool or one per objective ({m})"
        raise ValueError(f"maximize must be {expected}, got {len(flags)}")
    return torch.where(torch.tensor(flags, device=p.device), -p, p)
