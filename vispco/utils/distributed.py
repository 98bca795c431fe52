"""Data parallel: every process has its own share of the questions, and all agree on everything else.

What is summed or averaged over questions, losses, gradients, shapes, measurements, goes through `total` and `gathered`, and so is
the same everywhere, and with it every decision that follows. One process alone runs the same code, with sums of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed

Item = TypeVar("Item")
_together = False


@contextmanager
def together() -> Iterator[None]:
    """Inside, the processes of `torch.distributed`'s default group work together: each calls `search`, `amortise` or
    `evaluate` with the same arguments but its own share of every batch, and gets the same result.

    Outside, or in one process, each is on its own, whatever else it uses `torch.distributed` for.

    >>> with together():  # one process
    ...     rank(), processes(), share([1, 2, 3]), total(torch.tensor(2.0))
    (0, 1, [1, 2, 3], tensor(2.))
    """
    global _together
    before, _together = _together, distributed.is_available() and distributed.is_initialized()
    try:
        yield
    finally:
        _together = before


@contextmanager
def launched() -> Iterator[None]:
    """`together`, with the processes that `torchrun` has started, if it has: NCCL on GPUs, else Gloo."""
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
    """The number of this process."""
    return distributed.get_rank() if _together else 0


def processes() -> int:
    """How many work together."""
    return distributed.get_world_size() if _together else 1


def share(batch: Sequence[Item]) -> Sequence[Item]:
    """This process's questions of a batch: every n-th.

    Raises ValueError if there are fewer questions than processes.
    """
    if len(batch) < processes():
        raise ValueError(f"a batch of {len(batch)} questions cannot be shared by {processes()} processes: choose a batch size "
                         "and a number of questions so that every batch, the last one too, has one for each")
    return batch[rank()::processes()]


def as_gathered(batches: Sequence[Sequence[Item]]) -> list[Item]:
    """The items of all batches in the order in which `gathered` has what belongs to them, if each process has its `share`.

    >>> as_gathered(["ab", "c"])  # one process; of two, the first would have a and c
    ['a', 'b', 'c']
    """
    return [item for first in range(processes()) for batch in batches for item in batch[first::processes()]]


def total(x: Tensor) -> Tensor:
    """The sum of everybody's `x`; without gradient."""
    if not _together:
        return x
    x = x.detach().clone()
    place = x.device
    x = x.to(_device())
    distributed.all_reduce(x)
    return x.to(place)


def count(n: int) -> int:
    """The sum of everybody's number."""
    return int(total(torch.tensor(n))) if _together else n


def broadcast(text: str | None) -> str | None:
    """The first process's text, or None, for all."""
    if not _together:
        return text
    own = bytearray(b"" if text is None or rank() else b"=" + text.encode())
    data = torch.frombuffer(own, dtype=torch.uint8).to(_device()) if own else None
    size = count(len(own))
    if not size:
        return None
    data = torch.zeros(size, dtype=torch.uint8, device=_device()) if data is None else data
    distributed.broadcast(data, 0)
    return data.cpu().numpy().tobytes().decode()[1:]


def gathered(x: Tensor) -> Tensor:
    """Everybody's rows of `x` (n, ...), one process after the other; n may differ."""
    if not _together:
        return x
    place = x.device
    lengths = torch.zeros(processes(), dtype=torch.long)
    lengths[rank()] = len(x)
    rows = total(lengths).tolist()
    padded = x.new_zeros(max(rows), *x.shape[1:]).to(_device())
    padded[:len(x)] = x
    parts = [torch.empty_like(padded) for _ in rows]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, rows)]).to(place)


def _device() -> str:
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"
