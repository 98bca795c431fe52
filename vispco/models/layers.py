"""What the layers of a decoder are, by the types that its configuration gives them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from torch import nn

#: Types of layers in which hiding a token is the same as leaving it out.
MASKED = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "reference_sliding_attention",
}
#: Types of layers with attention in which it is not: an indexer chooses keys, or a convolution
#: mixes tokens before.
MIXED = {"hybrid", "hybrid_sliding", "indexed_attention", "minimax_m3_sparse"}
#: Types of layers that find keys by `position_ids`.
COUNTING = {"minimax_m3_sparse"}
#: Types of layers that have no attention.
RECURRENT = {"linear_attention", "conv", "mamba", "mlp", "moe"}


class Layers:
    """What is known of the decoder's layers of a loaded model: a base of `Adapter`.

    Subclasses have `layers`, the list of the decoder's layers, its configuration `text`, and the
    whole model's `config`.
    """

    layers: Any
    text: Any
    config: Any
    dimensions: Any

    def attends(self, layer: int) -> bool:
        """Whether a decoder layer has attention: not only a recurrence or a convolution.

        Layers of a type without a name here are looked at in a blank model.
        """
        kind = self.kind(layer)
        if kind in MASKED | MIXED | RECURRENT:
            return kind not in RECURRENT
        return self._attention[layer] is not None

    @cached_property
    def _attention(self) -> Sequence:
        return self.dimensions(self.config).measured.attention

    def heads(self, layer: int) -> int:
        """The number of attention heads of a decoder layer that has attention, of all processes."""
        return self._attention[layer].heads

    def masks(self, layer: int) -> bool:
        """Whether hiding a token in a decoder layer's mask is the same as leaving it out.

        Not where states are carried from token to token, or where an indexer chooses keys. Search
        runs such layers on the tokens that are left.
        """
        return self.kind(layer) in MASKED

    def counts(self, layer: int) -> bool:
        """Whether a decoder layer takes `position_ids` for the places of its tokens' keys."""
        return self.kind(layer) in COUNTING

    def kind(self, layer: int) -> str:
        """The type of a decoder layer, as the model's configuration names it."""
        return self._kinds[layer]

    @cached_property
    def _kinds(self) -> Sequence[str]:
        return getattr(self.text, "layer_types", None) or ["full_attention"] * len(self.layers)

    def next_attention(self, layer: int) -> int:
        """The first decoder layer after `layer` that has attention; if none, their number."""
        later = range(layer + 1, len(self.layers))
        return next(filter(self.attends, later), len(self.layers))

    @property
    def layers_with_keys(self) -> int:
        """Number of decoder layers that make keys; those after them read the keys of these."""
        return len(self.layers) - (getattr(self.text, "num_kv_shared_layers", None) or 0)

    def first_layer(self, method: Any) -> int:
        """First decoder layer whose input `method` can prune: it may need attention before it.

        Raises ValueError for a composite that does not fit: see its `begin`.
        """
        if method.parts:
            return method.begin(self.first_layer, len(self.layers))
        if not (method.first_layer or method.reads_next):
            return 0
        return self.next_attention(-1) + method.first_layer

    def differentiable(self, method: Any) -> bool:
        """Whether the gradient of a search with `method` can flow: through a mask, somewhere."""
        return any(map(self.masks, range(self.first_layer(method), len(self.layers))))

    def key_sources(self, layer: int) -> Iterator[int]:
        """Decoder layers whose keys `layer` may read: itself, then earlier ones of its type."""
        return (i for i in range(layer, -1, -1) if self.kind(i) == self.kind(layer))

    def key_projection(self, layer: int) -> nn.Module | None:
        """The module of a decoder layer whose output (B, N, G E) is its keys, if it has one."""
        name = self._key_names[layer]
        # PEFT may have put another there.
        return self.layers[layer].get_submodule(name) if name else None

    @cached_property
    def _key_names(self) -> list[str]:
        """The name of each decoder layer's `k_proj` within the layer; "" where there is none."""
        found = []
        for i, layer in enumerate(self.layers):
            names = [n for n, _ in layer.named_modules() if n.split(".")[-1] == "k_proj"]
            found.append(names[0] if names and self.attends(i) else "")
        return found
