"""Data parallel: each process has its own questions, and all processes agree on everything else.

Sums and averages over questions (losses, gradients, shapes, measurements) go through `total` and
`gathered`. So they are equal in every process, and so is every decision that follows from them.
One process alone runs the same code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed

Item = TypeVar("Item")
Summand = TypeVar("Summand", Tensor, int)
_together = False


@contextmanager
def together() -> Iterator[None]:
    """Inside, the processes of `torch.distributed`'s default group work together.

    Each process calls `search` or `evaluate` with the same arguments, but with its own `shard` of
    every batch. All get the same result. Outside, or with one process, every process works alone,
    whatever else it uses `torch.distributed` for.

    >>> with together():  # one process
    ...     rank(), processes(), shard([1, 2, 3]), total(torch.tensor(2.0)), total(3)
    (0, 1, [1, 2, 3], tensor(2.), 3)
    """
    global _together
    before = _together
    _together = distributed.is_available() and distributed.is_initialized()
    try:
        yield
    finally:
        _together = before


@contextmanager
def launched() -> Iterator[None]:
    """`together`, for the processes that `torchrun` started, if it did: NCCL on GPUs, else Gloo."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if gpu else "gloo")
    try:
        with together():
            yield
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if _together else 0


def processes() -> int:
    """The number of processes that work together, 1 if this one works alone."""
    return distributed.get_world_size() if _together else 1


def shard(batch: Sequence[Item]) -> Sequence[Item]:
    """This process's questions of a batch: every n-th of n processes.

    Raises ValueError if there are fewer questions than processes.
    """
    if len(batch) < processes():
        raise ValueError(
            f"a batch of {len(batch)} questions cannot be shared by {processes()} processes: "
            "choose a batch size and a number of questions so that every batch, the last one too, "
            "has one for each"
        )
    return batch[rank() :: processes()]


def as_gathered(batches: Sequence[Sequence[Item]]) -> list[Item]:
    """The items of all batches in the order of `gathered`, if each process has its `shard` of them.

    >>> as_gathered(["ab", "c"])  # one process; of two, the first would have a and c
    ['a', 'b', 'c']
    """
    n = processes()
    return [item for first in range(n) for batch in batches for item in batch[first::n]]


def total(x: Summand) -> Summand:
    """The sum over the processes of `x`, a tensor of equal shape in each, or a whole number.

    The sum has no gradient.
    """
    if not _together:
        return x
    if isinstance(x, int):
        return int(total(torch.tensor(x)))
    summed = x.detach().clone().to(_device())
    distributed.all_reduce(summed)
    return summed.to(x.device)


def broadcast(text: str | None) -> str | None:
    """The text (or None) of process 0, in every process."""
    if not _together:
        return text
    # The first byte tells an empty text from None.
    message = b"" if text is None or rank() else b"=" + text.encode()
    size = total(len(message))
    if not size:
        return None
    data = torch.frombuffer(bytearray(message or bytes(size)), dtype=torch.uint8).to(_device())
    distributed.broadcast(data, 0)
    return data.cpu().numpy().tobytes().decode()[1:]


def gathered(x: Tensor) -> Tensor:
    """The rows `(n, ...)` of every process, in the order of the processes; n may differ."""
    if not _together:
        return x
    lengths = torch.zeros(processes(), dtype=torch.long)
    lengths[rank()] = len(x)
    rows = total(lengths).tolist()
    padded = x.new_zeros(max(rows), *x.shape[1:]).to(_device())
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in rows]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)]).to(x.device)


def _device() -> str:
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"


# Former names, until their callers use the new ones.
share, count = shard, total
