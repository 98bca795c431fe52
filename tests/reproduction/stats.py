"""Order statistics, comparisons with their noise, and the volumes below frontiers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vispco.pareto import hypervolume, is_non_dominated


def best_of(n: int, pool: int) -> list[float]:
    """P(the best of `n` drawn without replacement from `pool` is the j-th best), j = 1 ... pool.

        P(j) = C(pool - j, n - 1) / C(pool, n)

    So the mean over a measured pool is an unbiased estimate of what random best-of-n finds, at no
    further cost. Raises ValueError unless 1 <= n <= pool.

    >>> best_of(2, 3)
    [0.6666666666666666, 0.3333333333333333, 0.0]
    """
    if not 1 <= n <= pool:
        raise ValueError(
            f"the best of {n} cannot be drawn from a pool of {pool}: ask for 1 to {pool}"
        )
    return [math.comb(pool - j, n - 1) / math.comb(pool, n) for j in range(1, pool + 1)]


def expected_best(values: Sequence[float], n: int) -> dict:
    """Mean, 10th and 90th percentile of the least of `n` values drawn from the pool `values`."""
    ordered, chances = sorted(values), best_of(n, len(values))
    total = torch.tensor(chances, dtype=torch.float64).cumsum(0)
    low, high = (ordered[min(int((total < q - 1e-12).sum()), len(ordered) - 1)] for q in (0.1, 0.9))
    return {
        "n": n,
        "mean": sum(p * v for p, v in zip(chances, ordered, strict=True)),
        "low": low,
        "high": high,
    }


def chance_to_win(value: float, values: Sequence[float], n: int) -> float:
    """P(the least of `n` drawn from the pool is above `value`), ties half."""
    ordered = sorted(values)
    return sum(
        p * ((v > value) + (v == value) / 2)
        for p, v in zip(best_of(n, len(values)), ordered, strict=True)
    )


def expected_held_out(
    values: Sequence[float], accuracy: Mapping[int, float], n: int, first: int
) -> float | None:
    """Mean held-out accuracy of the schedule that is best of `n` by `values`.

    accuracy: by number in the pool, known of the `first` schedules (which nobody chose) and of the
    best. None where neither what is known of the best nor the first schedules by themselves tell.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    chances = best_of(n, len(values)) if n <= len(values) else []
    known = [(p, accuracy[i]) for p, i in zip(chances, order, strict=False) if i in accuracy]
    if sum(p for p, _ in known) > 0.97:
        return sum(p * a for p, a in known) / sum(p for p, _ in known)
    if n <= first:
        order = sorted(range(first), key=values.__getitem__)
        return sum(p * accuracy[i] for p, i in zip(best_of(n, first), order, strict=True))
    return None


def percentile(value: float, others: Sequence[float]) -> float:
    """Percentage of `others` above `value`, ties half: 100 is better than all where less is better.

    >>> percentile(1, [1, 2, 3, 4])
    87.5
    """
    return 100 * sum((o > value) + (o == value) / 2 for o in others) / len(others)


def paired(ours: Tensor, theirs: Tensor, draws: int = 1000, seed: int = 0) -> dict:
    """Difference of two accuracies on the same questions, with its bootstrap standard error and 95
    % interval.

    ours, theirs: (N,) bool, right or wrong.
    """
    difference = ours.double() - theirs.double()
    rows = torch.randint(
        len(difference), (draws, len(difference)), generator=torch.Generator().manual_seed(seed)
    )
    means = difference[rows].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {
        "difference": float(difference.mean()),
        "error": float(means.std()),
        "low": low,
        "high": high,
    }


def summary(values: Sequence[float]) -> dict:
    """Mean and standard deviation (of a sample; 0 for one value), and the values."""
    mean = sum(values) / len(values)
    deviation = (
        math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        if len(values) > 1
        else 0.0
    )
    return {"mean": mean, "std": deviation, "values": list(values)}


def compare(ours: Sequence[float], theirs: Sequence[float], tolerance: float = 0.01) -> str:
    """ "better", "equal" or "worse": less is better; equal within two standard errors of the
    difference of the means, or within 1 % of theirs.

    >>> compare([1.0, 1.1], [2.0, 2.1]), compare([1.0], [1.005]), compare([3.0], [2.0])
    ('better', 'equal', 'worse')
    """
    a, b = summary(ours), summary(theirs)
    noise = math.sqrt(a["std"] ** 2 / len(ours) + b["std"] ** 2 / len(theirs))
    difference = a["mean"] - b["mean"]
    if abs(difference) <= max(2 * noise, tolerance * b["mean"], 1e-6):
        return "equal"
    return "better" if difference < 0 else "worse"


def cross_fitted(
    shares: Sequence[float], right: Tensor, floor: float, draws: int = 20, seed: int = 0
) -> float:
    """`volume` of the frontier that half of the questions choose, counted on the other half; mean
    over random halvings.

    What a choice in hindsight is worth on questions that did not choose: the best of many
    configurations is the luckiest, too. shares: (C,); right: (C, N) bool, the answers of the
    configurations; each halving is used both ways.

    >>> cross_fitted([0.5, 0.5], torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]).bool(), floor=0.0)
    0.5
    """
    generator, cost, found = (
        torch.Generator().manual_seed(seed),
        torch.tensor(shares, dtype=torch.float64),
        [],
    )
    for _ in range(draws):
        halves = torch.randperm(right.shape[1], generator=generator).chunk(2)
        for choosing, counting in (halves, halves[::-1]):
            points = torch.stack([cost, right[:, choosing].double().mean(1)], 1)
            best = is_non_dominated(points, (False, True)).nonzero()[:, 0]
            best = best[cost[best].argsort(stable=True)]
            wide = torch.cat(
                [cost[best], cost.new_ones(1)]
            ).diff()  # from each to the next dearer one
            found.append(float(wide @ (right[best][:, counting].double().mean(1) - floor)))
    return sum(found) / len(found)


def volume(points: Sequence[tuple[float, float]], floor: float) -> float:
    """Hypervolume of (share, accuracy) points from the reference (1, floor accuracy)."""
    return hypervolume(list(points), (1.0, floor), maximize=(False, True))
