"""Deploy: dropped tokens leave the hidden states, the rotary embeddings, the masks and the cache.

The tokens that remain are gathered before each layer, and put back at their original positions
after it. Between layers, the decoder sees the original sequence, with zeros for dropped tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cache as kv
from ._masks import Packed, pack, prefill_mask
from .context import take, take_rotary
from .pruner import Pruner


class Dropping(Pruner):
    """Drops tokens physically."""

    def enter(self, i: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        """The tokens that remain (B, K, D), and arguments for them alone."""
        state, cache = self.state, kwargs.get("past_key_values")
        if state.packed is not None:
            hidden = take(hidden, state.packed.order)
        target = state.target(i)
        if target is not None:
            hidden = self._drop(i, hidden, kwargs, target)
        if state.packed is None:
            return hidden, {}
        if cache is not None:
            kv.shorten(cache, i, state.packed)
        return hidden, self._packed_arguments(kwargs, state.packed)

    def leave(self, hidden: Tensor) -> Tensor:
        """A layer's output at the original positions (B, S, D)."""
        packed = self.state.packed
        return hidden if packed is None else packed.restore(hidden)

    def _drop(self, i: int, hidden: Tensor, kwargs: dict, target: list[int]) -> Tensor:
        """The hidden states of the visual tokens that are chosen, and of the text."""
        state, prompt = self.state, self.state.prompt
        hidden, context, _, chosen = state.choose(i, hidden, kwargs, target)
        # Text stays, padding goes.
        keep = context.present & ~context.visual_mask
        keep = keep | torch.zeros_like(keep).scatter(1, context.visual[1], chosen)
        if any(prompt.tail):
            # Generation reads the last column, padding or not.
            keep[:, -1] = True
        samples = zip(prompt.n_real, prompt.n_visual, state.left, prompt.tail, strict=True)
        lengths = [real - visual + left + tail for real, visual, left, tail in samples]
        index, dense = pack(keep, max(lengths)), len(set(lengths)) == 1
        state.packed = Packed(
            order=take(context.order, index),
            valid=take(keep, index),
            length=prompt.visual.shape[1],
            dense=dense,
            plain=dense and prompt.plain and not any(prompt.tail),
        )
        self.steps[i], state.memo = state.packed, {}
        return take(hidden, index)

    def _packed_arguments(self, kwargs: dict, packed: Packed) -> dict:
        """Rotary embeddings, mask and position ids of the packed tokens.

        Each layer is given those of the original sequence. Many layers share them.
        """
        rotary, mask = kwargs["position_embeddings"], kwargs.get("attention_mask")
        ids = kwargs.get("position_ids")
        memo, key = self.state.memo, (id(rotary[0]), id(mask))
        if key not in memo:
            memo[key] = {
                "position_embeddings": take_rotary(rotary, packed.order),
                "attention_mask": prefill_mask(mask, packed),
                "position_ids": None if ids is None else take(ids, packed.order),
            }
        return memo[key]
