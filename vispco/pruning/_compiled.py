"""Compiled decoding after a pruned prompt, in a static KV cache.

What `generate` compiles, it gets from `model.get_compiled_call`. Compiled code does not look
whether hooks have come, so all of it runs as plain PyTorch while a model is pruned. But once the
prompt is in the cache, all that pruning does is to give each layer another mask. So one step of the
decoder is compiled here, with a list of masks, one for each layer, that is made before.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ._cache import is_static
from ._masks import static_mask


class Compiled:
    """The decoder's step under `torch.compile`. One for each pruner.

    on: while `generate` makes a step with what it has compiled.
    """

    def __init__(self, adapter: Any):
        self.adapter, self.on = adapter, False
        # Of the step that is going on: a mask for each layer.
        self.masks: list = []
        self._options: dict | None = None
        self._run: Callable

    def around(self, make: Callable[[], Any], given: dict) -> Callable:
        """In place of `model.get_compiled_call`: what `generate` will decode by."""
        model = self.adapter.model
        options = (given.get("compile_config") or model._default_compile_config()).to_dict()
        if options != self._options:
            # Code of its own: what was compiled for another pruner is never taken for this one's.
            own = types.FunctionType(_step.__code__.replace(), globals())
            self._options, self._run = options, torch.compile(own, **options)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.on = True
            try:
                return model(*args, **kwargs)
            finally:
                self.on = False

        return call

    def hooks(self) -> list:
        """Hooks that hand each layer its mask."""
        return [
            layer.register_forward_pre_hook(partial(_masked, self, i), with_kwargs=True)
            for i, layer in enumerate(self.adapter.layers)
        ]

    def step(self, forward: Callable, masks: list, given: dict) -> Any:
        """The output of the decoder's `forward(**given)`, where the hooks are on its layers."""
        try:
            with torch.compiler.set_stance("default"):
                return self._run(self, masks, forward, given)
        finally:
            self.masks = []

    def masks_of(self, given: dict, memory: Any) -> list | None:
        """The mask of each layer in a step of decoding; None: it is not one that is compiled."""
        adapter, own = self.adapter, given.get("attention_mask")
        cache: Any = given.get("past_key_values")
        if own is None or not memory or memory.borrowed or not all(map(is_static, cache.layers)):
            return None
        made: dict[int, Any] = {}
        masks = []
        for i in range(len(adapter.layers)):
            mask = own.get(adapter.kind(i)) if isinstance(own, dict) else own
            packed = memory.packed.get(i)
            if mask is None or mask.ndim != 4 or adapter.counts(i):
                return None
            if packed is not None:
                if id(packed) not in made:
                    made[id(packed)] = static_mask(mask, packed, cache.layers[i].max_cache_len)
                mask = made[id(packed)]
            masks.append(mask)
        return masks


def _step(compiled: Compiled, masks: list, forward: Callable, given: dict) -> Any:
    compiled.masks = masks
    return forward(**given)


def _masked(compiled: Compiled, i: int, module: Any, args: tuple, kwargs: dict) -> tuple:
    return args, {**kwargs, "attention_mask": compiled.masks[i]}
