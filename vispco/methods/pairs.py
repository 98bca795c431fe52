"""Cosines of all pairs of tokens: held at once if they are few, else made in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..pruning.context import take

#: Most tokens whose pairs are held at once: 64 MiB a sample.
HELD = 4096
#: Numbers of a block: 32 MiB.
BLOCK = 2**23


def directions(x: Tensor) -> Tensor:
    """`x` (..., D) scaled to length 1, in float32."""
    return normalize(x.float(), dim=-1)


class Pairs:
    """Cosines of all pairs of `x` (B, V, D), or what `of` makes of a tensor of them.

    Up to HELD tokens they are made once, symmetric to the bit. Of more, every call makes its rows
    anew, in blocks, so that the memory does not grow with V^2.

    >>> pairs = Pairs(torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]]))
    >>> pairs.rows(torch.tensor([[1]]))
    tensor([[[1., 1., 0.]]])
    """

    def __init__(self, x: Tensor, of: Callable[[Tensor], Tensor] = lambda cosines: cosines):
        self.unit, self.of = directions(x), of
        self.shape = samples, tokens = self.unit.shape[:2]
        self.held: Tensor | None = None
        if tokens <= HELD:
            products = self.unit @ self.unit.transpose(1, 2)
            # Sample by sample: a matrix is transposed in tiles, which is twice as fast.
            for each in (products[b] for b in range(samples)):
                each.add_(each.T.contiguous()).mul_(0.5)
            self.held = of(products)
            # Where each sample begins in a list of all rows.
            self._begin = tokens * torch.arange(samples, device=x.device)[:, None]

    def rows(self, at: Tensor) -> Tensor:
        """The rows `at` (B, R): cosines (B, R, V) to every token."""
        if self.held is not None:
            found = self.held.flatten(0, 1).index_select(0, (at + self._begin).flatten())
            return found.view(*at.shape, -1)
        return self.of(take(self.unit, at) @ self.unit.transpose(1, 2))

    def rows_of(self, sample: int, at: Tensor) -> Tensor:
        """The rows `at` (R,) of one sample: cosines (R, V) to every token."""
        if self.held is not None:
            return self.held[sample, at]
        return self.of(self.unit[sample, at] @ self.unit[sample].T)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows, block by block: which they are (R,), and their cosines (B, R, V), to read."""
        samples, tokens = self.shape
        number = torch.arange(tokens, device=self.unit.device)
        size = max(1, BLOCK // max(1, samples * tokens))
        of = self.unit if self.held is None else self.held
        for at, rows in zip(number.split(size), of.split(size, 1), strict=True):
            yield at, rows if self.held is not None else self.of(rows @ self.unit.transpose(1, 2))

    def nearest(self, targets: Tensor) -> Tensor:
        """Of each token (B, V), the one of `targets` (B, V) bool that is most like it; ties: first.

        -1 in a sample without targets.
        """
        found = [
            alike.masked_fill(~targets[:, None], float("-inf")).argmax(-1)
            for _, alike in self.blocks()
        ]
        return torch.cat(found, 1).where(targets.any(1, keepdim=True), -1)
