"""A decoder layer's arguments: bound by name, and gathered for the tokens that remain.

Families hand their layers different things: masks of several kinds, rotary embeddings as a pair, as
one complex tensor or not at all, positions in three rows, inputs of each layer. What is indexed by
the tokens of the sequence is told by its shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ._implementations import is_function, packed_function
from ._masks import Packed, prefill_mask
from .context import take

#: Arguments that all layers share and write to: not the tokens' own.
SHARED = {"past_key_values", "shared_kv_states"}


@cache
def parameters(layer: Any) -> tuple[str, ...]:
    """Names of the parameters of a layer's `forward`. The first is the hidden states."""
    return tuple(inspect.signature(layer.forward).parameters)[1:]


def bound(layer: Any, args: tuple, kwargs: dict) -> tuple[Tensor, dict]:
    """The hidden states that a layer is called with, and all its other arguments by name."""
    kind: Any = type(layer)
    names = parameters(kind)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return given.pop(names[0] if names[0] in given else "hidden_states"), given


def flat(hidden: Tensor, batch: int, length: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Hidden states of any layout as (B, S, D), and the way back for any number of tokens.

    Some families keep several streams of states: (B, S, A, D) or (A, B, S, D).

    >>> states, back = flat(torch.zeros(4, 2, 5, 8), batch=2, length=5)
    >>> states.shape, back(states[:, 1:]).shape
    (torch.Size([2, 5, 32]), torch.Size([4, 2, 4, 8]))
    """
    if hidden.ndim == 3:
        return hidden, lambda x: x
    if hidden.shape[:2] == (batch, length):
        kept = hidden.shape[2:]
        return hidden.flatten(2), lambda x: x.unflatten(2, kept)
    streams = (hidden.shape[0], hidden.shape[-1])
    return hidden.permute(1, 2, 0, 3).flatten(2), lambda x: x.unflatten(2, streams).permute(
        2, 0, 1, 3
    )


def unrotating(given: Any) -> Any:
    """Rotary embeddings that turn nothing, in place of those that a layer is `given`.

    Their scale stays, where a family has one.
    Raises ValueError for a layer that is given none.

    >>> cosine, sine = torch.tensor([0.6]), torch.tensor([0.8])
    >>> unrotating((cosine, sine))
    (tensor([1.]), tensor([0.]))
    """
    if isinstance(given, Tensor) and given.is_complex():
        return given.abs().to(given)
    if isinstance(given, tuple | list) and len(given) == 2:
        cosine, sine = given
        return (cosine**2 + sine**2).sqrt(), torch.zeros_like(sine)
    raise ValueError(
        "the method looks past rotary positions, and this model hands its layers none that are "
        "known: use another method, or fastv with rotary=True"
    )


def gathered(x: Tensor, order: Tensor, length: int) -> Tensor:
    """`x` with the places `order` (B, K) of its axis of `length` tokens; else `x` itself.

    That axis follows one of the samples. It may be the first where all samples share `x`, and
    something may come before it: (S, E), (B, S, ...), (A, B, S, ...) or (B, 1, S, ...).
    """
    batch = len(order)
    if x.ndim > 1 and x.shape[1] == length and x.shape[0] in (1, batch):
        return take(x, order)
    if x.ndim == 2 and x.shape[0] == length:
        return x[order]
    if x.ndim < 3 or x.shape[2] != length:
        return x
    if x.shape[1] == batch or (x.shape[1] == 1 and x.shape[0] not in (1, batch)):
        return torch.stack([take(part, order) for part in x])
    return take(x.transpose(1, 2), order).transpose(1, 2)


def packed_arguments(given: dict, packed: Packed, attends: bool, memo: dict) -> dict:
    """A layer's arguments for the tokens that remain.

    given: its arguments for the whole sequence, by name.
    attends: whether no mask means a causal one. To layers without attention it means that every
        token counts.
    memo: what layers share, as long as the same tokens remain.
    """

    def once(key: tuple, x: Any, make: Callable[[], Any]) -> Any:
        if key not in memo:
            # Holds x, too: its number must not be given to another tensor.
            memo[key] = x, make()
        return memo[key][1]

    def mask(x: Any) -> Any:
        if x is None:
            return prefill_mask(None, packed) if attends else _all(packed)
        if is_function(x):
            return packed_function(x, packed)
        if x.ndim == 4:
            return prefill_mask(x, packed)
        x = gathered(x, packed.order, packed.length)
        return x if packed.dense or x.shape != packed.valid.shape else x * packed.valid

    def here(x: Tensor) -> Tensor:
        square = x.ndim == 4 and x.shape[-2:] == (packed.length, packed.length)
        make = mask if square else partial(gathered, order=packed.order, length=packed.length)
        return once(("tensor", id(x)), x, partial(make, x))

    changed = {}
    for name, value in given.items():
        if name == "attention_mask":
            key = ("mask", id(value), attends)
            changed[name] = once(key, value, partial(mask, value))
        elif name == "conv_mask":
            key = ("mask", id(value), False)
            make = partial(_all, packed) if value is None else partial(mask, value)
            changed[name] = once(key, value, make)
        elif name not in SHARED:
            changed[name] = tree_map_only(Tensor, here, value)
    return changed


def _all(packed: Packed) -> Tensor | None:
    """Which of the packed tokens are no fillers (B, K) bool; None: all of them."""
    return None if packed.dense else packed.valid
