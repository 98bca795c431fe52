"""The hooks on a decoder's layers, and where its attention is heard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..reading.hearing import Hearing
from . import _cache as kv
from ._arguments import bound, flat, packed_arguments, unrotating
from ._hooks import Handle
from ._masks import Packed
from .context import Heard


class _Reached(BaseException):
    """A layer has come to its attention, and need not go on."""


class LayerHooks(Handle):
    """What enters each layer of a prompt, and what leaves it.

    Subclasses say so in `enter` and `leave`.
    """

    def __init__(self, adapter: Any):
        super().__init__(adapter.model)
        self.adapter = adapter
        # `state.PassState` of the forward pass of a prompt that is going on, else None.
        self.state: Any = None
        # `_cache.Memory` of the KV cache of the forward pass that is going on.
        self._memory: Any = None
        # The hooks on the layers, and what they were made for.
        self._layer_hooks: list = []
        self._attached: tuple | None = None
        # What takes queries and keys instead of the state, while a layer runs ahead.
        self._instead: Callable | None = None

    def enter(self, i: int, hidden: Tensor, given: dict) -> tuple[Tensor, dict]:
        """What goes into layer i of a prompt, of the decoder's states (B, S, D).

        given: the layer's other arguments, by name. Second result: those of them that change.
        """
        raise NotImplementedError

    def enter_few(self, i: int, hidden: Tensor, given: dict) -> tuple[Tensor, dict]:
        """As `enter`, of a layer that only the last tokens (B, Q, D) enter; they leave as usual."""
        return hidden, {}

    def leave(self, i: int, hidden: Tensor) -> Tensor:
        """What the decoder gets (B, S, D), of the output of layer i."""
        return hidden

    def remove(self) -> None:
        """Take the hooks out; the model is as before. Calling it twice is harmless."""
        self._detach()
        super().remove()

    # ---- hooks in, hooks out --------------------------------------------------------------------
    def _detach(self) -> None:
        while self._layer_hooks:
            self._layer_hooks.pop().remove()
        self._attached = None

    def _attach(self, decoding: bool, masks: bool = False) -> None:
        """Put the hooks of a prompt's pass, or of decoding, on the layers.

        Decoding mostly needs one hook only. It looks whether there are `masks` to change, and only
        then all layers have one.
        """
        layers, add = self.adapter.layers, self._layer_hooks.append
        # PEFT may have put others there.
        projections = [] if decoding else list(map(self.adapter.key_projection, range(len(layers))))
        if self._attached in ((decoding, masks, projections), (decoding, True, projections)):
            return
        self._detach()
        self._attached = (decoding, masks, projections)
        if decoding and not masks:
            add(layers[0].register_forward_pre_hook(self._on_watch, with_kwargs=True))
            return
        run = self._decode if decoding else self._prefill
        for i, layer in enumerate(layers):
            on_layer = partial(self._on_layer, i, run)
            add(layer.register_forward_pre_hook(on_layer, with_kwargs=True))
            if decoding:
                continue
            # First of all hooks, so that others see the original length.
            add(layer.register_forward_hook(partial(self._on_left, i), prepend=True))
            if projections[i] is not None:
                add(projections[i].register_forward_hook(self._on_projection))
            add(Hearing(layer.modules(), partial(self._on_heard, i)))

    def _attach_compiled(self, compiled: Any) -> None:
        """Put the hooks of compiled decoding on the layers, in place of all others."""
        if self._attached != (compiled,):
            self._detach()
            self._attached = (compiled,)
            self._layer_hooks.extend(compiled.hooks())

    def _on_watch(self, module, args, kwargs):
        if not self._memory:
            return None
        self._memory.inside = True
        if self._memory.changes(*bound(module, args, kwargs), self.adapter):
            self._attach(decoding=True, masks=True)
            return self._on_layer(0, self._decode, module, args, kwargs)
        return None

    def _on_projection(self, module, args, output):
        # Without a state, a layer runs again for its gradient.
        if self.state is not None and self._instead is None:
            self.state.projected = output

    def _on_heard(self, i: int, query: Tensor, key: Tensor, options: dict) -> dict | None:
        if query.ndim != 4:
            return None
        if self._instead is not None:
            self._instead(query, key, options)
        elif self.state is not None:
            if i in self.state.heeded:
                # A static cache hands out its empty places, too.
                whole = self.state.few or self.state.held is not None
                key = key if whole else key[:, :, : query.shape[2]]
                ran = self.state.ran
                again = None if ran is None else partial(self._unrotated, i, *ran)
                self.state.hear(i, query, key, options, again)
            if self.state.flash and self.state.packed is not None and "position_ids" in options:
                # Rotary embedding is done. Gaps would be read as the ends of prompts.
                return {"position_ids": None}
        return None

    def _on_layer(self, i: int, run: Callable, module, args, kwargs):
        hidden, given = run(i, *bound(module, args, kwargs))
        return (hidden,), given

    def _on_left(self, i: int, module, args, output):
        if self.state is None:
            return output
        # Some layers give a tuple, all of them in older releases of transformers.
        hidden = output[0] if isinstance(output, tuple) else output
        if self.state.few:
            return output
        states, back = flat(hidden, *self.state.entered)
        left = back(self.leave(i, states))
        return (left, *output[1:]) if isinstance(output, tuple) else left

    # ---- one layer ------------------------------------------------------------------------------
    def _prefill(self, i: int, hidden: Tensor, given: dict) -> tuple[Tensor, dict]:
        if self.state is None:
            raise ValueError(
                "a layer of a pruned model ran outside of the model's forward pass; gradient "
                "checkpointing does so before transformers 5.23: update it, or switch "
                "checkpointing off"
            )
        state, cache = self.state, given.get("past_key_values")
        hidden, state.back = flat(hidden, *state.prompt.visual.shape)
        if i == 0:
            state.embeddings = hidden
            visual = any(state.prompt.n_visual)
            if not self._memory and cache is not None and (visual or hasattr(cache, "vispco")):
                self._memory = kv.claim(cache)
        if self._memory:
            self._memory.inside = True
        given, state.projected = state.follow(hidden.device, given), None
        state.mask, state.rotary = given.get("attention_mask"), given.get("position_embeddings")
        state.held = None if state.before is None else state.before(i)
        state.few = hidden.shape[1] < state.prompt.visual.shape[1]
        enter = self.enter_few if state.few else self.enter
        hidden, changed = enter(i, hidden, given)
        state.entered, changed = hidden.shape[:2], {**given, **changed}
        state.ran = (hidden.detach(), changed) if state.method.reads_unrotated else None
        return state.back(hidden), changed

    def _decode(self, i: int, hidden: Tensor, given: dict) -> tuple[Tensor, dict]:
        if not self._memory:
            return hidden, given
        self._memory.inside = True
        return hidden, {**given, **self._memory.decoding(i, hidden, given, self.adapter)}

    def _packed(self, i: int, given: dict, packed: Packed) -> dict:
        """The arguments of layer i for the tokens that remain, which are not to be changed.

        given: as `state.follow` gives them. Layers that are given the same share the result.
        """
        # To FlashAttention, as to layers without attention, no mask means that every token counts.
        causal = self.adapter.attends(i) and not self.state.flash
        counts, memo = self.adapter.counts(i), self.state.memo
        key = ("packed", id(given), id(packed), causal, counts)
        if key not in memo:
            changed = packed_arguments(given, packed, causal, memo)
            if counts:
                places = torch.arange(packed.order.shape[1], device=packed.order.device)
                changed["position_ids"] = places.expand_as(packed.order)
            # Holds what was given, too: its number must not be given to another.
            memo[key] = given, packed, changed
        return memo[key][-1]

    def _ahead(self, i: int, hidden: Tensor, given: dict, rotary: bool = True) -> Heard | None:
        """Queries and keys that layer i makes of `hidden` (B, N, D): it runs up to its attention.

        None if the layer has none. rotary: False: without rotary positions.
        """
        if not self.adapter.attends(i):
            return None
        if self.state.packed is not None:
            given = {**given, **self._packed(i, given, self.state.packed)}
        return self._up_to_attention(i, hidden, given, rotary)

    def _unrotated(self, i: int, hidden: Tensor, given: dict) -> tuple[Tensor, Tensor]:
        """Queries and keys of layer i once more, of what entered it, without rotary positions."""
        heard: Any = self._up_to_attention(i, hidden, given, rotary=False)
        return heard.query, heard.key

    @torch.no_grad()
    def _up_to_attention(self, i: int, hidden: Tensor, given: dict, rotary: bool) -> Heard | None:
        state, layer, heard = self.state, self.adapter.layers[i], []
        # What other layers read is not written to.
        cache: Any = given.get("past_key_values")
        given = {name: None if name == "past_key_values" else x for name, x in given.items()}
        if given.get("shared_kv_states") is not None:
            given["shared_kv_states"] = dict(given["shared_kv_states"])
        if not rotary:
            given["position_embeddings"] = unrotating(given.get("position_embeddings"))
        if state.held is not None:
            # No more than its attention's inputs is asked for.
            given["attention_mask"] = None

        def reached(query: Tensor, key: Tensor, options: dict) -> None:
            # The layer may be on another device than what enters it.
            query, key, value = (x.to(hidden.device) for x in (query, key, options["value"]))
            found = replace(state.heard_by(i, query, key, options, None), value=value)
            if state.held is not None:
                found.past = (cache.layers[i].keys.to(hidden.device), state.held)
            heard.append(found)
            raise _Reached

        self._instead = reached
        try:
            # Not a call of the layer, whose hooks are ours.
            layer.forward(state.back(hidden), **given)
        except _Reached:
            pass
        finally:
            self._instead = None
        return heard[0] if heard else None
