"""From scores to masks: the k highest tokens (hard), and a soft mask that is differentiable in k.

VisPCO (arXiv 2604.15188), differentiable search. With k~ = r_i N_v tokens wanted, and scores
s_(1) >= s_(2) >= ...:

    w_j = exp(-(j - 1/2 - k~)^2 / (2 sigma^2)),   tau = sum_j w_j s_(j) / sum_j w_j
    m~_j = sigmoid((s_j - tau) / T)

Token j occupies the interval from j - 1 to j, so its centre is j - 1/2. At a whole k~ the threshold
tau is then half-way between the k-th token, which stays, and the next, which goes. (With j instead
of j - 1/2, tau would be at the k-th token.)

Shapes: scores `(B, N)`; `alive` `(B, N)` bool, False for padding and for tokens dropped earlier,
which count for nothing; `keep` `(B,)`. Of equal scores, the lowest index comes first, everywhere.
Half precision is computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMALISATIONS = ("rank", "minmax", "log-minmax", "none")


def descending_ranks(scores: Tensor, alive: Tensor) -> Tensor:
    """The rank of each alive token, `(B, N)` long: 0 for the highest score; N where not alive.

    >>> descending_ranks(torch.tensor([[2., 9., 2.]]), torch.tensor([[True, True, True]])).tolist()
    [[1, 0, 2]]
    """
    _check_shapes(scores, alive)
    order = scores.detach().argsort(dim=-1, descending=True, stable=True)
    # Only the alive are counted.
    places = alive.gather(-1, order).cumsum(-1) - 1
    ranks = torch.empty_like(order).scatter_(-1, order, places)
    return ranks.masked_fill(~alive, scores.shape[-1])


def normalise(scores: Tensor, alive: Tensor, how: str = "rank") -> Tensor:
    """Scores of any method and layer on one scale, so that one temperature fits all.

    how:
        "rank"        (n - rank - 1/2) / n: uniform in (0, 1); no gradient to the scores
        "minmax"      (s - min) / (max - min) per sample; 1/2 if all are equal
        "log-minmax"  "minmax" of log s, as in the authors' code; s <= 0 counts as the lowest
                      positive score
        "none"        s: temperatures are then in the method's own units
    Where not alive, the result is 0. An infinite score counts as the nearest finite one, except
    for "rank", where it has a rank of its own.
    Raises ValueError for another `how`, or shapes that do not fit.

    >>> alive = torch.tensor([[True, True, True, False]])
    >>> normalise(torch.tensor([[3., 9., 5., 0.]]), alive, "minmax").tolist()
    [[0.0, 1.0, 0.3333333432674408, 0.0]]
    >>> normalise(torch.tensor([[3., 9.]]), torch.tensor([[True, True]])).tolist()
    [[0.25, 0.75]]
    """
    if how not in NORMALISATIONS:
        known = ", ".join(NORMALISATIONS)
        raise ValueError(f"unknown normalisation {how!r}: expected one of {known}")
    _check_shapes(scores, alive)
    s = _full_precision(scores)
    if s.numel() == 0:
        return s
    if how == "rank":
        n = alive.sum(-1, keepdim=True).to(s)  # (B, 1)
        ranks = (n - descending_ranks(scores, alive) - 0.5) / n.clamp(min=1)
        return ranks.masked_fill(~alive, 0)
    if how == "log-minmax":
        # `where` twice: log(0) has no gradient.
        s = torch.where(s > 0, torch.where(s > 0, s, 1).log(), -torch.inf)
    # Of halves, max - min cannot overflow.
    s = s.masked_fill(~alive, 0) / 2
    finite = alive & s.isfinite()
    low = s.masked_fill(~finite, torch.inf).amin(-1, keepdim=True)  # (B, 1)
    high = s.masked_fill(~finite, -torch.inf).amax(-1, keepdim=True)
    s = s.clamp(low, high).masked_fill(~finite.any(-1, keepdim=True), 0)
    if how == "none":
        return (2 * s).masked_fill(~alive, 0)
    differ = high > low
    s = torch.where(differ, (s - low) / torch.where(differ, high - low, 1), 0.5)
    return s.masked_fill(~alive, 0)


def soft_threshold(
    scores: Tensor, keep: Tensor, alive: Tensor, sigma: float | None = None
) -> Tensor:
    """The score between kept and dropped tokens, smooth in the number kept: tau `(B,)`.

    tau = sum_j w_j s_(j) / sum_j w_j,   w_j = exp(-(j - 1/2 - k~)^2 / (2 sigma^2)),   j = 1..n

    keep: k~, the number of tokens wanted, any real number, of the n alive ones.
    sigma: in tokens. The default is the paper's 10 per 576 alive tokens, but at least 1. A window
        wider than the list would average all of it, and hardly move with k~.

    d tau / d k~ = cov_w(j, s_(j)) / sigma^2 is negative where the scores within reach of the
    window differ. Scores of "rank" always do. Others have no gradient inside a run of equal scores
    many sigmas wide. One token alone has no neighbours to interpolate: tau = s + 1/2 - k~, as on a
    line of ranks. For no tokens, tau is 0.
    Raises ValueError unless sigma > 0.

    >>> alive = torch.ones(1, 4, dtype=torch.bool)
    >>> soft_threshold(torch.tensor([[4., 1., 3., 2.]]), torch.tensor([2.]), alive)
    tensor([2.5000])
    """
    _check_shapes(scores, alive, keep)
    if sigma is not None and not sigma > 0:
        expected = "a positive number of tokens, or None for the default"
        raise ValueError(f"sigma must be {expected}, got {sigma!r}")
    s = _full_precision(scores).masked_fill(~alive, 0)
    if s.shape[-1] == 0:
        return s.sum(-1)
    keep, n = keep.to(s.dtype), alive.sum(-1).to(s.dtype)  # (B,)
    default = (n[:, None] * (10 / 576)).clamp(min=1)
    width = default if sigma is None else max(float(sigma), 1e-12)
    # j = rank + 1
    squares = (descending_ranks(scores, alive) + 0.5 - keep[:, None]) ** 2  # (B, N)
    squares = squares.masked_fill(~alive, torch.finfo(s.dtype).max)
    # Relative to the nearest token, so that the largest weight is 1.
    nearest = squares.detach().amin(-1, keepdim=True)
    w = torch.exp((nearest - squares) / (2 * width**2)).masked_fill(~alive, 0)
    tau = (w * s).sum(-1) / w.sum(-1).clamp(min=1)
    return torch.where(n == 1, tau + 0.5 - keep, tau)


def soft_mask(
    scores: Tensor,
    keep: Tensor,
    alive: Tensor,
    sigma: float | None = None,
    temperature: float = 0.1,
) -> Tensor:
    """The degree in (0, 1) to which each token is kept, 0 where not alive: m~ `(B, N)`.

    m~_j = sigmoid((s_j - tau(k~)) / T)

    keep, sigma: k~ and the width of the window, see `soft_threshold`.
    temperature: T, in the units of the scores. The paper's 0.1 is for scores in [0, 1], see
        `normalise`.
    Raises ValueError unless temperature > 0.

    >>> scores = torch.tensor([[.875, .125, .625, .375]])
    >>> alive = torch.ones(1, 4, dtype=torch.bool)
    >>> [round(m, 2) for m in soft_mask(scores, torch.tensor([2.]), alive)[0].tolist()]
    [0.98, 0.02, 0.78, 0.22]
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    tau = soft_threshold(scores, keep, alive, sigma)
    s = _full_precision(scores).masked_fill(~alive, 0)
    return torch.sigmoid((s - tau[:, None]) / temperature).masked_fill(~alive, 0)


def hard_mask(scores: Tensor, keep_tokens: Tensor, alive: Tensor, check: bool = True) -> Tensor:
    """Exactly the `keep_tokens` highest alive scores of each sample: `(B, N)` bool.

    If fewer are alive, all of them.

    keep_tokens: whole numbers, `(B,)`.
    check: whether to look for NaN (on an accelerator this waits for the device).
    Raises FloatingPointError if an alive score is NaN; -inf is a score like any other.

    >>> alive = torch.ones(1, 4, dtype=torch.bool)
    >>> hard_mask(torch.tensor([[1., 7., 7., 7.]]), torch.tensor([2]), alive).tolist()
    [[False, True, True, False]]
    """
    _check_shapes(scores, alive, keep_tokens)
    if check and (scores.isnan() & alive).any():
        expected = "expected numbers (-inf for never) that rank the tokens"
        raise FloatingPointError(f"scores contain NaN: {expected}")
    return alive & (descending_ranks(scores, alive) < keep_tokens[:, None])


def _full_precision(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _check_shapes(scores: Tensor, alive: Tensor, keep: Tensor | None = None) -> None:
    if scores.dim() != 2 or alive.shape != scores.shape or alive.dtype != torch.bool:
        found = f"scores {tuple(scores.shape)} and alive {tuple(alive.shape)} of {alive.dtype}"
        expected = "scores (B, N) and a bool mask alive of the same shape"
        raise ValueError(f"expected {expected}, got {found}")
    if keep is not None and keep.shape != scores.shape[:1]:
        expected = f"one number of tokens per sample, shape ({scores.shape[0]},)"
        raise ValueError(f"expected {expected}, got {tuple(keep.shape)}; use keep.expand(B)")
