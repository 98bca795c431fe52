"""Softmax with policy for search, a block of queries at a time: memory grows with S, not S^2.

Search needs the gradient of an attention bias. Given a bias that has one, the function
`scaled_dot_product_attention` leaves its fast kernels, and keeps every probability of every layer
for the backward pass. But the bias of softmax with policy is one number per key (B, S), and so is
its gradient: probabilities are made again, block by block, and let go.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map_only

from ._masks import log_policy, soft_bias


class SoftMask(Tensor):
    """The mask `soft_bias(mask, log_policy(policy))` (B, 1, S, S), made only where it is looked at.

    As a `torch.nn.attention.bias.CausalBias` does, it tells sdpa what to do. Anything else, such as
    eager attention, gets numbers.

    >>> from torch.nn.functional import scaled_dot_product_attention as sdpa
    >>> q = k = v = torch.randn(1, 2, 4, 8)
    >>> mask = SoftMask.of(None, torch.tensor([[1.0, 0.0, 1.0, 1.0]]), torch.float32, causal=True)
    >>> mask.shape, torch.allclose(sdpa(q, k, v, mask), sdpa(q, k, v, mask + 0))
    (torch.Size([1, 1, 4, 4]), True)
    """

    own: Tensor | None
    bias: Tensor
    causal: bool

    @classmethod
    def of(cls, mask: Tensor | None, policy: Tensor, dtype: torch.dtype, causal: bool) -> SoftMask:
        """mask: the model's own (B or 1, 1, S, S), or None. policy: (B, S), may require a gradient.

        causal: whether no token of the model sees ahead.
        """
        return cls._made(mask, log_policy(policy), dtype, causal)

    @classmethod
    def _made(cls, own: Tensor | None, bias: Tensor, dtype: torch.dtype, causal: bool) -> SoftMask:
        batch, size = bias.shape
        nothing = torch.empty((), dtype=dtype, device=bias.device)
        self = nothing.expand(batch, 1, size, size).as_subclass(cls)
        self.own, self.bias, self.causal = own, bias, causal
        return self

    def numbers(self) -> Tensor:
        """The mask itself (B, 1, S, S)."""
        return soft_bias(self.own, self.bias, self.dtype)

    def to(self, *args, **kwargs) -> Tensor:
        """On another device it is still not made: accelerate moves the arguments of every layer."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or dtype not in (None, self.dtype):
            return super().to(*args, **kwargs)
        own = None if self.own is None else self.own.to(device)
        return self._made(own, self.bias.to(device), self.dtype, self.causal)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention:
            return _sdpa(*args, **kwargs)
        # Attributes such as .shape and .dtype need no numbers.
        attribute = getattr(function, "__name__", None) == "__get__"
        with torch._C.DisableTorchFunctionSubclass():
            if not attribute:
                args, kwargs = tree_map_only(SoftMask, SoftMask.numbers, (args, kwargs))
            return function(*args, **kwargs)


class Bound:
    """Clips the gradient by each token's mask (B, V) to +-`value` (B,) of its sample.

    At m = 0, the slope of softmax with policy is the token's weight over the weight of all that is
    kept. That is unbounded: a dropped token may have been attended to e^20 times as much. But
    keeping the token cannot take away more divergence than its sample has.
    Autograd's graph holds this object, so it must not hold the pruner. The pruner holds tensors of
    the graph, and no garbage collector sees such a circle.

    value: (B,); None: the gradient is left as it is.
    """

    value: Tensor | None = None

    def set(self, losses: Tensor, rows: Tensor, samples: int, gradient: Tensor) -> None:
        """Bound by each sample's part of the loss: the sum over its tokens of losses x gradient.

        losses: (A,) of each answer token. rows: (A,) the sample that the token belongs to.
        gradient: (A,) of the loss in `losses`.
        """
        self.value = losses.new_zeros(samples).index_add(0, rows, losses * gradient)

    def __call__(self, gradient: Tensor) -> Tensor:
        if self.value is None:
            return gradient
        bound = self.value[:, None].to(gradient)
        return gradient.clamp(-bound, bound)


def _sdpa(query, key, value, attn_mask: SoftMask, dropout_p=0.0, is_causal=False, **options):
    if dropout_p:
        # Probabilities that are dropped have to be kept.
        mask = soft_bias(attn_mask.own, attn_mask.bias, query.dtype)
        return scaled_dot_product_attention(query, key, value, mask, dropout_p, **options)
    if options.get("enable_gqa"):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scale = options.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    bias, own, causal = attn_mask.bias, attn_mask.own, attn_mask.causal
    return Blockwise.apply(query, key, value, bias, own, causal, scale)


class Blockwise(torch.autograd.Function):
    """softmax(scale q k^T + bias + mask) v, where each token's bias for itself is 0.

    q, k, v: (B, H, S, E). bias: (B, S), per key. With p the probabilities of one head and sample,

        ds_ij = p_ij (do_i . v_j - do_i . o_i),    dbias_j = sum over heads and i != j of ds_ij
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, mask, causal, scale):
        ctx.mask, ctx.causal, ctx.scale = mask, causal, scale
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
        for rows, seen in _blocks(q, causal):
            block = q[:, :, rows], k[:, :, :seen], v[:, :, :seen]
            added = soft_bias(mask, bias, q.dtype, rows, seen)
            out[:, :, rows] = scaled_dot_product_attention(*block, added, scale=scale)
        ctx.save_for_backward(q, k, v, bias, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, bias, out = ctx.saved_tensors
        precise = torch.promote_types(q.dtype, torch.float32)
        # At the first layer that is pruned, only the policy has a gradient.
        onwards = ctx.needs_input_grad[0]
        dq, dk, dv, dbias = (torch.zeros_like(x) for x in (q, k, v, bias))
        for rows, seen in _blocks(q, ctx.causal):
            q_, grad_ = q[:, :, rows] * ctx.scale, grad[:, :, rows]
            k_, v_ = k[:, :, :seen], v[:, :, :seen]
            p = (q_ @ k_.transpose(-1, -2)).to(precise)  # (B, H, R, seen)
            p = p.add_(soft_bias(ctx.mask, bias, p.dtype, rows, seen)).softmax(-1)
            ds = (grad_ @ v_.transpose(-1, -2)).to(precise)
            along = grad_.to(precise) * out[:, :, rows].to(precise)
            ds = ds.sub_(along.sum(-1, keepdim=True)).mul_(p)
            own = ds.sum(1)  # (B, R, seen)
            own.diagonal(rows.start, -2, -1).zero_()
            dbias[:, :seen] += own.sum(1)
            if onwards:
                # Hidden keys have probabilities of 1e-30. Only the policy needs them. Further back
                # they would end in denormal numbers, with which a CPU is many times slower.
                hidden = p < 1e-20
                p, ds = p.masked_fill_(hidden, 0), ds.masked_fill_(hidden, 0)
                dv[:, :, :seen] += p.to(v.dtype).transpose(-1, -2) @ grad_
                dq[:, :, rows] = ds.to(k.dtype) @ k_ * ctx.scale
                dk[:, :, :seen] += ds.to(q.dtype).transpose(-1, -2) @ q_
        return dq, dk, dv, dbias, None, None, None


def _blocks(q: Tensor, causal: bool) -> Iterator[tuple[slice, int]]:
    """Slices of queries, and how many keys each can see at most.

    On a CPU they are small, to stay in its cache.
    """
    batch, heads, size, _ = q.shape
    step = 64 if q.device.type == "cpu" else min(1024, max(64, 2**26 // (batch * heads * size)))
    for start in range(0, size, step):
        stop = min(size, start + step)
        yield slice(start, stop), stop if causal else size
