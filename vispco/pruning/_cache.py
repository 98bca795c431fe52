"""The KV cache of a pruned prompt: each layer holds what entered it.

So only a pruned model can go on with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ._masks import Packed, decode_mask


@dataclass
class Memory:
    """What a cache knows of its prompt, as `cache.vispco`.

    packed: {layer: the tokens it holds}, where some were dropped.
    pruned: some were dropped, or masked.
    running: a pruner is running the model on this cache just now.
    memo: masks that layers share in one forward pass.
    """

    packed: dict[int, Packed] = field(default_factory=dict)
    pruned: bool = False
    running: bool = True
    memo: dict = field(default_factory=dict)

    def resume(self) -> None:
        """A pruner goes on with this cache.

        Raises ValueError if the prompt's tokens were only masked.
        """
        if self.pruned and not self.packed:
            raise ValueError(
                "search mode only masks tokens, and the KV cache still holds them: to generate, "
                "apply the configuration with mode='deploy'"
            )
        self.running, self.memo = True, {}

    def changes_masks(self, queries: int, mask: Tensor | None) -> bool:
        """Whether the masks of `queries` new tokens have to change, from the model's own `mask`."""
        several = mask is not None or queries > 1
        return any(several or not packed.dense for packed in self.packed.values())

    def decoding(self, i: int, queries: int, kwargs: dict) -> dict:
        """The arguments of layer i that change for `queries` new tokens. kwargs: the layer's."""
        packed, mask = self.packed.get(i), kwargs.get("attention_mask")
        if packed is None:
            return {}
        key = (id(packed), id(mask))
        if key not in self.memo:
            mask = None if mask is None else mask.to(packed.order.device)
            # From the keys: what `crop` has taken away is not among them.
            width = kwargs["past_key_values"].layers[i].keys.shape[-2] + queries
            self.memo[key] = {"attention_mask": decode_mask(mask, packed, queries, width)}
        return self.memo[key]


class PrunedLayer(DynamicLayer):
    """Keys and values of a layer that some tokens did not enter.

    Its length is that of the ORIGINAL sequence: Hugging Face derives position ids and masks from
    the length of the first layer, which is always one of these.
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
            raise ValueError(
                "this KV cache was filled while the model was pruned, and now it is not: go on "
                "inside the `with` block of vispco.apply (a thread that generates must end there), "
                "or start again from the whole prompt with a new cache"
            )
        return super().update(*args, **kwargs)

    def crop(self, tokens: int) -> None:
        """Take away the last `-tokens`.

        In releases of transformers where a positive number is a length to keep, down to that.
        """
        if tokens > 0:
            # Raises ValueError in the others.
            DynamicLayer().crop(tokens)
        away = -tokens if tokens <= 0 else max(0, self.get_seq_length() - tokens)
        if away and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[..., :-away, :], self.values[..., :-away, :]


def check(cache: Any) -> None:
    """Raise ValueError for a kind of KV cache that cannot hold a pruned prompt. None: no cache."""
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            "a static KV cache has one length for all layers and cannot hold pruned ones: use the "
            "default cache (leave cache_implementation out)"
        )
    for layer in getattr(cache, "layers", ()):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, PrunedLayer):
            raise ValueError(
                f"a KV cache with layers of {type(layer).__name__} cannot hold a pruned prompt: "
                "use the default cache (leave cache_implementation out)"
            )


def claim(cache: Any) -> Memory:
    """Make an empty cache ready for a pruned prompt.

    Windows would count kept tokens instead of positions. So sliding layers keep all; the model's
    masks still hide what is out of the window.
    """
    cache.vispco = Memory()
    for i, layer in enumerate(cache.layers):
        if layer.is_sliding or isinstance(layer, PrunedLayer):
            cache.layers[i] = DynamicLayer()
    cache.layers[:1] = [PrunedLayer(cache.vispco)]
    return cache.vispco


def shorten(cache: Any, layer: int, packed: Packed) -> None:
    """Make an empty layer of a cache that was claimed ready for the tokens that remain."""
    cache.vispco.packed[layer] = packed
    dropped = packed.length - packed.order.shape[1]
    cache.layers[layer : layer + 1] = [PrunedLayer(cache.vispco, dropped)]
