"""Sizes of a decoder, and what each of its layers costs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

#: A number, or one of each layer where layers differ.
Size = Any


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a decoder.

    heads, kv_heads, head_dim: of its attention; a tuple of one number per layer if layers differ.
        A layer without attention has the numbers of the last one before it that has some.
    ffn, ffn_matrices: width of its feed-forward network (FFN), and how many matrices that has.
    vision_head_dim: size of a head of the vision tower, if a method compares its keys.
    measured: what knows the costs (`vispco.reading.measure.Decoder`). None: the closed forms of a
        Llama-like decoder hold.
    """

    layers: int
    hidden: int
    heads: Size
    kv_heads: Size
    head_dim: Size
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
        """The numbers alone, by name, without what was measured."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.compare}

    def flops(self, n):
        """FLOPs of each layer that n tokens (..., L) enter:

            2 n (2 d h e + 2 d g e + 3 d m) + 4 n^2 h e

        with d = hidden, h = heads, g = kv_heads, e = head_dim, m = ffn.
        """
        if self.measured is not None:
            return self.measured.flops(n)
        h, g, e = self._attention()
        matrices = 2 * self.hidden * (h + g) * e + self.ffn_matrices * self.hidden * self.ffn
        return 2 * n * matrices + 4 * n * n * (h * e)

    def ahead(self, n):
        """FLOPs of each layer up to its attention function, and of one row of q k^T there:

        2 n d (h + 2 g) e + 2 n h e
        """
        if self.measured is not None:
            return self.measured.ahead(n)
        h, g, e = self._attention()
        return 2 * n * (self.hidden * (h + 2 * g) + h) * e

    def again(self, n):
        """FLOPs `ahead` of the last layer before each that has attention, for n tokens (..., L).

        Plain numbers, of a decoder whose layers are alike, have no layers to look back to.
        """
        n = torch.as_tensor(n)
        if not n.ndim or n.shape[-1] != self.layers:
            return self.ahead(n)
        # Layer i + 1 is asked about; layer i pays.
        spent = torch.as_tensor(self.ahead(torch.cat([n[..., 1:], n[..., -1:]], -1)))
        return torch.cat([spent[..., :1], spent[..., :-1]], -1)

    @property
    def cached(self):
        """Numbers that each layer's key-value cache holds of a token: 2 g e."""
        if self.measured is not None:
            return self.measured.cached
        _, g, e = self._attention()
        return 2 * g * e

    def before(self) -> Dimensions:
        """With the sizes of the attention that each layer finds done: that of the layer before."""
        differ = {name: size for name, size in self.sizes().items() if isinstance(size, tuple)}
        shifted: dict[str, Any] = {
            name: torch.tensor((size[0], *size[:-1])) for name, size in differ.items()
        }
        return replace(self, measured=self.measured or self, **shifted)

    def _attention(self):
        sizes = self.heads, self.kv_heads, self.head_dim
        return (torch.tensor(size) if isinstance(size, tuple) else size for size in sizes)
