"""The language model with low-rank changes (LoRA, arXiv 2106.09685), made fast on a CPU.

A matrix W of shape (out, in) becomes W + LORA_SCALE B A, with A (rank, in) and B (out, rank). Only
A and B are trained. W stays in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vispco.testbed.smollm import LORA_SCALE, MATRICES

from .tree import Trees

#: An additive mask's value where a token sees nothing.
_UNSEEN = -1e4


class LoraLinear(nn.Module):
    """x -> (W + LORA_SCALE B A) x, with W frozen and B zero at first."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach(), persistent=False)
        out, size = linear.weight.shape
        self.A = nn.Parameter(torch.randn(rank, size) * size**-0.5)
        self.B = nn.Parameter(torch.zeros(out, rank))
        self.changed = True

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if not self.changed:
            return y
        low = F.linear(x, self.A.to(x.dtype)).flatten(0, -2)
        change = (LORA_SCALE * self.B.T).to(x.dtype)
        return torch.addmm(y.flatten(0, -2), low, change).view(y.shape)


class _Norm(torch.autograd.Function):
    """RMSNorm with a frozen weight: x / rms(x) * w. Its gradient needs no more than x and 1/rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).to(x.dtype)
        ctx.save_for_backward(x, inverse, weight)
        return x * inverse * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, inverse, weight = ctx.saved_tensors
        unit, grad = x * inverse, grads[0] * weight
        return (grad - unit * (grad * unit).mean(-1, keepdim=True)) * inverse, None, None


class _FastNorm(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.register_buffer("weight", norm.weight.detach(), persistent=False)
        self.eps = norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self.eps)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention of grouped queries, without copies of the keys and values."""
    b, heads, t, size = query.shape
    groups = key.shape[1]
    rows = heads // groups * t
    scores = query.reshape(b, groups, rows, size) @ key.transpose(-1, -2) * scaling
    weights = torch.softmax(scores.view(b, groups, heads // groups, t, -1) + mask[:, None], -1)
    out = weights.view(b, groups, rows, -1) @ value
    return out.view(b, heads, t, size).transpose(1, 2), None


def prepare(language_model: Any, rank: int) -> nn.ModuleDict:
    """Make a LlamaForCausalLM ready to be trained, in place; returns its low-rank changes.

    Their names are those of the model's matrices, with "/" in place of ".".
    """
    from transformers import AttentionInterface

    AttentionInterface.register("vispco_grouped", _attend)
    language_model.set_attn_implementation("vispco_grouped")
    language_model.requires_grad_(False)
    decoder = language_model.model
    decoder.norm = _FastNorm(decoder.norm)
    changes = nn.ModuleDict()
    for index, layer in enumerate(decoder.layers):
        layer.input_layernorm = _FastNorm(layer.input_layernorm)
        layer.post_attention_layernorm = _FastNorm(layer.post_attention_layernorm)
        for name in MATRICES:
            change = LoraLinear(layer.get_submodule(name), rank)
            layer.set_submodule(name, change)
            changes[f"layers.{index}.{name}".replace(".", "/")] = change
    return changes


@contextmanager
def unchanged(changes: nn.ModuleDict) -> Iterator[None]:
    """The pretrained model for a while, without its changes."""
    for change in changes.values():
        change.changed = False
    try:
        yield
    finally:
        for change in changes.values():
            change.changed = True


@dataclass(frozen=True)
class Windows:
    """In which layers the text sees the picture.

    opens, closes: (B,), the first layer in which a row's text sees it, and the first in which it no
    longer does. drop: from this layer on, the visual tokens are gone, in every row.
    """

    opens: Tensor
    closes: Tensor
    drop: int


def forward(
    decoder: Any, visual: Tensor, trees: Trees, windows: Windows, at: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over pictures with their questions.

    visual: (B, V, hidden). Returns normed states of the text (B, T, hidden), visual states after
    `at[0]` layers, and text states after `at[1]` layers.
    """
    embedded = decoder.embed_tokens(trees.tokens)
    hidden = torch.cat([visual.to(embedded.dtype), embedded], dim=1)
    v, size = visual.shape[1], hidden.shape[1]
    image = torch.arange(v).expand(len(visual), -1)
    rotary = decoder.rotary_emb(hidden, torch.cat([image, v + trees.depth], dim=1))
    seen = torch.ones(len(visual), size, size, dtype=torch.bool).tril()
    seen[:, v:, v:] = trees.seen
    mask = torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, _UNSEEN)[:, None]
    blind = mask.clone()
    blind[..., v:, :v] = _UNSEEN
    cells, half = visual, hidden[:, v:]
    for index, layer in enumerate(decoder.layers):
        if index == windows.drop:
            hidden, mask, blind = hidden[:, v:], mask[..., v:, v:], blind[..., v:, v:]
            rotary = tuple(part[:, v:] for part in rotary)
        shut = (index < windows.opens) | (index >= windows.closes)
        own = torch.where(shut[:, None, None, None], blind, mask)
        hidden = layer(hidden, attention_mask=own, position_embeddings=rotary)
        if index + 1 == at[0]:
            cells = hidden[:, :v]
        if index + 1 == at[1]:
            half = hidden[:, -trees.tokens.shape[1] :]
    return decoder.norm(hidden[:, -trees.tokens.shape[1] :]), cells, half


def read(decoder: Any, tokens: Tensor) -> Tensor:
    """Normed states (B, N, hidden) of plain text (B, N), all of one length."""
    hidden = decoder.embed_tokens(tokens)
    n = tokens.shape[1]
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, n, n, dtype=hidden.dtype).masked_fill(~seen, _UNSEEN)
    rotary = decoder.rotary_emb(hidden, torch.arange(n)[None])
    for layer in decoder.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return decoder.norm(hidden)
