"""Attention masks and packing for sequences whose tokens have been dropped.

Two ways to leave a token out. Packed (deploy): the tokens that remain are gathered, and the model's own mask
with them. Masked (search): all tokens stay and a bias hides the dropped ones; softmax with `log m` added is
softmax with policy (DynamicViT), `m_n exp(a_n) / sum_n' m_n' exp(a_n')`, where each token always sees itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .context import take


@dataclass(eq=False)
class Packed:
    """Which original tokens remain, packed to the right: fillers (dropped tokens) first.

    order: (B, K) original positions. valid: (B, K) bool, False for fillers. length: original length S.
    dense: no sample has fillers (known without looking at the device). plain: dense, no padding remains and
    the model's mask is causal, so that no mask is needed at all.
    """

    order: Tensor
    valid: Tensor
    length: int
    dense: bool
    plain: bool

    def kept(self) -> Tensor:
        """(B, S) bool over original positions."""
        kept = torch.zeros(self.order.shape[0], self.length, dtype=torch.bool, device=self.order.device)
        return kept.scatter(1, self.order, self.valid)

    def restore(self, hidden: Tensor) -> Tensor:
        """Put packed states (B, K, D) back at their original positions (B, S, D), zeros elsewhere."""
        full = hidden.new_zeros(hidden.shape[0], self.length, hidden.shape[2])
        order, valid = self.order.to(hidden.device), self.valid.to(hidden.device)
        rows = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
        full[rows, order] = hidden if self.dense else hidden * valid[..., None]
        return full


def pack(keep: Tensor, width: int) -> Tensor:
    """Index (B, width) of the True places of `keep` (B, N) in order, at the right; False places fill the left.

    >>> pack(torch.tensor([[True, False, True, True], [False, False, True, False]]), 3).tolist()
    [[0, 2, 3], [1, 3, 2]]
    """
    return keep.to(torch.int8).argsort(dim=1, stable=True)[:, keep.shape[1] - width:]


def prefill_mask(mask: Tensor | None, packed: Packed) -> Tensor | None:
    """The mask (B, 1, K, K) of the packed tokens, from the model's mask (B or 1, 1, S, S) or None (causal)."""
    if packed.plain and not additive(mask):
        return None
    order, valid, width = packed.order, packed.valid, packed.order.shape[1]
    if mask is None:
        mask = torch.ones(width, width, dtype=torch.bool, device=order.device).tril()[None, None]
    else:
        rows = take(mask.transpose(1, 2), order)  # (B, K, 1, S)
        mask = take(rows.permute(0, 3, 2, 1), order).permute(0, 2, 3, 1)  # (B, 1, K, K)
    if packed.dense:
        return mask
    itself = torch.eye(width, dtype=torch.bool, device=order.device)
    # Fillers are seen by nobody; their own rows see only themselves, so that no row is empty.
    seen = torch.where(valid[:, None, :, None], valid[:, None, None, :], itself)
    mask = hide(mask, ~seen)
    return mask if mask.dtype != torch.bool else mask | (itself & ~valid[:, None, :, None])


def decode_mask(mask: Tensor | None, packed: Packed, queries: int, width: int) -> Tensor | None:
    """The mask of `queries` tokens over `width` keys: the packed ones, then those decoded so far, these included.

    There are fewer than the packed ones if guesses that came with the prompt were taken back (`crop`).
    """
    order, valid = packed.order[:, :width], packed.valid[:, :width]
    batch, new = order.shape[0], width - order.shape[1]
    if (packed.plain and not additive(mask)) or (mask is None and packed.dense):
        if queries == 1:
            return None
        mask = None
    seen = torch.cat([valid, valid.new_ones(batch, new)], 1)[:, None, None, :]  # (B, 1, 1, K + new)
    if mask is None:
        return seen & torch.ones(queries, width, dtype=torch.bool, device=order.device).tril(width - queries)
    later = torch.arange(packed.length, packed.length + new, device=order.device).expand(batch, -1)
    columns = torch.cat([order, later], 1)[:, None, None, :].expand(-1, mask.shape[1], queries, -1)
    return hide(mask.expand(batch, -1, -1, -1).gather(-1, columns), ~seen)


def additive(mask: Tensor | None) -> bool:
    """Whether the attention implementation adds its masks (eager): to it, no mask means no causal mask either."""
    return mask is not None and mask.dtype != torch.bool


def hide(mask: Tensor, hidden: Tensor) -> Tensor:
    """`mask` (bool or additive) with the places `hidden` masked out."""
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def log_policy(policy: Tensor) -> Tensor:
    """What softmax with policy adds to the logits of each key, in float32 at least.

    `log(m + 1e-30)`: a clamp would give dropped tokens no gradient, a larger constant would let them leak
    (the error is about the constant times dropped over kept attention), 0 would give NaN.
    """
    return (policy.to(torch.promote_types(policy.dtype, torch.float32)) + 1e-30).log()


def soft_bias(mask: Tensor | None, bias: Tensor, dtype: torch.dtype, rows: slice = slice(0, None),
              seen: int | None = None) -> Tensor:
    """Additive mask (B, 1, S, S) of softmax with policy, on top of the model's mask (None: causal).

    bias: (B, S), `log_policy` of the policy. rows, seen: of these queries only, for the first `seen` keys.
    """
    span, seen = range(bias.shape[1])[rows], bias.shape[1] if seen is None else seen
    if mask is None:
        mask = torch.ones(len(span), seen, dtype=torch.bool, device=bias.device).tril(span.start)[None, None]
    else:
        mask = mask[:, :, span.start:span.stop, :seen]
    bias = bias[:, None, None, :seen].to(dtype)
    bias = torch.where(mask, bias, torch.finfo(dtype).min) if mask.dtype == torch.bool else mask + bias
    bias.diagonal(span.start, -2, -1).zero_()  # each token sees itself
    return bias
