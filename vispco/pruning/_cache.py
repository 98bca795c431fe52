"""The KV cache of a pruned prompt: each layer as long as what entered it, so only a pruned model can go on with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ._masks import Packed


@dataclass
class Memory:
    """What a cache knows of its prompt, as `cache.vispco`.

    packed: {layer: the tokens it holds}, where some were dropped. pruned: some were dropped, or masked. running: a
    pruner is running the model on this cache just now.
    """

    packed: dict[int, Packed] = field(default_factory=dict)
    pruned: bool = False
    running: bool = True


class PrunedLayer(DynamicLayer):
    """Keys and values of a layer that some tokens did not enter; lengths are those of the ORIGINAL sequence.

    Hugging Face derives position ids and masks from the length of the first layer, which is always one of these.
    """

    def __init__(self, memory: Memory, dropped: int = 0):
        super().__init__()
        self.memory, self.dropped = memory, dropped

    def get_seq_length(self) -> int:
        """Tokens seen, dropped ones included."""
        length = super().get_seq_length()
        return length and length + self.dropped

    def update(self, *args, **kwargs):
        """Append. Raises ValueError if the model is not pruned (any more), but the prompt was."""
        if self.memory.pruned and not self.memory.running:
            raise ValueError("this KV cache was filled while the model was pruned, and now it is not: go on inside the "
                             "`with` block of vispco.apply (a thread that generates must end there), or start again from "
                             "the whole prompt with a new cache")
        return super().update(*args, **kwargs)

    def crop(self, tokens: int) -> None:
        """Take away the last `-tokens`; in releases where a positive number is a length to keep, down to that."""
        if tokens > 0:
            DynamicLayer().crop(tokens)  # raises ValueError where it is not
        away = -tokens if tokens <= 0 else max(0, self.get_seq_length() - tokens)
        if away and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[..., :-away, :], self.values[..., :-away, :]


def check(cache: Any) -> None:
    """Raise ValueError for a kind of KV cache that cannot hold a pruned prompt. None: no cache."""
    if getattr(cache, "is_compileable", False):
        raise ValueError("a static KV cache has one length for all layers and cannot hold pruned ones: use the "
                         "default cache (leave cache_implementation out)")
    for layer in getattr(cache, "layers", ()):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, PrunedLayer):
            raise ValueError(f"a KV cache with layers of {type(layer).__name__} cannot hold a pruned prompt: use the default "
                             "cache (leave cache_implementation out)")


def claim(cache: Any) -> Memory:
    """Make an empty cache ready for a pruned prompt.

    Windows would count kept tokens instead of positions, so sliding layers keep all; the model's masks still hide what
    is out of the window.
    """
    cache.vispco = Memory()
    cache.layers[:] = [DynamicLayer() if layer.is_sliding or isinstance(layer, PrunedLayer) else layer for layer in cache.layers]
    cache.layers[:1] = [PrunedLayer(cache.vispco)]
    return cache.vispco


def shorten(cache: Any, layer: int, packed: Packed) -> None:
    """Make an empty layer of a cache that was claimed ready for the tokens that remain."""
    cache.vispco.packed[layer] = packed
    cache.layers[layer:layer + 1] = [PrunedLayer(cache.vispco, packed.length - packed.order.shape[1])]
