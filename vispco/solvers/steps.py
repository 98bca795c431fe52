"""What every gradient step needs: the order of the batches, the decay, the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..utils.distributed import total


def batch_order(count: int, generator: torch.Generator) -> Iterator[int]:
    """Numbers of `count` batches without end: every batch once in a random order, then in another.

    >>> order = batch_order(3, torch.Generator().manual_seed(0))
    >>> sorted(next(order) for _ in range(3))
    [0, 1, 2]
    """
    while True:
        yield from reversed(torch.randperm(count, generator=generator).tolist())


def decay(step: int, steps: int) -> float:
    """Factor of the learning rate: 1 for the first half of the steps, then a line to 0.

    >>> [decay(step, 4) for step in range(4)]
    [1.0, 1.0, 1.0, 0.5]
    """
    return min(1.0, 2 * (1 - step / steps))


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of every process's `loss`, summed over the processes.

    Raises FloatingPointError if the loss or a gradient is not finite.
    """
    found = [total(gradient) for gradient in torch.autograd.grad(loss, parameters)]
    value = float(total(loss.detach()))
    norm = sum(float(gradient.norm()) for gradient in found)
    if not math.isfinite(value + norm):
        raise FloatingPointError(
            f"the loss is {value}, its gradient {norm}; search in float32 or bfloat16, with a "
            "smaller learning rate"
        )
    return found
