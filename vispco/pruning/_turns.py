"""Later turns of a conversation: a prompt with pictures, after others in the same KV cache.

Earlier turns stay as they are. The visual tokens that come are ranked by the last token of their
own turn, which sees all that the cache holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._cache import DynamicLayer, Memory, Shortened, held_keys, mark
from ._masks import Packed

REFUSAL = (
    "visual tokens after the first forward pass (a second image in a running conversation) can be "
    "pruned only in deploy, and on a KV cache of ordinary layers: start again from the whole prompt"
)


def goes_on(cache: Any, adapter: Any) -> bool:
    """Whether pictures of a later turn can be pruned on this cache, which is filled.

    Not where layers hold anything but the keys of all that entered them.
    """
    kinds = (type(layer).__mro__[2 * isinstance(layer, Shortened)] for layer in cache.layers)
    memory = getattr(cache, "vispco", None)
    borrowed = memory is not None and memory.borrowed
    plain = all(kind is DynamicLayer for kind in kinds) and len(cache.layers) == len(adapter.layers)
    return plain and not borrowed and not any(map(adapter.counts, range(len(adapter.layers))))


def later_turn(
    cache: Any, inputs: dict, given: Tensor
) -> tuple[Memory, int, Callable[[int], Packed]]:
    """The cache's memory, how many tokens came before, and what each layer holds of them.

    given: ids or embeddings of the turn.
    """
    memory = getattr(cache, "vispco", None)
    if memory is None:
        # Filled by somebody else: a prefix.
        memory = cache.vispco = Memory()
        mark(cache, 0)
    past, mask = int(cache.get_seq_length()), inputs.get("attention_mask")
    real = torch.ones(len(given), past, dtype=torch.bool, device=given.device)
    if mask is not None and mask.ndim == 2:
        real = mask[:, :past].bool()
    return memory, past, partial(held, cache, real=real)


def held(cache: Any, i: int, real: Tensor) -> Packed:
    """What layer i holds of the tokens so far, of which `real` (B, S) are no padding."""
    width, packed = held_keys(cache.layers[i], 0), cache.vispco.packed.get(i)
    if packed is None:
        return Packed.everything(real)
    order, valid = packed.continued(width), packed.valid[:, :width]
    valid = nn.functional.pad(valid, (0, width - valid.shape[1]), value=True)
    return Packed(order, valid & real.gather(1, order), real.shape[1], dense=False, plain=False)
