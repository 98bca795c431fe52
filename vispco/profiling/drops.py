"""Single drops: what is lost if n tokens stay from layer k on, and what it takes to measure it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..pruning._prefix import Prefix
from ..pruning.dropping import Dropping
from ..pruning.forward import answer_logits, during, token_losses
from ..utils.distributed import gathered, total
from ..utils.journal import Journal


class Drops:
    """Measures single drops, and counts the forward passes.

    methods: {name: method}. first_layers: the first layer that each can prune.
    """

    def __init__(self, adapter, methods, prepared, objective, journal: Journal, callback=None):
        self.adapter, self.prepared, self.journal = adapter, list(prepared), journal
        self.objective, self.callback = objective, callback
        full = torch.ones(len(adapter.layers))
        self.pruners = {name: Dropping(adapter, each, full) for name, each in methods.items()}
        self.first_layers = {name: each.first_layer for name, each in self.pruners.items()}
        self.layers = len(adapter.layers)
        most = max(int(batch.n_visual.max()) for batch in prepared)
        self.tokens = int(gathered(torch.tensor([most])).max())
        self.samples = total(sum(map(len, prepared)))
        self.prefixes = [Prefix(adapter, batch) for batch in prepared]
        self.full = self._gathered(lambda i: self.prepared[i].log_probs)
        # Whether passes share their first layers. To know it takes about two passes of one batch.
        self.shares = journal.recall({"shares": len(prepared)}, self._shares)
        self.passes = 2.0 * total(len(prepared[0]))
        # The layers of the prefixes that have been counted.
        self._known = [0] * len(prepared)

    def losses(self, layer: int, tokens: int, name: str, part: int | None = None) -> list[float]:
        """The loss at each answer token, `tokens` kept from `layer` on.

        name: of the method. part: of how many batches, the first ones; None: all.
        """
        batches = range(len(self.prepared))[:part]
        asked = {"layer": layer, "tokens": tokens, "method": name, "batches": len(batches)}
        with during(f"{name}, layer {layer}, {tokens} tokens"):
            make = partial(self._measure, layer, tokens, name, batches)
            losses = self.journal.recall(asked, make)
        begin = self._begin(layer)
        for i in batches:
            layers = self.layers - min(begin, self._known[i])
            self.passes += total(len(self.prepared[i])) * layers / self.layers
            self._known[i] = max(begin, self._known[i])
        if self.callback:
            self.callback({**asked, "loss": sum(losses) / len(losses)})
        return losses

    def _measure(self, layer: int, tokens: int, name: str, batches: Sequence[int]) -> list[float]:
        ratios = torch.ones(self.layers, dtype=torch.float64)
        ratios[layer:] = tokens / self.tokens
        begin, pruner = self._begin(layer), self.pruners[name]

        def logits(i: int) -> Tensor:
            self.prefixes[i].advance(begin)
            with self.prefixes[i].replayed(begin):
                return pruner.run(self.prepared[i], ratios)

        with pruner:
            return self._gathered(logits, batches)

    def _begin(self, layer: int) -> int:
        """Where a pass may begin: at the last attention before the drop, which methods may read."""
        before = [i for i in range(layer) if self.adapter.attends(i)]
        return before[-1] if before and self.shares else 0

    def _shares(self) -> bool:
        """Whether a pass that begins in the middle gives the full model's answers, to the bit.

        Not where later layers read more of the earlier ones than the hidden states.
        """
        batch, prefix = self.prepared[0], Prefix(self.adapter, self.prepared[0])
        try:
            for layers in sorted({self.layers // 2, self.layers - 1} - {0}):
                prefix.advance(layers)
                with torch.no_grad(), prefix.replayed(layers):
                    found = answer_logits(self.adapter.model, batch).log_softmax(-1)
                if not torch.equal(found, batch.log_probs):
                    return False
        except Exception:
            # Some layer misses what others left for it.
            return False
        return True

    @torch.no_grad()
    def _gathered(
        self, logits: Callable[[int], Tensor], batches: Sequence[int] | None = None
    ) -> list[float]:
        """The losses of all processes at the answer tokens of some batches; None: of all."""
        numbers = range(len(self.prepared)) if batches is None else batches
        found = [token_losses(logits(i), self.prepared[i], self.objective) for i in numbers]
        losses = gathered(torch.cat(found).cpu()).clamp(min=0)
        return [round(loss, 6) for loss in losses.tolist()]
