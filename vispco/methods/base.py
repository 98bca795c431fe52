"""Method: ranks the visual tokens that are about to enter a layer. Everything else is the core's business."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from ..context import Context
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

    @abstractmethod
    def score(self, ctx: Context) -> Tensor:
        """Scores (B, n_visual) of the slots `ctx.visual`; the highest are kept, ties to the lowest index."""

    def flops(self, dimensions: Dimensions, n_visual: int, n_text: int) -> int:
        """FLOPs (matrix products only) of one `score` call for one sample, with the tokens present now.

        Plain arithmetic, please: the numbers of tokens may be tensors.
        """
        return 0
