"""Method: ranks the visual tokens that are about to enter a layer. Everything else is the core's business."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from ..pruning.context import Context
from ..flops import Dimensions


class Method(ABC):
    """Base class of pruning methods: subclass, write `score`, register.

    >>> import vispco
    >>> @vispco.register_method("key_norm", overwrite=True)
    ... class KeyNorm(vispco.Method):
    ...     "Keep the tokens with the largest key norm."
    ...     def score(self, ctx):
    ...         return ctx.keys().norm(dim=-1).mean(1)[ctx.visual]
    >>> "key_norm" in vispco.list_methods()
    True
    >>> vispco.registry.METHODS.remove("key_norm")

    Options of the method are keyword arguments of `__init__`; they travel in `PruningConfig.method_options`.
    """

    #: First layer whose input the method can prune: 1 if it reads the attention of the layer just run.
    first_layer: ClassVar[int] = 1
    #: Whether the method asks for `ctx.vision_attention` or `ctx.vision_keys`: only then is the vision tower hooked.
    reads_vision: ClassVar[bool] = False
    #: Whether it asks for `ctx.grid`.
    reads_grid: ClassVar[bool] = False

    @abstractmethod
    def score(self, ctx: Context) -> Tensor:
        """Scores (B, n_visual) of the slots `ctx.visual`; the highest are kept, ties to the lowest index."""

    def limit(self, ctx: Context, scores: Tensor) -> Tensor | None:
        """Most tokens to keep of each sample, (B,): for methods that sometimes want fewer than `ctx.keep`.

        None (the default): as many as configured. At least one token is kept if any is. Budgets then hold as upper
        bounds: FLOPs are counted as if no sample wanted fewer.
        """
        return None

    def merge(self, ctx: Context, kept: Tensor) -> Tensor | None:
        """The kept slot that each slot is averaged into, (B, n_visual) long, or -1; None (the default): no merging.

        kept: (B, n_visual) bool. Kept slots name themselves. Before the layer runs, each kept token's hidden state
        becomes the mean of all that name it; it keeps its own position, and is one token in every count.
        """
        return None

    def flops(self, dimensions: Dimensions, n_visual: int, n_text: int) -> int:
        """FLOPs (matrix products only) of ranking and merging once, for one sample, with the tokens present now.

        Plain arithmetic, please: the numbers of tokens may be tensors.
        """
        return 0
