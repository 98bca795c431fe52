"""FLOPs of a language model's prefill as a function of the tokens that enter each layer.

Exact convention (the default): 2 FLOPs per multiply-accumulate, grouped-query attention, every matrix of the
feed-forward network, no discount for causal masks, nothing for norms, softmax, activations and embeddings.
With n tokens entering a layer, d = hidden, h = heads, g = key-value heads, e = head size, m = FFN width:

    F_layer(n) = 2 n (2 d h e + 2 d g e + 3 d m) + 4 n^2 h e

The same formula serves three readers: it is differentiable in n (the search's constraint), exact for whole
tokens (the report), and equal to `torch.utils.flop_counter.FlopCounterMode` (the test).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import PruningConfig
from .registry import adapter_for, build_method


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a decoder that decide its FLOPs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    ffn_matrices: int = 3
    vision_head_dim: int = 0  # of the tower's attention, for methods that compare its keys


def exact(s: Dimensions, n):
    """2 per multiply-accumulate, GQA, every FFN matrix."""
    attention = 2 * s.hidden * s.heads * s.head_dim + 2 * s.hidden * s.kv_heads * s.head_dim
    return 2 * n * (attention + s.ffn_matrices * s.hidden * s.ffn) + 4 * n * n * (s.heads * s.head_dim)


def fastv(s: Dimensions, n):
    """FastV (arXiv 2403.06764): `4nd^2 + 2n^2d + 2ndm` multiply-accumulates, two FFN matrices."""
    return 4 * n * s.hidden**2 + 2 * n * n * s.hidden + 2 * n * s.hidden * s.ffn


def sparsevlm(s: Dimensions, n):
    """SparseVLM (arXiv 2410.04417): FastV's with three FFN matrices."""
    return fastv(s, n) + n * s.hidden * s.ffn


def vispco(s: Dimensions, n):
    """VisPCO (arXiv 2604.15188): `24 n d^2 + 4 n^2 d`, an FFN of two matrices of width 4d."""
    return 24 * n * s.hidden**2 + 4 * n * n * s.hidden


@dataclass(frozen=True)
class Convention:
    """A way to count that some publication uses. `text`: whether text tokens count."""

    layer: Callable
    text: bool = True


#: Every convention by name. All but `exact` leave out the lm_head, the vision tower and the scoring.
CONVENTIONS = {"exact": Convention(exact), "fastv": Convention(fastv), "sparsevlm": Convention(sparsevlm),
               "pdrop": Convention(sparsevlm, text=False), "vispco": Convention(vispco)}


@dataclass(frozen=True)
class FlopsReport:
    """FLOPs of one sample's prefill.

    per_layer: of each decoder layer; scoring: of ranking the tokens (one row of attention for FastV);
    lm_head: of `n_logits` positions; vision, projector: of the vision tower and the projector, listed apart.
    tokens: visual tokens entering each layer.
    """

    per_layer: list[int]
    scoring: int
    lm_head: int
    vision: int
    projector: int
    tokens: list[int]
    n_text: int
    convention: str
    full: int = field(repr=False, default=0)
    text_only: int = field(repr=False, default=0)

    @property
    def total(self) -> int:
        """The language model: layers + scoring + lm_head."""
        return sum(self.per_layer) + self.scoring + self.lm_head

    @property
    def total_with_vision(self) -> int:
        """Everything that runs: `total` + vision tower + projector."""
        return self.total + self.vision + self.projector

    @property
    def share(self) -> float:
        """Of the full model's `total`."""
        return self.total / self.full if self.full else 1.0

    @property
    def prunable_share(self) -> float:
        """Of the prunable cost: 0 without visual tokens, 1 with all of them. Budgets mean this by default."""
        return (self.total - self.text_only) / (self.full - self.text_only) if self.full > self.text_only else 1.0

    def table(self) -> str:
        """A per-layer table."""
        rows = [f"{'layer':>12} {'visual':>7} {'text':>6} {'GFLOPs':>12}"]
        rows += [f"{i:>12} {n:>7} {self.n_text:>6} {f / 1e9:>12.4f}"
                 for i, (n, f) in enumerate(zip(self.tokens, self.per_layer))]
        parts = {"scoring": self.scoring, "lm_head": self.lm_head, "total": self.total, "vision tower": self.vision,
                 "projector": self.projector, "with vision": self.total_with_vision}
        rows += [f"{name:>12} {'':>7} {'':>6} {f / 1e9:>12.4f}" for name, f in parts.items()]
        return "\n".join(rows + [f"{self.share:.1%} of the full model, {self.prunable_share:.1%} of its prunable cost "
                                 f"(convention {self.convention!r})"])


class CostModel:
    """Prefill FLOPs of one language model under one convention and method, for samples of any shape.

    `cost(counts, n_visual, n_text)`: counts (..., L) visual tokens entering each layer, n_visual and n_text
    (...) of the samples. Whole counts (integer tensors) include the method's scoring at each layer where the
    count falls, and are exact; fractional counts leave it out, and are differentiable.

    Raises ValueError for an unknown convention.
    """

    def __init__(self, dimensions: Dimensions, method=None, convention: str = "exact", n_logits: int = 1):
        if convention not in CONVENTIONS:
            raise ValueError(f"unknown FLOPs convention {convention!r}: choose from {', '.join(CONVENTIONS)}")
        self.dimensions, self.method = dimensions, method
        self.convention, self.exact = CONVENTIONS[convention], convention == "exact"
        self.lm_head = 2 * n_logits * dimensions.hidden * dimensions.vocab if self.exact else 0

    def layers(self, counts: Tensor, n_text) -> Tensor:
        """FLOPs of each layer, (..., L)."""
        text = torch.as_tensor(n_text, device=counts.device)[..., None] if self.convention.text else 0
        return self.convention.layer(self.dimensions, counts + text)

    def scoring(self, counts: Tensor, n_visual, n_text) -> Tensor | int:
        """FLOPs of ranking, for whole counts (..., L)."""
        if self.method is None or not self.exact:
            return 0
        n_visual, n_text = (torch.as_tensor(n, device=counts.device)[..., None] for n in (n_visual, n_text))
        before = torch.cat([n_visual.expand(*counts.shape[:-1], 1), counts[..., :-1]], -1)
        ranked = torch.zeros_like(counts) + self.method.flops(self.dimensions, before, n_text)
        return ranked.where(counts < before, 0).sum(-1)

    def __call__(self, counts: Tensor, n_visual, n_text) -> Tensor:
        scoring = 0 if counts.is_floating_point() else self.scoring(counts, n_visual, n_text)
        return self.layers(counts, n_text).sum(-1) + scoring + self.lm_head

    def full(self, n_visual, n_text) -> Tensor:
        """FLOPs (...) without pruning."""
        n_visual = torch.as_tensor(n_visual)
        return self(n_visual[..., None].expand(*n_visual.shape, self.dimensions.layers), n_visual, n_text)

    def text_only(self, n_text) -> Tensor:
        """FLOPs (...) of the text alone: what no pruning can save."""
        return self.full(torch.zeros_like(torch.as_tensor(n_text)), n_text)


def count_flops(model_or_config, config: PruningConfig | None = None, n_visual: int = 576, n_text: int = 64,
                convention: str = "exact", n_logits: int = 1, images: Sequence | None = None) -> FlopsReport:
    """Count the prefill FLOPs of one sample under a pruning configuration (None: the full model).

    model_or_config: a Hugging Face VLM or its configuration. n_visual, n_text: tokens of the sample.
    n_logits: positions at which logits are computed (1 in generation).
    images: sizes of the sample's images, for families whose vision tower depends on more than `n_visual` (the
        adapter's `vision_flops` says which: rows of `image_grid_thw`, or of `image_sizes`).
    Raises ValueError for another number of layers than the model's, a negative number of tokens, or an unknown
    convention.

    >>> from transformers import LlavaConfig
    >>> report = count_flops(LlavaConfig(text_config={"model_type": "llama"}),
    ...                      PruningConfig.from_fastv(k=2, drop=0.5, num_layers=32), convention="fastv")
    >>> f"{report.share:.0%}"
    '57%'
    """
    for name, value in {"n_visual": n_visual, "n_text": n_text, "n_logits": n_logits}.items():
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be a whole number of tokens, got {value!r}")
    adapter = adapter_for(model_or_config)
    hf_config = getattr(model_or_config, "config", model_or_config)
    dimensions = adapter.dimensions(hf_config)
    method = None
    if config is None:
        counts = [n_visual] * dimensions.layers
    else:
        if config.num_layers != dimensions.layers:
            raise ValueError(f"the configuration has {config.num_layers} keep_ratios, but the model has "
                             f"{dimensions.layers} decoder layers")
        counts = config.tokens(n_visual)
        method = build_method(config.method, config.method_options)
    cost = CostModel(dimensions, method, convention, n_logits)
    vision, projector = adapter.vision_flops(hf_config, n_visual, images) if cost.exact else (0, 0)
    if cost.exact and method is not None and method.reads_vision and min(counts) < n_visual:
        vision += adapter.vision_attention_flops(hf_config, n_visual, images)
    whole = torch.tensor(counts)
    return FlopsReport(cost.layers(whole, n_text).tolist(), int(cost.scoring(whole, n_visual, n_text)), cost.lm_head,
                       vision, projector, counts, n_text, convention,
                       full=int(cost.full(n_visual, n_text)), text_only=int(cost.text_only(n_text)))
