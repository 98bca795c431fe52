"""Shared prefixes: forward passes that differ only from some layer on begin at that layer.

Until the first layer that drops tokens, a pruned model computes what the full model computes. So
the output of the layer before is kept, and given again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ._hooks import Replaced
from .forward import answer_logits


class _Reached(Exception):
    """The output is known. The rest of the forward pass is not needed."""


class Prefix:
    """What the first layers of the full model make of one batch.

    adapter: of the model, in evaluation mode. batch: a `vispco.calibration.PreparedBatch`.
    layers: how many layers are known, from the first on.
    """

    def __init__(self, adapter: Any, batch: Any):
        self.adapter, self.batch = adapter, batch
        self.layers = 0
        self._output: Any = None

    @torch.no_grad()
    def advance(self, layers: int) -> None:
        """Know the first `layers` layers."""
        if layers <= self.layers:
            return

        def reached(module: Any, args: Any, output: Any) -> None:
            self._output = tree_map_only(Tensor, lambda x: x.cpu(), output)
            raise _Reached

        hook = self.adapter.layers[layers - 1].register_forward_hook(reached)
        try:
            with self.replayed(self.layers):
                answer_logits(self.adapter.model, self.batch)
        except _Reached:
            pass
        finally:
            hook.remove()
        self.layers = layers

    @contextlib.contextmanager
    def replayed(self, layers: int) -> Iterator[None]:
        """In the block, forward passes of the batch begin after the first `layers` layers.

        Raises ValueError unless these are the layers that are known, or none.
        """
        if layers not in (0, self.layers):
            raise ValueError(f"{self.layers} layers are known, asked for {layers}")
        with contextlib.ExitStack() as stack:
            for i, layer in enumerate(self.adapter.layers[:layers]):
                hook = Replaced(layer, "forward", self._last if i == layers - 1 else _nothing)
                stack.callback(hook.remove)
            yield

    def _last(self, call: Any, given: dict) -> Any:
        device = next(x for x in given.values() if isinstance(x, Tensor)).device
        return tree_map_only(Tensor, lambda x: x.to(device), self._output)


def _nothing(call: Any, given: dict) -> Any:
    """A layer's hidden states as they came. Nobody will read them."""
    return given.get("hidden_states", next(iter(given.values())))
