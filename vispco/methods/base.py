"""Method: scores the visual tokens that are about to enter a layer. The core does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..flops import Dimensions
from ..pruning.context import Context
from ..registry import METHODS


class Method(ABC):
    """Base class of pruning methods: subclass it, write `score`, register the class.

    >>> import vispco
    >>> @vispco.register_method("key_norm", overwrite=True)
    ... class KeyNorm(vispco.Method):
    ...     "Keep the tokens with the largest key norm."
    ...     def score(self, ctx):
    ...         return ctx.keys().norm(dim=-1).mean(1)[ctx.visual]
    >>> "key_norm" in vispco.list_methods()
    True
    >>> vispco.registry.METHODS.remove("key_norm")

    Options of the method are keyword arguments of `__init__`. They travel in
    `PruningConfig.method_options`.
    """

    #: First layer whose input the method can prune. A method that reads the attention of the layer
    #: just run needs 1.
    first_layer: int = 1
    #: Whether the method asks for `ctx.vision_attention` or `ctx.vision_keys`. Only then is the
    #: vision tower hooked.
    reads_vision: bool = False
    #: Further layers of the tower whose attention it asks for, by `ctx.vision_attention_at`: depths
    #: from 0 (the first layer) to 1 (the last).
    vision_depths: tuple[float, ...] = ()
    #: Whether the method asks for queries or keys without rotary positions.
    reads_unrotated: bool = False
    #: What the method looks at, for `vispco list methods`.
    reads: str = ""
    #: Whether the method asks for queries or keys of the layer that comes, `ctx.layer`.
    reads_next: bool = False
    #: Whether the method asks for `ctx.grid`.
    reads_grid: bool = False
    #: (start, method) of each part of a composite; none in any other method.
    parts: tuple[tuple[int, Method], ...] = ()

    @abstractmethod
    def score(self, ctx: Context) -> Tensor:
        """Scores (B, n_visual) of the slots `ctx.visual`.

        The highest are kept; of equal ones, those of the lowest index.
        """

    def limit(self, ctx: Context, scores: Tensor) -> Tensor | None:
        """Most tokens to keep of each sample, (B,); None, the default: as many as configured.

        For methods that sometimes want fewer than `ctx.keep`. At least one token is kept if any is.
        Budgets then hold as upper bounds: FLOPs are counted as if no sample wanted fewer.
        scores: what `score` returned.
        """
        return None

    def merge(self, ctx: Context, kept: Tensor) -> Tensor | None:
        """The kept slot that each slot is averaged into; None, the default: no merging.

        kept: (B, n_visual) bool.
        Returns (B, n_visual) long: a slot, or -1 for none. Kept slots name themselves. Before the
        layer runs, the hidden state of each kept token becomes the mean of all that name it. It
        keeps its own position, and is one token in every count.
        """
        return None

    def at(self, layer: int) -> Method:
        """The method that ranks what is about to enter `layer`: itself, unless a composite."""
        return self

    def flops(self, dimensions: Dimensions, n_visual: Any, n_text: Any) -> Any:
        """FLOPs of scoring and merging once, for one sample: matrix products only.

        n_visual, n_text: tokens present now, numbers or tensors of these: use plain arithmetic.
        """
        return 0

    def ranking(
        self, dimensions: Dimensions, before: Tensor, after: Tensor, n_text: Tensor
    ) -> Tensor:
        """FLOPs (..., L) of scoring and merging before each layer, if tokens are dropped there.

        before, after: (..., L) whole visual tokens, of which `after` go on. n_text: (..., 1).
        """
        who = [self.at(i) for i in range(after.shape[-1])]
        found = torch.zeros_like(after)
        for method in {id(each): each for each in who}.values():
            its_own = torch.tensor([each is method for each in who], device=after.device)
            found = found + method.flops(dimensions, before, n_text) * its_own
        return found


METHODS.base = Method
