"""Attention masks and packing for sequences whose tokens have been dropped.

There are two ways to leave a token out. Packed (deploy): the tokens that remain are gathered, and
the model's own mask with them. Masked (search): all tokens stay, and a bias hides the dropped ones.
Softmax with `log m` added is softmax with policy (DynamicViT, arXiv 2106.02034),

    m_n exp(a_n) / sum_n' m_n' exp(a_n')

where each token always sees itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .context import take


@dataclass(eq=False)
class Packed:
    """Which original tokens remain, packed to the right: fillers (dropped tokens) first.

    order: (B, K) original positions. valid: (B, K) bool, False for fillers.
    length: original length S.
    dense: no sample has fillers (known without looking at the device).
    plain: dense, no padding remains and the model's mask is causal, so that no mask is needed.
    """

    order: Tensor
    valid: Tensor
    length: int
    dense: bool
    plain: bool

    @cached_property
    def rows(self) -> Tensor:
        """Places (B K,) of the packed tokens, where the sequences stand one after the other."""
        first = torch.arange(len(self.order), device=self.order.device)[:, None] * self.length
        return (first + self.order).flatten()

    def gather(self, x: Tensor) -> Tensor:
        """The packed tokens (B, K, ...) of states (B, S, ...)."""
        # One lookup of whole rows: every layer does it, and a GPU may be waiting for the host.
        return x.flatten(0, 1).index_select(0, self.rows).view(*self.order.shape, *x.shape[2:])

    def kept(self) -> Tensor:
        """(B, S) bool over original positions."""
        kept = self.valid.new_zeros(len(self.valid), self.length)
        return kept.scatter(1, self.order, self.valid)

    def without_fillers(self, packed: Tensor) -> Tensor:
        """States (B, K, D) with zeros for fillers: what an indexer sees of them never differs."""
        return packed if self.dense else packed * self.valid[..., None]

    def restore(self, packed: Tensor, into: Tensor | None = None) -> Tensor:
        """States (B, K, ...) of the packed tokens at their original positions (B, S, ...).

        into: what the other tokens have; None: zeros.
        """
        # A layer may be on another device than what was gathered for it.
        rows, shape = self.rows.to(packed.device), (len(packed), self.length, *packed.shape[2:])
        packed = packed.flatten(0, 1)
        full = packed.new_zeros(shape) if into is None else into.clone()
        full = full.flatten(0, 1)
        if not self.dense:
            valid = self.valid.to(packed.device).view(-1, *[1] * (packed.ndim - 1))
            packed = packed.where(valid, full.index_select(0, rows))
        return full.index_copy_(0, rows, packed).view(shape)

    def continued(self, width: int) -> Tensor:
        """Original positions (B, width) of the packed tokens, and of those that came after them."""
        later = torch.arange(self.length, self.length + width, device=self.order.device)
        return torch.cat([self.order, later.expand(len(self.order), -1)], 1)[:, :width]

    @classmethod
    def everything(cls, valid: Tensor) -> Packed:
        """All tokens of a sequence, of which `valid` (B, S) are no padding."""
        order = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
        return cls(order, valid, valid.shape[1], dense=False, plain=False)

    def followed_by(self, later: Packed) -> Packed:
        """These tokens, and after them those of a later turn."""
        order = torch.cat([self.order, self.length + later.order], 1)
        valid = torch.cat([self.valid, later.valid], 1)
        return Packed(order, valid, self.length + later.length, dense=False, plain=False)

    def seen(self, mask: Tensor | None, rows: Tensor) -> Tensor:
        """Which of these tokens the rows (B, R) of a later turn see by its mask (B, R, K) bool."""
        valid = self.valid[:, None].expand(-1, rows.shape[1], -1)
        if mask is None or mask.ndim == 2:
            return valid
        seen = take(take(mask[:, 0], rows).transpose(1, 2), self.order).transpose(1, 2)
        return valid & (
            seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
        )

    def known(self, width: int) -> Tensor | None:
        """Which of `width` keys are no fillers (B, width) bool, with those that came after.

        None: all of them.
        """
        valid = self.valid[:, :width]
        return (
            None
            if self.dense
            else nn.functional.pad(valid, (0, width - valid.shape[1]), value=True)
        )

    def among(self, held: Packed | None) -> Packed:
        """The same tokens, as those of `held` that are valid, in a layer that holds more of them.

        held: None: all tokens.
        """
        if held is self:
            return self
        everything = torch.arange(self.length, device=self.order.device).expand(len(self.order), -1)
        order = everything if held is None else held.order
        valid = self.kept().gather(1, order)
        return Packed(order, valid, self.length, dense=False, plain=False)


def pack(keep: Tensor, width: int) -> Tensor:
    """Index (B, width) of the True places of `keep` (B, N) in order, at the right.

    False places fill the left.

    >>> pack(torch.tensor([[True, False, True, True], [False, False, True, False]]), 3).tolist()
    [[0, 2, 3], [1, 3, 2]]
    """
    first = keep.shape[1] - width
    return keep.to(torch.int8).argsort(dim=1, stable=True)[:, first:]


def prefill_mask(
    mask: Tensor | None, packed: Packed, before: Packed | None = None
) -> Tensor | None:
    """The mask (B, 1, K, K) of the packed tokens, or (B, 1, K, P + K) in a later turn.

    mask: the model's own (B or 1, 1, S, S) or (B or 1, 1, S, all tokens); None: causal.
    before: of a later turn, the P tokens of earlier ones that this layer holds.
    """
    if before is None and packed.plain and not additive(mask):
        return None
    order, valid, width = packed.order, packed.valid, packed.order.shape[1]
    keys = packed if before is None else before.followed_by(packed)
    first = keys.order.shape[1] - width
    if mask is None:
        mask = lower(width, first + width, first, order.device)[None, None]
    else:
        rows = take(mask.transpose(1, 2), order)  # (B, K, 1, S)
        mask = take(rows.permute(0, 3, 2, 1), keys.order).permute(0, 2, 3, 1)  # (B, 1, K, P + K)
    if before is None and packed.dense:
        return mask
    itself = torch.eye(first + width, dtype=torch.bool, device=order.device)[first:]
    # Fillers are seen by nobody. Their own rows see only themselves, so that no row is empty.
    seen = torch.where(valid[:, None, :, None], keys.valid[:, None, None, :], itself)
    mask = hide(mask, ~seen)
    return mask if mask.dtype != torch.bool else mask | (itself & ~valid[:, None, :, None])


def decode_mask(mask: Tensor | None, packed: Packed, queries: int, width: int) -> Tensor | None:
    """The mask of `queries` new tokens over `width` keys.

    Keys are the packed ones, and those decoded so far, these included. There are fewer than the
    packed ones if guesses that came with the prompt were taken back (`crop`).
    mask: the model's own (B or 1, 1, queries, all tokens); None: causal.
    """
    order, valid = packed.order[:, :width], packed.valid[:, :width]
    if mask is not None and mask.ndim == 2:
        # Of tokens: of the new ones alone, or of all.
        if mask.shape[1] == queries:
            return mask
        known = take(mask[:, : packed.length], order) * valid
        return torch.cat([known, mask[:, packed.length :]], 1)
    batch, new = order.shape[0], width - order.shape[1]
    if (packed.plain and not additive(mask)) or (mask is None and packed.dense):
        if queries == 1:
            return None
        mask = None
    seen = nn.functional.pad(valid, (0, new), value=True)[:, None, None, :]  # (B, 1, 1, width)
    if mask is None:
        return seen & lower(queries, width, width - queries, order.device)
    later = torch.arange(packed.length, packed.length + new, device=order.device)
    columns = torch.cat([order, later.expand(batch, -1)], 1)[:, None, None, :]
    columns = columns.expand(-1, mask.shape[1], queries, -1)
    return hide(mask.expand(batch, -1, -1, -1).gather(-1, columns), ~seen)


def static_mask(mask: Tensor, packed: Packed, width: int) -> Tensor:
    """The mask of new tokens over all `width` places of a static cache, most of them empty.

    mask: the model's own (B or 1, 1, queries, all places), which knows what has come so far. The
    cache of a pruned prompt lacks the places of what was dropped.
    """
    columns = packed.continued(width)[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
    seen = nn.functional.pad(packed.valid, (0, width - packed.valid.shape[1]), value=True)
    mask = mask.expand(len(columns), -1, -1, -1).gather(-1, columns)
    return mask if packed.dense else hide(mask, ~seen[:, None, None])


def widened(mask: Tensor | None, packed: Packed, width: int) -> Tensor:
    """The mask of the packed tokens (B, 1, K, K) over all `width` places of a static cache.

    None: causal.
    """
    size = packed.order.shape[1]
    if mask is None:
        mask = lower(size, size, 0, packed.order.device)[None, None]
    empty = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return nn.functional.pad(mask, (0, width - size), value=empty)


def lower(rows: int, columns: int, start: int, device: torch.device) -> Tensor:
    """(rows, columns) bool: row i sees the columns up to `start` + i."""
    return torch.ones(rows, columns, dtype=torch.bool, device=device).tril(start)


def additive(mask: Tensor | None) -> bool:
    """Whether the attention implementation adds its masks (eager).

    To such a one, no mask means no causal mask either.
    """
    return mask is not None and mask.dtype != torch.bool


def hide(mask: Tensor, hidden: Tensor) -> Tensor:
    """`mask` (bool or additive) with the places `hidden` masked out."""
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def log_policy(policy: Tensor) -> Tensor:
    """What softmax with policy adds to the logits of each key, in float32 at least.

    It is `log(m + 1e-30)`. A clamp would give dropped tokens no gradient. A larger constant would
    let them leak (the error is about the constant times dropped over kept attention). 0 would give
    NaN.
    """
    return (policy.to(torch.promote_types(policy.dtype, torch.float32)) + 1e-30).log()


def soft_bias(
    mask: Tensor | None,
    bias: Tensor,
    dtype: torch.dtype,
    rows: slice = slice(0, None),
    seen: int | None = None,
) -> Tensor:
    """Additive mask (B, 1, S, S) of softmax with policy, on top of the model's own.

    mask: (B or 1, 1, S, S); None: causal. bias: (B, S), `log_policy` of the policy.
    rows, seen: only of these queries, for the first `seen` keys.
    """
    span = range(bias.shape[1])[rows]
    bias = bias[:, None, None, :seen].to(dtype)
    if mask is None:
        mask = lower(len(span), bias.shape[-1], span.start, bias.device)[None, None]
    else:
        mask = mask[:, :, span.start : span.stop, :seen]
    hidden = torch.finfo(dtype).min
    bias = torch.where(mask, bias, hidden) if mask.dtype == torch.bool else mask + bias
    # Each token sees itself.
    bias.diagonal(span.start, -2, -1).zero_()
    return bias
