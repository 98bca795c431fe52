"""Heard: what a layer hands to its attention function, as methods may ask for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..reading.sharding import all_heads
from ._tensors import take


@dataclass(eq=False)
class Heard:
    """Queries and keys of N tokens as a layer hands them to its attention function.

    query: (B, H, N, E). key: (B, G, N, E). projected: (B, N, G E), keys as the layer's `k_proj`
    gave them; None if it has none.
    scaling: what q k^T is multiplied with. softcap: its bound c in c tanh(q k^T / c), or None.
    sinks: (H,) logits of a place without a token, or None.
    mask: the model's own mask for the whole sequence, or flex attention's; None: causal.
    group: of the processes that have a part of the heads each; None: all of them are here.
    past: of a later turn, keys (B, G, P, E) of what came before, and their places `Packed`.
    value: (B, G, N, E), of a layer that ran ahead; else None.
    again: gives query and key without rotary positions; None if no method asks for them.
    """

    query: Tensor
    key: Tensor
    projected: Tensor | None
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    mask: Any
    group: Any = None
    past: tuple[Tensor, Any] | None = None
    value: Tensor | None = None
    again: Callable[[], tuple[Tensor, Tensor]] | None = None

    @classmethod
    def of(cls, query: Tensor, key: Tensor, options: dict, projected: Any, mask: Any) -> Heard:
        """From what an attention function is called with. options: its keyword arguments."""
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        softcap, sinks = options.get("softcap"), options.get("s_aux")
        return cls(query, key, projected, scaling, softcap, sinks, mask)

    def queries(self, at: Tensor | None) -> Tensor:
        """Queries (B, H, R, E) at the places `at` (B, R); None: all."""
        return self.query if at is None else take(self.query.transpose(1, 2), at).transpose(1, 2)

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """`x`, which has this process's heads along `dim`, with all heads."""
        return x if self.group is None else all_heads(x, dim, self.group)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Heard:
        """With each token at another place. move: of (B, N, ...) tensors, to the new places."""

        def moved(x: Tensor) -> Tensor:
            return move(x.transpose(1, 2)).transpose(1, 2)

        again, value = self.again, None if self.value is None else moved(self.value)
        return replace(
            self,
            query=moved(self.query),
            key=moved(self.key),
            projected=None if self.projected is None else move(self.projected),
            value=value,
            again=None if again is None else lambda: (moved(again()[0]), moved(again()[1])),
        )

    def without_rotary(self) -> Heard:
        """The same layer's queries and keys as they were before rotary embedding."""
        if self.again is None:
            raise ValueError(
                "queries and keys without rotary positions are made only for methods that say so: "
                "set reads_unrotated = True in the class"
            )
        query, key = self.again()
        return replace(self, query=query.to(self.query), key=key.to(self.key))
