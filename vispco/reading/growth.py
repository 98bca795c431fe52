"""How FLOPs grow with the number of tokens: a rule found from a few lengths, exact for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import lcm
from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """F(n) = (c + a n + b n^2 + p (d + e n + f p)) / whole, with p = floor((n + offset) / chunk).

    A layer of attention is a polynomial. Linear attention also pays for each `chunk` of tokens that
    it works on, whether full or not.
    """

    factors: tuple[int, ...]
    whole: int = 1
    chunk: int = 1
    offset: int = 0


def find_rule(found: Mapping[int, int], chunks: Sequence[int] = ()) -> Rule | None:
    """The rule behind F(n) = `found[n]`, or None if there is none.

    chunks: sizes to try if a polynomial does not do.

    >>> find_rule({n: 5 * n + 2 * n * n for n in (1, 2, 3, 4)}).factors
    (0, 5, 2, 0, 0, 0)
    >>> rule = find_rule({n: n + 7 * -(-n // 8) for n in range(1, 20)}, chunks=[8])
    >>> rule.factors, rule.chunk, rule.offset
    ((0, 1, 0, 7, 0, 0), 8, 7)
    """
    for chunk, offset in [(1, 0), *((size, o) for size in chunks for o in (0, size - 1))]:
        rows = []
        for n in found:
            p = (n + offset) // chunk if chunk > 1 else 0
            rows.append([1, n, n * n, p, n * p, p * p])
        factors = _solved(rows, list(found.values()))
        if factors is not None:
            whole = lcm(*(x.denominator for x in factors))
            return Rule(tuple(int(x * whole) for x in factors), whole, chunk, offset)
    return None


def _solved(rows: list[list[int]], values: list[int]) -> list[Fraction] | None:
    """Solution of linear equations, exactly; an unknown left free is 0. None if there is none."""
    table = [[Fraction(x) for x in (*row, value)] for row, value in zip(rows, values, strict=True)]
    pivots: list[int] = []
    for column in range(len(rows[0])):
        top = len(pivots)
        found = next((k for k in range(top, len(table)) if table[k][column]), None)
        if found is None:
            continue
        table[top], table[found] = table[found], table[top]
        pivot = [x / table[top][column] for x in table[top]]
        table = [[x - row[column] * y for x, y in zip(row, pivot, strict=True)] for row in table]
        table[top] = pivot
        pivots.append(column)
    if any(row[-1] for row in table[len(pivots) :]):
        return None
    solution = [Fraction(0)] * len(rows[0])
    for row, column in zip(table, pivots, strict=False):
        solution[column] = row[-1]
    return solution


class Growth:
    """FLOPs of each layer, as a function of the tokens n (..., L) that enter it: one rule a layer.

    Exact integers for whole tokens. Differentiable for fractional ones, between which and the whole
    ones beside them p is linear.

    >>> both = Growth([Rule((0, 5, 2, 0, 0, 0)), Rule((1, 0, 0, 7, 0, 0), chunk=8, offset=7)])
    >>> both(torch.tensor([3, 9])), both(torch.tensor([3.0, 8.5]))
    (tensor([33, 15]), tensor([33.0000, 11.5000], dtype=torch.float64))
    """

    def __init__(self, rules: Sequence[Rule]):
        self.rules = tuple(rules)
        self.factors = torch.tensor([rule.factors for rule in rules]).T
        self.whole, self.chunk, self.offset = (
            torch.tensor([rule[k] for rule in rules]) for k in (1, 2, 3)
        )

    def __call__(self, n: Tensor | int) -> Tensor:
        n = torch.as_tensor(n)
        n = n.double() if n.is_floating_point() else n
        c, a, b, d, e, f = (row.to(n.device) for row in self.factors)
        total = c + n * (a + n * b)
        if int(self.chunk.max()) > 1:
            p = self._pieces(n)
            total = total + p * (d + n * e + p * f)
        whole = self.whole.to(n.device)
        return total / whole if n.is_floating_point() else total // whole

    def _pieces(self, n: Tensor) -> Tensor:
        chunk, offset = self.chunk.to(n.device), self.offset.to(n.device)
        below = n.detach().long()
        pieces = (below + offset) // chunk
        if not n.is_floating_point():
            return pieces
        return pieces + (n - below) * ((below + 1 + offset) // chunk - pieces)
