"""Sizes of a decoder, and what one of its layers costs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a decoder.

    heads, kv_heads, head_dim: of its attention; a tuple of one number per layer if layers differ.
        A layer without attention has the numbers of the last one before it that has some.
    ffn, ffn_matrices: width of its feed-forward network (FFN), and how many matrices that has.
    vision_head_dim: size of a head of the vision tower, if a method compares its keys.
    measured: costs that were counted (`vispco.models.measure.Decoder`). None: the closed forms
        below hold, of a Llama-like decoder.
    """

    layers: int
    hidden: int
    heads: Any
    kv_heads: Any
    head_dim: Any
    ffn: int
    vocab: int
    ffn_matrices: int = 3
    vision_head_dim: int = 0
    measured: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        for name, size in self.sizes().items():
            if isinstance(size, list):
                object.__setattr__(self, name, tuple(size))

    def sizes(self) -> dict[str, Any]:
        """The numbers alone, without what was measured."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.compare}

    def flops(self, n):
        """FLOPs of a layer that n tokens enter, exactly; of all layers (..., L) if measured.

        2 n (2 d h e + 2 d g e + 3 d m) + 4 n^2 h e
        """
        if self.measured is not None:
            return self.measured.flops(n)
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        ffn = self.ffn_matrices * self.hidden * self.ffn
        return 2 * n * (attention + ffn) + 4 * n * n * (self.heads * self.head_dim)

    def ahead(self, n):
        """FLOPs of a layer up to its attention function, and of one row of q k^T there.

        2 n d (h + 2 g) e + 2 n h e
        """
        if self.measured is not None:
            return self.measured.ahead(n)
        projections = self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim
        return 2 * n * (projections + self.heads * self.head_dim)

    def cached(self):
        """Numbers that a layer's key-value cache holds of each token; (L,) if measured."""
        if self.measured is not None:
            return self.measured.cached
        return 2 * self.kv_heads * self.head_dim

    def before(self) -> Dimensions:
        """The sizes of the attention before each layer: tensors (L,) if layers differ."""
        differ = {name: size for name, size in self.sizes().items() if isinstance(size, tuple)}
        shifted = {name: torch.tensor((size[0], *size[:-1])) for name, size in differ.items()}
        return replace(self, **shifted) if shifted else self
