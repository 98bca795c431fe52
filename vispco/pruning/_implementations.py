"""Attention implementations: what each of them takes for a mask, and which of them can be pruned.

sdpa and eager take a mask of numbers, or none: causal. FlashAttention takes one bool a token, and
leaves out what is False. It reads `position_ids` with gaps as several prompts in one row. Flex
attention takes a function of a query and a key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._masks import Packed

#: Implementations that both modes prune.
ANY_MASK = ("sdpa", "eager", None)


def implementation(adapter: Any) -> str | None:
    """How the decoder of an adapter's model computes attention, by transformers' name."""
    return getattr(adapter.decoder.config, "_attn_implementation", "sdpa")


def is_flash(name: str | None) -> bool:
    """Whether an implementation is FlashAttention, of any version and any package."""
    return name is not None and "flash" in name and not name.startswith("paged|")


def check_implementation(adapter: Any, hides: bool) -> None:
    """Raise ValueError for an attention implementation that would not see which tokens are left.

    hides: whether tokens are hidden by a mask of numbers (search), not left out (deploy).
    """
    name = implementation(adapter)
    if name in ANY_MASK:
        return
    if not (is_flash(name) or name == "flex_attention"):
        raise ValueError(
            f"attention implementation {name!r} may take no mask, and would not see which tokens "
            "are left: model.set_attn_implementation('sdpa')"
        )
    if hides:
        raise ValueError(
            f"attention implementation {name!r} takes no mask of numbers, which a search hides "
            "tokens with: search with model.set_attn_implementation('sdpa'), then deploy with any"
        )
    if is_flash(name) and adapter.slides:
        raise ValueError(
            f"attention implementation {name!r} counts a sliding window in the tokens that are "
            "left, not in original positions: model.set_attn_implementation('sdpa')"
        )


def is_function(mask: Any) -> bool:
    """Whether a mask is flex attention's: a function of sample, head, query and key."""
    return hasattr(mask, "mask_mod")


def packed_function(mask: Any, packed: Packed) -> Any:
    """Flex attention's mask of the packed tokens, of the model's own mask for the whole sequence.

    Fillers are seen by nobody, and see themselves.
    """
    own, order, valid = mask.mask_mod, packed.order, packed.valid

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        alive = own(b, h, order[b, q], order[b, k]) & valid[b, k] & valid[b, q]
        return alive | ((q == k) & ~valid[b, q])

    return _made(seen, order.shape[0], order.shape[1], order.shape[1], order.device)


def decoding_function(mask: Any, packed: Packed, queries: int, width: int) -> Any:
    """Flex attention's mask of `queries` new tokens over `width` keys, as `_masks.decode_mask`."""
    own, order, held = mask.mask_mod, packed.continued(width), packed.valid[:, :width]
    valid = nn.functional.pad(held, (0, width - held.shape[1]), value=True)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return own(b, h, q, order[b, k]) & valid[b, k]

    return _made(seen, len(order), queries, width, order.device)


def _made(seen: Any, batch: int, queries: int, keys: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(seen, batch, None, queries, keys, device=device)
