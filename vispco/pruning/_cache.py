"""The KV cache of a pruned prompt: each layer holds what entered it.

So only a pruned model can go on with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer

from ._arguments import gathered
from ._implementations import decoding_function, implementation, is_flash, is_function
from ._masks import Packed, decode_mask, static_mask


@dataclass
class Memory:
    """What a cache knows of its prompt, as `cache.vispco`.

    packed: {layer: the tokens it holds}, where some were dropped.
    pruned: some were dropped, or masked.
    running: a pruner is running the model on this cache just now.
    inside: its layers are running.
    borrowed: some layers have no keys of their own, and read those of earlier ones.
    memo: masks that layers share in one forward pass.
    """

    packed: dict[int, Packed] = field(default_factory=dict)
    pruned: bool = False
    running: bool = True
    inside: bool = False
    borrowed: bool = False
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

    def changes(self, hidden: Tensor, given: dict, adapter: Any) -> bool:
        """Whether arguments of layers have to change for new tokens, whose states are `hidden`.

        given: what layer 0 is called with. One new token needs no mask where no row has fillers.
        """
        several = given.get("attention_mask") is not None or hidden.shape[-2] > 1
        all_positions = any(x.shape[-2] > hidden.shape[-2] for x in rotary(given))
        return self.borrowed or any(
            several or all_positions or not packed.dense or adapter.counts(i)
            for i, packed in self.packed.items()
        )

    def decoding(self, i: int, hidden: Tensor, given: dict, adapter: Any) -> dict:
        """The arguments of layer i that change for new tokens. given: those that it is called with.

        A layer without keys of its own reads those of an earlier layer, in which there may be more
        tokens: they are hidden.
        """
        packed, mask = self.packed.get(i), given.get("attention_mask")
        if packed is None or not adapter.attends(i):
            return {}
        layers, batch = given["past_key_values"].layers, len(packed.order)
        source = next(j for j in adapter.key_sources(i) if has_keys(layers[j]))
        # States of several streams may come before the samples.
        queries = hidden.shape[1] if hidden.shape[0] == batch else hidden.shape[2]
        held, pair, counts = self.packed.get(source), rotary(given), adapter.counts(i)
        # From the keys: what `crop` has taken away is not among them.
        width = held_keys(layers[source], queries if source == i else 0)
        # Layers that hold the same tokens share what is made for them.
        key = (id(packed), id(held), id(mask), width, counts, *map(id, pair))
        if key not in self.memo:
            changed: dict[str, Any] = {}
            if "attention_mask" in given:
                own: Any = None if mask is None else mask.to(packed.order.device)
                seen = packed.among(held)
                if is_function(own):
                    changed["attention_mask"] = decoding_function(own, seen, queries, width)
                elif own is not None and own.ndim == 4 and is_static(layers[source]):
                    changed["attention_mask"] = static_mask(own, seen, width)
                elif own is None and is_flash(implementation(adapter)):
                    changed["attention_mask"] = seen.known(width)
                else:
                    changed["attention_mask"] = decode_mask(own, seen, queries, width)
            if counts:
                places = torch.arange(width - queries, width, device=packed.order.device)
                changed["position_ids"] = places.expand(batch, -1)
            # Some layers look at the positions of all tokens so far.
            if any(x.shape[-2] > queries for x in pair):
                order, length = packed.continued(width), pair[0].shape[-2]
                changed["position_embeddings"] = tuple(gathered(x, order, length) for x in pair)
            self.memo[key] = changed
        return self.memo[key]


def rotary(given: dict) -> tuple[Tensor, ...]:
    """The rotary embeddings among a layer's arguments, if they are a pair of tensors."""
    pair = given.get("position_embeddings")
    return pair if isinstance(pair, tuple) else ()


class Shortened:
    """A cache layer that some tokens did not enter, of a class of transformers.

    To the decoder and to `generate` its length is that of the ORIGINAL sequence: they derive
    position ids and masks from the first layer that has a length. To the layers themselves it is
    the number of keys.

    memory: of its cache. dropped: tokens that did not enter.
    """

    memory: Memory
    dropped: int = 0

    def get_seq_length(self) -> int:
        """Tokens seen, dropped ones included; while layers run, those that are there."""
        length = super().get_seq_length()  # type: ignore[misc]
        # Of a static layer it is a tensor, which nobody should wait for.
        return length if self.memory.inside else length + self.dropped * (length > 0)

    def get_mask_sizes(self, *args, **kwargs) -> tuple[int, int]:
        """Keys that a mask is made for, and the place of the first: of the original sequence."""
        width, first = super().get_mask_sizes(*args, **kwargs)  # type: ignore[misc]
        return width + (self.dropped if is_static(self) and not self.memory.inside else 0), first

    def update(self, *args, **kwargs):
        """Append. Raises ValueError if the model is not pruned (any more), but the prompt was."""
        if self.memory.pruned and not self.memory.running:
            raise ValueError(
                "this KV cache was filled while the model was pruned, and now it is not: go on "
                "inside the `with` block of vispco.apply (a thread that generates must end there), "
                "or start again from the whole prompt with a new cache"
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def crop(self, tokens: int) -> None:
        """Take away the last `-tokens`.

        In releases of transformers where a positive number is a length to keep, down to that.
        """
        if tokens > 0:
            # Raises ValueError in the others.
            DynamicLayer().crop(tokens)
        away = -tokens if tokens <= 0 else max(0, self.get_seq_length() - tokens)
        before, self.memory.inside = self.memory.inside, True
        try:
            super().crop(-away)  # type: ignore[misc]
        finally:
            self.memory.inside = before


@cache
def shortened(kind: Any) -> Any:
    """The class of a cache layer, with `Shortened` before it."""
    # Not a kind that transformers would make for a model.
    return type(f"Shortened{kind.__name__}", (Shortened, kind), {"_layer_type": None})


def check(cache: Any, hides: bool = False) -> None:
    """Raise ValueError for a kind of KV cache that cannot hold a pruned prompt. None: no cache.

    hides: whether tokens stay, and are hidden by masks, as in search.
    """
    if cache is not None and not hasattr(cache, "layers"):
        raise ValueError(
            f"a {type(cache).__name__} cannot hold a pruned prompt: use a DynamicCache, or "
            "use_cache=False"
        )
    for layer in getattr(cache, "layers", ()):
        kind = next(k for k in type(layer).__mro__ if not issubclass(k, Shortened))
        static = "Static" in kind.__name__
        # Windows would count kept tokens; early releases of transformers look for the first 0.
        plain = kind is cache_utils.StaticLayer and hasattr(layer, "cumulative_length")
        plain = plain and not getattr(cache, "offloading", False)
        # Some quantised layers do not say how many tokens they hold.
        quantised = "Quantized" in kind.__name__ and not hasattr(layer, "cumulative_length")
        if (static and (hides or not plain)) or quantised:
            raise ValueError(
                f"a KV cache with layers of {kind.__name__} cannot hold a "
                f"{'masked' if hides else 'pruned'} prompt: use the default cache (leave "
                "cache_implementation out)"
            )


def claim(cache: Any) -> Memory:
    """Make an empty cache ready for a pruned prompt.

    Windows would count kept tokens instead of positions. So sliding layers keep all; the model's
    masks still hide what is out of the window.
    """
    memory = cache.vispco = Memory()
    for i, layer in enumerate(cache.layers):
        cache.layers[i] = without_window(layer)
    if not cache.layers:
        # Of a cache that makes its layers when they are first used.
        cache.layers.append(DynamicLayer())
    first = next((i for i, layer in enumerate(cache.layers) if has_keys(layer)), None)
    if first is not None:
        mark(cache, first)
    return memory


def without_window(layer: Any) -> Any:
    """An empty cache layer that keeps all keys, in place of one that slides or was shortened."""
    if isinstance(layer, Shortened):
        resized(layer, layer.dropped)
        layer = of_class(layer, type(layer).__mro__[2])
    if not getattr(layer, "is_sliding", False):
        return layer
    states = getattr(layer, "number_of_states", None)
    return (
        DynamicLayer()
        if states is None
        else cache_utils.LinearAttentionAndFullAttentionLayer(states)
    )


def has_keys(layer: Any) -> bool:
    """Whether a cache layer holds keys, and not only the state of a recurrence or convolution."""
    return isinstance(layer, DynamicLayer) or is_static(layer)


def is_static(layer: Any) -> bool:
    """Whether a cache layer has room for all tokens from the start, and hands out all of it."""
    return isinstance(layer, cache_utils.StaticLayer)


def held_keys(layer: Any, new: int) -> int:
    """Keys that a layer hands to attention, when `new` ones come."""
    if is_static(layer):
        return layer.max_cache_len
    # Quantised layers do not hold all of them in `keys`.
    return layer.get_seq_length() + new


def resized(layer: Any, more: int) -> None:
    """Give an empty static layer room for `more` tokens, or for fewer."""
    if is_static(layer) and more:
        layer.max_cache_len, layer.is_initialized = layer.max_cache_len + more, False


def mark(cache: Any, i: int, dropped: int = 0) -> None:
    """Have layer i of a cache that was claimed know that `dropped` tokens do not enter it."""
    layer = cache.layers[i]
    if not isinstance(layer, Shortened):
        kind: Any = type(layer)
        layer = cache.layers[i] = of_class(layer, shortened(kind))
    layer.memory, layer.dropped = cache.vispco, dropped


def of_class(layer: Any, kind: type) -> Any:
    """The same layer as an object of another class."""
    other: Any = object.__new__(kind)
    other.__dict__ = layer.__dict__
    return other


def shorten(cache: Any, i: int, packed: Packed) -> None:
    """Make a layer of a cache that was claimed ready for the tokens that remain."""
    cache.vispco.packed[i] = packed
    if i == len(cache.layers):
        cache.layers.append(DynamicLayer())
    if has_keys(cache.layers[i]):
        dropped = packed.length - packed.order.shape[1]
        resized(cache.layers[i], -dropped)
        mark(cache, i, dropped)
    else:
        cache.vispco.borrowed = True
