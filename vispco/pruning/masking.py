"""Search: tokens stay, masked keys are renormalised away, and gradients reach the keep ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ste import Estimator, build_estimator
from ._attention import Bound, SoftMask
from ._masks import Packed
from .context import Heard
from .forward import token_losses
from .pruner import Pruner


class Masking(Pruner):
    """Masks tokens. At the kept positions, the logits are those of dropping the others.

    estimator: of the gradient in the keep ratios: a name, or a dict of options (see `vispco.ste`).
    """

    # Where nothing is dropped, the gradient asks what if.
    exhaustive = True

    def __init__(
        self,
        adapter: Any,
        method: Any,
        ratios: Tensor,
        estimator: str | Mapping[str, Any] | Estimator | None = None,
    ):
        super().__init__(adapter, method, ratios)
        self.estimator = build_estimator(estimator)
        # Of the last pass: the estimator's function, and the bound of its tokens' gradients.
        self.estimate: Callable[..., Tensor]
        self.bound = Bound()
        # Of a layer that runs on the tokens that are left: what all had before, and which are left.
        self._whole: tuple[Tensor, Packed] | None = None

    def losses(
        self, batch: Any, ratios: Tensor | None = None, seed: int = 0, objective: str = "kl"
    ) -> Tensor:
        """The objective at each answer token of the batch (A,), in nats (`forward.token_losses`).

        The backward pass bounds the gradient by each token's mask. It never exceeds what the
        token's sample contributes to the loss, which is the sum over the sample's answer tokens of
        losses_a dloss/dlosses_a (see `vispco.pruning._attention.Bound`).
        Other arguments and errors as in `run`.
        """
        losses = token_losses(self.run(batch, ratios, seed), batch, objective)
        if losses.requires_grad:
            rows = batch.rows.to(losses.device)
            losses.register_hook(partial(self.bound.set, losses.detach(), rows, len(batch)))
        return losses

    def _prunes(self) -> bool:
        return self.ratios.requires_grad or super()._prunes()

    def _start(self, inputs: dict, past: int = 0, before: Any = None) -> None:
        super()._start(inputs, past, before)
        self.estimate, self.bound = self.estimator.start(self._seed), Bound()

    def enter(self, i: int, hidden: Tensor, given: dict) -> tuple[Tensor, dict]:
        """All tokens, and a mask that hides the dropped ones.

        In a layer that no mask can hide them from, the tokens that are left alone.
        """
        state, self._whole = self.state, None
        flows = self.ratios.requires_grad and torch.is_grad_enabled()
        target = state.target(i)
        drops = target is not None or flows
        if drops and i >= self.first_layer and any(state.prompt.n_visual):
            hidden = self._mask(i, hidden, given, target)
        if state.policy is None:
            return hidden, {}
        if not self.adapter.masks(i):
            alone, changed = self._alone(i, hidden, given)
            self._whole = hidden, state.alone
            return alone, changed
        mask = given.get("attention_mask")
        if id(mask) not in state.memo:
            soft = SoftMask.of(mask, state.policy, hidden.dtype, state.prompt.plain)
            # Holds the mask, too: its number must not be given to another.
            state.memo[id(mask)] = mask, {"attention_mask": soft}
        return hidden, state.memo[id(mask)][1]

    def leave(self, i: int, hidden: Tensor) -> Tensor:
        """A layer's output for all tokens (B, S, D); those that it did not see are as before."""
        if self._whole is None:
            return hidden
        whole, alone = self._whole
        heard = self.state.heard
        if heard is not None and heard.query.shape[2] == hidden.shape[1]:
            self.state.heard = heard.moved(alone.restore)
        return alone.restore(hidden, whole)

    def _ahead(self, i: int, hidden: Tensor, given: dict, rotary: bool = True) -> Heard | None:
        if self.state.policy is None or self.adapter.masks(i):
            return super()._ahead(i, hidden, given, rotary)
        alone, changed = self._alone(i, hidden, given)
        heard = super()._ahead(i, alone, {**given, **changed}, rotary)
        return heard and heard.moved(self.state.alone.restore)

    def _alone(self, i: int, hidden: Tensor, given: dict) -> tuple[Tensor, dict]:
        """The tokens that are left, and a layer's arguments for them, as in deploy."""
        state = self.state
        if state.alone is None:
            state.alone, _ = state.pack((state.policy > 0) & state.prompt.real)
        hidden = state.alone.without_fillers(state.alone.gather(hidden))
        return hidden, self._packed(i, given, state.alone)

    def _mask(self, i: int, hidden: Tensor, given: dict, target: list[int] | None) -> Tensor:
        """Multiply the mask of this layer into the policy; returns the hidden states, merged."""
        state = self.state
        ahead = partial(self._ahead, i, hidden, given)
        hidden, context, scores, _ = state.choose(i, hidden, target, ahead)
        policy = state.policy
        weight = torch.ones_like(scores) if policy is None else policy[context.visual]
        keep = self.ratios[..., i].to(hidden.device) * context.n_visual
        mask = self.estimate(scores, keep, context.keep, context.valid, weight)  # (B, V)
        if mask.requires_grad and self.estimator.clip:
            mask.register_hook(self.bound)
        # Slots of filler point at text, which stays.
        mask = mask.where(state.prompt.visual[context.visual], 1.0)
        ones = torch.ones_like(mask[:, :1]).expand(hidden.shape[:2])
        mask = ones.scatter(1, context.visual[1], mask)  # (B, S)
        state.policy = mask if policy is None else policy * mask
        self.steps[i], state.memo, state.alone = state.policy.detach(), {}, None
        return hidden
