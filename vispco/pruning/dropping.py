"""Deploy: dropped tokens leave the hidden states, the rotary embeddings, the masks and the KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .context import take, take_rotary
from ..relaxation import hard_mask
from . import _cache as kv
from ._masks import Packed, pack, prefill_mask
from .prompt import merged
from .pruner import Pruner


class Dropping(Pruner):
    """Drops tokens physically."""

    def enter(self, i: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        """The tokens that remain."""
        state, cache = self.prefill, kwargs.get("past_key_values")
        target = state.target(i)
        if target is not None:
            hidden = self._drop(i, hidden, kwargs, target)
        if state.packed is None:
            state.rotary = kwargs["position_embeddings"]
            return hidden, {}
        if cache is not None:
            kv.shorten(cache, i, state.packed)
        changed = self._packed_inputs(kwargs)
        state.rotary = changed["position_embeddings"]
        return hidden, changed

    def _drop(self, i: int, hidden: Tensor, kwargs: dict, target: list[int]) -> Tensor:
        """Rank, choose, merge and gather: the hidden states of the tokens that remain."""
        state, method = self.prefill, self.method
        context = state.context(i, hidden, kwargs, target, self.adapter, exhaustive=False)
        scores, target = state.rank(method, context, target)
        chosen = hard_mask(scores, context.keep, context.valid, check=False)  # (B, V)
        hidden = merged(hidden, context, chosen, method.merge(context, chosen))
        keep = context.present & ~context.visual_mask  # text stays, padding goes
        keep = keep | torch.zeros_like(keep).scatter(1, context.visual[1], chosen)
        if any(state.tail):  # but generation reads the last column, padding or not
            keep[:, -1] = True
        lengths = [n - v + t + tail for n, v, t, tail in zip(state.n_real, state.n_visual, target, state.tail)]
        index, dense = pack(keep, max(lengths)), len(set(lengths)) == 1
        state.packed = Packed(take(context.order, index), take(keep, index), state.visual.shape[1], dense,
                              plain=dense and state.plain and not any(state.tail))
        state.steps[i], state.left = state.packed, target
        self._memo = {}
        return take(hidden, index)

    def _packed_inputs(self, kwargs: dict) -> dict:
        """Rotary embeddings, mask and position ids of the packed tokens; each layer is given the originals."""
        packed = self.prefill.packed
        rotary, mask, ids = kwargs["position_embeddings"], kwargs.get("attention_mask"), kwargs.get("position_ids")
        key = (id(rotary[0]), id(mask))
        if key not in self._memo:
            self._memo[key] = {"position_embeddings": take_rotary(rotary, packed.order),
                               "attention_mask": prefill_mask(mask, packed),
                               "position_ids": None if ids is None else take(ids, packed.order)}
        return self._memo[key]
