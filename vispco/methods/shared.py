"""What several methods share: text that can see the image, means, greedy picking."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..pruning.context import Context, column_sum, positions, take
from ..relaxation import descending_ranks


def is_whole(x: object, least: int | None = None) -> bool:
    """Whether `x` is a whole number, no bool, and at least `least` if that is given."""
    return isinstance(x, int) and not isinstance(x, bool) and (least is None or x >= least)


def share(name: str, value: object) -> float:
    """`value` itself. Raises ValueError, with the option's name, unless it is in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a share, from 0 to 1, got {value!r}")
    return value


def count(name: str, value: object) -> int:
    """`value` itself. Raises ValueError, with the option's name, unless it is whole, 1 or more."""
    if not is_whole(value, 1):
        raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}")
    return value  # type: ignore[return-value]


def question(ctx: Context) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Index pair of the prompt's text (B, T), and which of it (B, T) comes after the image.

    More precisely, after the image's first token: text before that cannot see the image.
    """
    text, real = positions(ctx.text_mask, max(1, int(ctx.text_mask.sum(1).max())))
    first = ctx.order.masked_fill(~ctx.visual_mask, ctx.order.max() + 1).amin(1, keepdim=True)
    return text, real & (take(ctx.order, text[1]) > first)


def masked_mean(rows: Tensor, real: Tensor) -> Tensor:
    """Mean (B, K) of the `real` (B, R) among `rows` (B, R, K); 0 if none is."""
    total = column_sum(rows.masked_fill(~real[..., None], 0.0), 1)
    return total / real.sum(1, keepdim=True).clamp(min=1)


def visual_columns(ctx: Context, rows: Tensor) -> Tensor:
    """Of rows of attention (B, R, N) what they give to the visual tokens, (B, R, V)."""
    return rows.gather(2, ctx.visual[1][:, None].expand(-1, rows.shape[1], -1))


def head_mean(attention: Tensor) -> Tensor:
    """Mean (B, R, N) of `attention` (B, H, R, N) over the heads."""
    return column_sum(attention, 1) / attention.shape[1]


def coarse(gains: Tensor) -> Tensor:
    """`gains`, in place, in millionths or so of 1, without a fraction.

    Tokens with equal features (newlines) are ties then, whatever rounding made of them.
    """
    return gains.mul_(2**20).round_()


def greedy(
    ctx: Context,
    gains: Tensor,
    update: Callable[[int, Tensor], Tensor],
    changing: int | None = None,
) -> Tensor:
    """Scores (B, V) of slots picked one by one, the one of largest gain next: 1, 1/2, 1/3, ...

    gains: (B, V) for the first pick, `coarse`; of equal ones, the first is picked. Written over.
    update: called with the number of picks before and the slot picked (B, 1); returns the gains for
        the next pick, `coarse`. Written over.
    changing: picks after which no gain changes any more, if there is such a number: the others
        follow all at once.
    Unless the order of all tokens matters, picking stops after `ctx.keep` slots; others score 0.
    """
    steps = ctx.valid.shape[1] if ctx.exhaustive else int(ctx.keep.max())
    scores, gone, picks = torch.zeros_like(gains), ~ctx.valid, []
    changing = steps if changing is None else min(changing, steps)
    for step in range(changing):
        pick = gains.masked_fill_(gone, float("-inf")).argmax(1, keepdim=True)
        picks.append(pick)
        gone.scatter_(1, pick, True)
        gains = update(step, pick)
    if picks:
        number = torch.arange(1, changing + 1, device=gains.device)
        # amax: a sample with nothing left picks some slot again, which must not lower it.
        scores.scatter_reduce_(1, torch.cat(picks, 1), (1 / number).expand(len(gains), -1), "amax")
    if changing < steps:
        place = descending_ranks(gains, ~gone)
        scores = scores.where(gone, 1 / (changing + place + 1))
    return scores
