"""Deploy: dropped tokens leave the hidden states, the layers' arguments and the cache.

The tokens that remain are gathered before each layer, and put back at their original positions
after it. Between layers, the decoder sees the original sequence, with zeros for dropped tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _cache as kv
from ._implementations import is_function
from ._masks import Packed, decode_mask, prefill_mask, widened
from .context import take
from .pruner import Pruner


class Dropping(Pruner):
    """Drops tokens physically."""

    def enter(self, i: int, hidden: Tensor, given: dict) -> tuple[Tensor, dict]:
        """The tokens that remain (B, K, D), and arguments for them alone."""
        state, cache = self.state, given.get("past_key_values")
        if state.packed is not None:
            hidden = state.packed.gather(hidden)
        target = state.target(i)
        if target is not None:
            hidden = self._drop(i, hidden, given, target)
        if state.held is not None:
            return hidden, self._later(i, given, state.held)
        if state.packed is None:
            return hidden, {}
        changed = self._packed(i, given, state.packed)
        if cache is not None:
            kv.shorten(cache, i, state.packed)
            if kv.is_static(cache.layers[i]):
                mask = self._over_all(changed, cache.layers[i])
                changed = {**changed, "attention_mask": mask}
        return hidden, changed

    def _later(self, i: int, given: dict, held: Packed) -> dict:
        """The arguments of layer i for the tokens of a later turn that remain.

        held: tokens of earlier turns, whose keys the layer holds.
        """
        state, cache = self.state, given["past_key_values"]
        if state.packed is None and i not in cache.vispco.packed:
            return {}
        own, changed = given.get("attention_mask"), {}
        packed = state.packed
        if packed is None:
            packed = Packed.everything(state.prompt.real)
        else:
            changed = self._packed(i, {**given, "attention_mask": None}, packed)
        both = held.followed_by(packed)
        if state.packed is not None:
            kv.shorten(cache, i, both)
        mask = both.valid if state.flash else prefill_mask(own, packed, held)
        return {**changed, "attention_mask": mask}

    def _over_all(self, given: dict, layer: Any) -> Tensor:
        """The mask of the packed tokens over all places of a static layer of the cache."""
        mask, packed = given.get("attention_mask"), self.state.packed
        if is_function(mask):
            raise ValueError(
                "flex attention with a static KV cache cannot be pruned: use the default cache "
                "(leave cache_implementation out), or model.set_attn_implementation('sdpa')"
            )
        if self.state.flash:
            # Leaves out what is behind the mask's end.
            return packed.valid if mask is None else mask
        return widened(mask, packed, kv.held_keys(layer, 0))

    def enter_few(self, i: int, hidden: Tensor, given: dict) -> tuple[Tensor, dict]:
        """The last tokens, which see the tokens that remain among the keys of an earlier layer."""
        packed, cache = self.state.packed, given.get("past_key_values")
        if packed is None:
            return hidden, {}
        if cache is not None:
            kv.shorten(cache, i, packed)
        queries, width = hidden.shape[1], packed.order.shape[1]
        mask = decode_mask(given.get("attention_mask"), packed, queries, width)
        return hidden, {"attention_mask": mask}

    def _few_at_the_end(self) -> bool:
        counts, first = self.state.counts, self.adapter.layers_with_keys
        return all(row == counts[first - 1] for row in counts[first:])

    def leave(self, i: int, hidden: Tensor) -> Tensor:
        """A layer's output at the original positions (B, S, D)."""
        packed = self.state.packed
        return hidden if packed is None else packed.restore(hidden)

    def _drop(self, i: int, hidden: Tensor, given: dict, target: list[int]) -> Tensor:
        """The hidden states of the visual tokens that are chosen, and of the text."""
        state = self.state
        ahead = partial(self._ahead, i, hidden, given)
        hidden, context, _, chosen = state.choose(i, hidden, target, ahead)
        # Text stays, padding goes.
        keep = context.present & ~context.visual_mask
        keep = keep | torch.zeros_like(keep).scatter(1, context.visual[1], chosen)
        state.packed, index = state.pack(keep, context.order)
        self.steps[i], state.memo = state.packed, {}
        if state.heard is not None and not self.adapter.attends(i):
            state.heard = state.heard.moved(partial(take, index=index))
        # Keys that later layers use again are of the tokens that were there.
        shared = given.get("shared_kv_states") or {}
        for kind, states in list(shared.items()):
            shared[kind] = tuple(take(x.transpose(1, 2), index).transpose(1, 2) for x in states)
        return state.packed.without_fillers(take(hidden, index))
