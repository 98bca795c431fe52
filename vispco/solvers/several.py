"""Several methods, of which each drop has its own: what the ranking costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..methods import Method
from ..profiling import Profile


class Several(Method):
    """Methods of which any may rank, each drop by the one that a profile names.

    methods: {name: method}. Before the profile is known, a ranking counts as the dearest one's.

    >>> from vispco.registry import build_method
    >>> Several({name: build_method(name) for name in ("fastv", "visionzip")}).first_layer
    0
    """

    def __init__(self, methods: Mapping[str, Method]):
        self.methods = dict(methods)
        self.first_layer = min(method.first_layer for method in methods.values())
        self.tokens = 0

    def know(self, profile: Profile) -> None:
        """From now on, a ranking counts as that of the profile's method (`Profile.ranker`)."""
        levels = [[n for n in profile.ranks.get(k, {}) if n] or [0] for k in range(profile.layers)]
        most, names = max(map(len, levels)), list(self.methods)
        self.tokens = profile.tokens
        # (L, J): the numbers of tokens that were measured, and (L, J - 1) the middles between them.
        padded = [row + row[-1:] * (most - len(row)) for row in levels]
        self.middles = torch.tensor(
            [[(a + b) / 2 if a < b else math.inf for a, b in itertools.pairwise(r)] for r in padded]
        ).reshape(len(padded), most - 1)
        self.who = torch.tensor(
            [
                [names.index(profile.ranks[k][n]) if k in profile.ranks else 0 for n in row]
                for k, row in enumerate(padded)
            ]
        )

    def score(self, ctx):
        """Not known without the layer's method."""
        raise NotImplementedError("several methods: ask the profile which one ranks a layer")

    def ranking(self, dimensions, before: Tensor, after: Tensor, n_text: Tensor) -> Tensor:
        """FLOPs (..., L) of scoring and merging before each layer, never less than it will be.

        A smaller prompt keeps `after` of its tokens for several numbers of the largest one's: the
        dearest of their methods counts. So it does where nothing is kept, and the method of the
        drop before is in charge.
        """
        each = [m.flops(dimensions, before, n_text) for m in self.methods.values()]
        costs = torch.stack([torch.as_tensor(cost).expand_as(before) for cost in each], -1)
        dearest = costs.amax(-1)
        if not self.tokens:
            return dearest
        n = before[..., :1].clamp(min=1)
        least = (after * self.tokens + n - 1).div(n, rounding_mode="floor")
        most = ((after + 1) * self.tokens + n - 1).div(n, rounding_mode="floor") - 1
        places = torch.arange(self.who.shape[-1])
        first, last = ((x[..., None] > self.middles).sum(-1, keepdim=True) for x in (least, most))
        own = costs.gather(-1, self.who.expand(*after.shape, -1))
        own = own.where((places >= first) & (places <= last), 0).amax(-1)
        return own.where(after > 0, dearest)
