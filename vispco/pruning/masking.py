"""Search: tokens stay; masked keys are renormalised away, and gradients reach the keep ratios straight through."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from typing import Any

import torch
from torch import Tensor

from ..relaxation import hard_mask
from ..ste import Estimator, build_estimator
from ._attention import SoftMask
from .forward import token_losses
from .prompt import merged
from .pruner import Pruner


class Masking(Pruner):
    """Masks tokens; the same logits at the kept positions as if they were dropped.

    estimator: of the gradient in the keep ratios, see `vispco.ste`.
    """

    everywhere = True  # also where nothing is dropped, the gradient asks what if

    def __init__(self, adapter, method, ratios: Tensor, estimator: str | Mapping | Estimator | None = None):
        super().__init__(adapter, method, ratios)
        self.estimator = build_estimator(estimator)

    def run(self, batch: Any, ratios: Tensor | None = None, seed: int = 0) -> Tensor:
        """See `Pruner.run`."""
        self.estimator.reseed(seed)
        return super().run(batch, ratios, seed)

    def losses(self, batch: Any, ratios: Tensor | None = None, seed: int = 0, objective: str = "kl") -> Tensor:
        """The objective at each of the batch's answer tokens (A,), in nats (`vispco.pruning.forward.token_losses`).

        Their gradient is bounded in the backward pass: that by a token's mask never exceeds what its sample contributes to
        the loss, `sum over its answer tokens of losses_a dloss/dlosses_a` (see `vispco.pruning._attention.Bound`).
        Other arguments and errors as of `run`.
        """
        losses = token_losses(self.run(batch, ratios, seed), batch, objective)
        if losses.requires_grad:
            value, rows, bound = losses.detach(), batch.rows.to(losses.device), self.prefill.bound
            losses.register_hook(partial(bound.set, value, rows, len(batch)))
        return losses

    def _prunes(self) -> bool:
        return self.ratios.requires_grad or super()._prunes()

    def enter(self, i: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        """All tokens, and a mask that hides the dropped ones."""
        state, method = self.prefill, self.method
        flows = self.ratios.requires_grad and torch.is_grad_enabled()
        target = state.target(i)
        if (target is not None or flows) and i >= method.first_layer and any(state.n_visual):
            with torch.no_grad():
                context = state.context(i, hidden, kwargs, target or state.left, self.adapter, exhaustive=True)
                scores, state.left = state.rank(method, context, target or state.left)
                chosen = hard_mask(scores, context.keep, context.valid)
                into = method.merge(context, chosen) if target is not None else None
            hidden = merged(hidden, context, chosen, into)
            keep = self.ratios[..., i].to(hidden.device) * context.n_visual
            weight = None if state.policy is None else state.policy[context.visual]
            m = self.estimator(scores, keep, context.keep, context.valid, weight)  # (B, V)
            if m.requires_grad and self.estimator.clip:
                m.register_hook(state.bound)
            m = m.where(state.visual[context.visual], 1.0)  # filler slots point at text, which stays
            policy = torch.ones_like(m[:, :1]).expand(hidden.shape[:2]).scatter(1, context.visual[1], m)
            state.policy = policy if state.policy is None else state.policy * policy
            state.steps[i] = state.policy.detach()
            self._memo = {}
        state.rotary = kwargs["position_embeddings"]
        if state.policy is None:
            return hidden, {}
        mask = kwargs.get("attention_mask")
        if id(mask) not in self._memo:
            self._memo[id(mask)] = {"attention_mask": SoftMask.of(mask, state.policy, hidden.dtype, state.plain)}
        return hidden, self._memo[id(mask)]
