"""The exit of a plan, where all its tokens go: measured given what was dropped before.

A profile drops tokens of a prompt that has all of them until then. With fewer tokens, a layer may
read the image earlier, or misread it later. Then an earlier exit is better than predicted, and what
it saves pays for more tokens before it. So the exit is moved, one layer at a time, as long as the
plan answers a few questions better.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..budget import Budget
from ..profiling.record import FREE
from .plan import fill, staircases, steps


def walked(counts: Tensor, limit: Budget, loss: Callable[[Tensor], float], drops: int) -> Tensor:
    """The plan (L,) with the exit that loses least, from its own on in both directions.

    loss: of counts (L,), in nats. A plan below `FREE` stays. drops: the most drops of a plan.
    """
    best, least = counts, loss(counts)
    for step in (-1, 1):
        while least >= FREE:
            moved = with_exit(best, exit_of(best) + step, limit, drops)
            if moved is None or (found := loss(moved)) >= least:
                break
            best, least = moved, found
    return best


def exit_of(counts: Tensor) -> int:
    """The layer from which on a plan (L,) keeps nothing; L if there is none.

    >>> exit_of(torch.tensor([8, 3, 0, 0])), exit_of(torch.tensor([8, 3, 3, 3]))
    (2, 4)
    """
    return int((counts > 0).sum())


def with_exit(counts: Tensor, layer: int, limit: Budget, drops: int) -> Tensor | None:
    """The plan (L,) with its exit at a layer, its other drops raised or lowered onto the budget.

    None if there is no such plan of at most `drops` drops.
    """
    if not limit.first_layer <= layer <= limit.layers:
        return None
    plan = {k: n for k, n in steps(counts.tolist(), limit.tokens).items() if n and k < layer}
    if layer < limit.layers:
        plan[layer] = 0
    found = fill(staircases([plan], limit), limit, torch.Generator())
    if not len(found) and limit.first_layer < layer:
        # An early drop pays for a later exit.
        plan[limit.first_layer] = limit.tokens - 1
        found = fill(staircases([plan], limit), limit, torch.Generator())
    if not len(found) or len(steps(found[0].tolist(), limit.tokens)) > drops:
        return None
    return found[0]
