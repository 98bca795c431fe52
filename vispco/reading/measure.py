"""A decoder, measured: what its layers do and cost, read off a blank model as it runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .blank import Blueprint, Counting, Spent, blank, counting
from .growth import Growth, find_rule
from .hearing import Hearing

#: Numbers of tokens that decoders run with. In chunks of any size up to 256 they are no polynomial.
LENGTHS = (8, 27, 72, 265)
#: More of them, for layers that work in chunks, and the sizes of chunks that are tried. 256 fills
#: chunks of each size.
MORE = (64, 100, 141, 256, 333, 530)
CHUNKS = (64, 128, 256, 32, 16, 8, 4, 2)


@dataclass(frozen=True)
class Attention:
    """What a layer hands to its attention function, as heard there.

    heads, kv_heads, head_dim: of its queries and keys. scaling: of q k^T. softcap: limit of the
    scaled q k^T, or None. sinks: whether some of the attention goes to no token at all.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    softcap: float | None
    sinks: bool


@dataclass(frozen=True, eq=False)
class Decoder:
    """What is known of a decoder.

    attention: of each layer; None where a layer calls no attention function.
    flops, ahead: FLOPs of each layer for n tokens; of all of it, and up to its attention function
        with one row of q k^T. Of a layer without one, `ahead` is a row of the last before it.
    cached: (L,), numbers that its key-value cache holds of each token.
    """

    attention: tuple[Attention | None, ...]
    flops: Growth
    ahead: Growth
    cached: Tensor

    def size(self, name: str) -> int | tuple[int, ...]:
        """A size of the attention: one number, or those of each layer where layers differ."""
        own = [0 if heard is None else getattr(heard, name) for heard in self.attention]
        # Layers before the first that attends have its size.
        some = tuple(_carried([next(filter(None, own), 0), *own])[1:])
        return some[0] if len(set(some)) == 1 else some


class _Run:
    """One pass of a blank decoder over n tokens, by `forward` with a cache."""

    def __init__(self, adapter: Any, counter: Counting, n: int, forward: Callable):
        layers = adapter.layers
        self.spent = [Spent(counter, layer) for layer in layers]
        self.ahead = [0] * len(layers)
        self.attention: list[Attention | None] = [None] * len(layers)
        cache = DynamicCache(config=adapter.config.get_text_config(decoder=True))
        with ExitStack() as stack:
            for i, layer in enumerate(layers):
                hearing = Hearing([*layer.modules()], partial(self._heard, i))
                for hook in (hearing, self.spent[i]):
                    stack.callback(hook.remove)
            forward(past_key_values=cache, use_cache=True)
        self.flops = [spent.total for spent in self.spent]
        rows = _carried([0 if a is None else a.heads * a.head_dim for a in self.attention])
        self.ahead = [spent + 2 * n * row for spent, row in zip(self.ahead, rows, strict=True)]
        held = [_numbers(each) for each in cache.layers]
        self.cached = (held + [0] * len(layers))[: len(layers)]

    @classmethod
    def of(cls, adapter: Any, counter: Counting, n: int) -> _Run:
        """A run of the decoder on ids, or on embeddings, or of the whole model: the first that can.

        Some decoders look more up than embeddings, which they would else search for the ids.
        """
        ids = torch.full((1, n), _plain_id(adapter.config))
        embeds = blank(1, n, adapter.model.get_input_embeddings().weight.shape[-1])
        ways = (
            partial(adapter.decoder, input_ids=ids),
            partial(adapter.decoder, inputs_embeds=embeds),
        )
        for way in ways:
            with suppress(Exception):
                return cls(adapter, counter, n, way)
        return cls(adapter, counter, n, partial(adapter.model, input_ids=ids))

    def _heard(self, i: int, query: Tensor, key: Tensor, options: dict) -> None:
        if self.attention[i] is None:
            sizes = query.shape[1], key.shape[1], query.shape[3]
            scaling, sinks = options.get("scaling"), options.get("s_aux") is not None
            scaling = query.shape[3] ** -0.5 if scaling is None else float(scaling)
            self.attention[i] = Attention(*sizes, scaling, options.get("softcap"), sinks)
            self.ahead[i] = self.spent[i].so_far()


def _carried(sizes: list[int]) -> list[int]:
    """Each size; in place of a 0 the last size before it."""
    last = 0
    return [last := size or last for size in sizes]


def _numbers(cached: Any) -> int:
    """Numbers that a layer of a KV cache holds of each token, of one sample."""
    states = [x for name, x in vars(cached).items() if name.endswith(("keys", "values"))]
    return sum(x.shape[1] * x.shape[3] for x in states if x is not None and x.ndim == 4)


def _plain_id(config: Any) -> int:
    """An id that stands for nothing special."""
    text = config.get_text_config(decoder=True)
    special = {x for each in (config, text) for x in each.to_dict().values() if isinstance(x, int)}
    return next(i for i in count(3) if i not in special)


@lru_cache(maxsize=64)
def measured(blueprint: Blueprint) -> Decoder:
    """What the decoder of a model does and costs, from its blueprint.

    Raises ValueError if the model cannot be built or run.
    """
    adapter = blueprint.adapter()
    with blueprint.explained(), counting() as counter:
        runs = {n: _Run.of(adapter, counter, n) for n in LENGTHS}
        found = {name: _rules(runs, name) for name in ("flops", "ahead")}
        if any(None in rules for rules in found.values()):
            runs.update((n, _Run.of(adapter, counter, n)) for n in MORE)
            found = {name: _rules(runs, name, CHUNKS) for name in found}
    for name, rules in found.items():
        if None in rules:
            warnings.warn(
                f"FLOPs of layer {rules.index(None)} of {blueprint.model_class.__name__} follow no "
                "rule that is known here: they are estimates",
                stacklevel=2,
            )
            longest = {n: runs[n] for n in sorted(runs)[-3:]}
            near = _rules(longest, name)
            found[name] = [b if a is None else a for a, b in zip(rules, near, strict=True)]
    some = runs[LENGTHS[0]]
    growth = {name: Growth(rules) for name, rules in found.items()}
    return Decoder(tuple(some.attention), **growth, cached=torch.tensor(some.cached))


def _rules(runs: dict[int, _Run], name: str, chunks: Sequence[int] = ()) -> list[Any]:
    """The rule of each layer's `name`, "flops" or "ahead"; None where there is none."""
    find = cache(lambda found: find_rule(dict(zip(runs, found, strict=True)), chunks))
    return [find(row) for row in zip(*(getattr(run, name) for run in runs.values()), strict=True)]
