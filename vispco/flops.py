"""Costs of a language model's prefill, as functions of the tokens that enter each layer.

FLOPs by the exact convention (the default) are those of `torch.utils.flop_counter`: 2 of them per
multiply-accumulate, every matrix of a layer, no discount for causal masks, nothing for norms,
softmax, activations and embeddings. They are counted on a model without weights
(`vispco.reading.blank`). Of a Llama-like layer that n tokens enter, they are

    F_layer(n) = 2 n (2 d h e + 2 d g e + 3 d m) + 4 n^2 h e

with d = hidden size, h = heads, g = key-value heads, e = head size, m = width of the feed-forward
network (FFN). F is differentiable in n (for the search), and exact for whole tokens (for reports).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .config import PruningConfig, as_config
from .dimensions import Dimensions as Dimensions
from .registry import adapter_for, build_method


def exact(s: Dimensions, n):
    """FLOPs of each layer that n tokens (..., L) enter, as PyTorch's counter sees them."""
    return s.flops(n)


def fastv(s: Dimensions, n):
    """FastV (arXiv 2403.06764): `4nd^2 + 2n^2d + 2ndm`, of which two FFN matrices."""
    return 4 * n * s.hidden**2 + 2 * n * n * s.hidden + 2 * n * s.hidden * s.ffn


def sparsevlm(s: Dimensions, n):
    """SparseVLM (arXiv 2410.04417): FastV's formula with three FFN matrices."""
    return fastv(s, n) + n * s.hidden * s.ffn


def vispco(s: Dimensions, n):
    """VisPCO (arXiv 2604.15188): `24nd^2 + 4n^2d`, of which an FFN of two matrices of width 4d."""
    return 24 * n * s.hidden**2 + 4 * n * n * s.hidden


#: Every convention by name. All but "exact" leave out the lm_head, vision tower and ranking.
CONVENTIONS: dict[str, Callable] = {
    "exact": exact,
    "fastv": fastv,
    "sparsevlm": sparsevlm,
    "pdrop": sparsevlm,
    "vispco": vispco,
}
_WITHOUT_TEXT = {"pdrop"}


class Cost:
    """A sum over the decoder's layers of what the tokens that enter each layer cost there.

        F(n) = sum_i f_i(N_t + n_i)   of one sample with N_t text tokens

    F is differentiable in the visual tokens n_i, and never falls with one of them. A subclass
    defines f as `layer`, its `unit`, and the `dimensions` of the decoder.
    """

    unit: str
    dimensions: Dimensions

    def layer(self, tokens: Tensor) -> Tensor:
        """The cost (..., L) of each layer, which `tokens` (..., L) enter."""
        raise NotImplementedError(f"{type(self).__name__} must define layer(tokens)")

    def layers(self, counts: Tensor, n_text) -> Tensor:
        """The cost of each layer `(..., L)`, with the arguments of a call."""
        tokens = counts + torch.as_tensor(n_text, device=counts.device)[..., None]
        return self.layer(tokens.contiguous())

    def __call__(self, counts: Tensor, n_visual, n_text) -> Tensor:
        """The cost (...) if `counts` `(..., L)` of the `n_visual` (...) tokens enter each layer."""
        # The layers are contiguous, so the sum has one order, whatever the strides of counts.
        return self.layers(counts, n_text).sum(-1)

    def full(self, n_visual, n_text) -> Tensor:
        """The cost (...) without pruning."""
        n_visual = torch.as_tensor(n_visual)
        counts = n_visual[..., None].expand(*n_visual.shape, self.dimensions.layers)
        return self(counts, n_visual, n_text)

    def text_only(self, n_text) -> Tensor:
        """The cost (...) of the text alone, which no pruning can save."""
        return self.full(torch.zeros_like(torch.as_tensor(n_text)), n_text)


class CostModel(Cost):
    """Prefill FLOPs of one language model, under one convention and one pruning method.

    Whole counts (integer tensors) are exact: they include the FLOPs of ranking the tokens at each
    layer where the count falls. Fractional counts leave the ranking out, and are differentiable.

    method: the pruning method that ranks, or None. n_logits: positions that get logits.
    Raises ValueError for an unknown convention.

    >>> cost = CostModel(Dimensions(2, 8, 2, 2, 4, 16, 10))
    >>> int(cost(torch.tensor([16, 8]), 16, 4)), int(cost.text_only(4))
    (58528, 11424)
    """

    unit = "FLOPs"

    def __init__(
        self, dimensions: Dimensions, method=None, convention: str = "exact", n_logits: int = 1
    ):
        if convention not in CONVENTIONS:
            known = ", ".join(CONVENTIONS)
            raise ValueError(f"unknown FLOPs convention {convention!r}: choose from {known}")
        self.dimensions, self.method = dimensions, method
        self.convention, self.exact = convention, convention == "exact"
        self.lm_head = 2 * n_logits * dimensions.hidden * dimensions.vocab if self.exact else 0

    def layer(self, tokens: Tensor) -> Tensor:
        return CONVENTIONS[self.convention](self.dimensions, tokens)

    def layers(self, counts: Tensor, n_text) -> Tensor:
        return super().layers(counts, 0 if self.convention in _WITHOUT_TEXT else n_text)

    def scoring(self, counts: Tensor, n_visual, n_text) -> Tensor | int:
        """FLOPs (...) of ranking, for whole counts `(..., L)`."""
        if self.method is None or not self.exact:
            return 0
        n_visual = torch.as_tensor(n_visual, device=counts.device)[..., None]
        n_text = torch.as_tensor(n_text, device=counts.device)[..., None]
        before = torch.cat([n_visual.expand(*counts.shape[:-1], 1), counts[..., :-1]], -1)
        ranked = self.method.ranking(self.dimensions.before(), before, counts, n_text)
        return ranked.where(counts < before, 0).sum(-1)

    def __call__(self, counts: Tensor, n_visual, n_text) -> Tensor:
        scoring = 0 if counts.is_floating_point() else self.scoring(counts, n_visual, n_text)
        return super().__call__(counts, n_visual, n_text) + scoring + self.lm_head


class KVCacheMemory(Cost):
    """Bytes of the key-value cache after the prefill of one sample.

        F(n) = sum_i (N_t + n_i) 2 g e b   with g key-value heads of size e, b bytes per number

    bytes_per_element: b, 2 for bfloat16. Raises ValueError unless it is a positive number.
    Sliding windows save nothing: with dropped tokens, a layer's cache holds all that remain.

    >>> cost = KVCacheMemory(Dimensions(2, 8, 2, 2, 4, 16, 10))
    >>> int(cost(torch.tensor([16, 8]), 16, 4))  # (20 + 12) * 2 * 2 * 4 * 2
    1024
    """

    unit = "bytes"

    def __init__(self, dimensions: Dimensions, bytes_per_element: float = 2):
        number = isinstance(bytes_per_element, Real) and not isinstance(bytes_per_element, bool)
        if not number or bytes_per_element <= 0:
            expected = "a positive number (2 for bfloat16)"
            raise ValueError(f"bytes_per_element must be {expected}, got {bytes_per_element!r}")
        self.dimensions, self.bytes_per_element = dimensions, bytes_per_element

    def layer(self, tokens: Tensor) -> Tensor:
        numbers = torch.as_tensor(self.dimensions.cached, device=tokens.device)
        return tokens * (numbers * self.bytes_per_element)


@dataclass(frozen=True)
class FlopsReport:
    """FLOPs of one sample's prefill, as `count_flops` finds them.

    per_layer: of each decoder layer. scoring: of ranking the tokens. lm_head: of the logits.
    vision, projector: of tower and projector, which `total` leaves out; None if not known.
    tokens: visual tokens that enter each layer. n_text: text tokens.
    full, text_only: `total` of the full model, and of the text alone.
    """

    per_layer: list[int]
    scoring: int
    lm_head: int
    vision: int | None
    projector: int | None
    tokens: list[int]
    n_text: int
    convention: str
    full: int = field(repr=False, default=0)
    text_only: int = field(repr=False, default=0)

    @property
    def total(self) -> int:
        """FLOPs of the language model: layers, scoring and lm_head."""
        return sum(self.per_layer) + self.scoring + self.lm_head

    @property
    def total_with_vision(self) -> int | None:
        """FLOPs of everything that runs: `total`, the vision tower and the projector."""
        if self.vision is None or self.projector is None:
            return None
        return self.total + self.vision + self.projector

    @property
    def share(self) -> float:
        """`total` over that of the full model."""
        return self.total / self.full if self.full else 1.0

    @property
    def prunable_share(self) -> float:
        """(total - text_only) / (full - text_only). Budgets mean this share by default."""
        prunable = self.full - self.text_only
        return (self.total - self.text_only) / prunable if prunable > 0 else 1.0

    def table(self) -> str:
        """A table of the layers and the other parts, in GFLOPs."""
        rows = [f"{'layer':>12} {'visual':>7} {'text':>6} {'GFLOPs':>12}"]
        for i, (n, layer) in enumerate(zip(self.tokens, self.per_layer, strict=True)):
            rows.append(f"{i:>12} {n:>7} {self.n_text:>6} {layer / 1e9:>12.4f}")
        labels = {"vision": "vision tower", "total_with_vision": "with vision"}
        for part in ("scoring", "lm_head", "total", "vision", "projector", "total_with_vision"):
            flops = getattr(self, part)
            shown = "unknown" if flops is None else f"{flops / 1e9:.4f}"
            rows.append(f"{labels.get(part, part):>12} {'':>7} {'':>6} {shown:>12}")
        if self.vision is None:
            rows.append("unknown: give count_flops(..., inputs=) a processor's output")
        shares = f"{self.share:.1%} of the full model, {self.prunable_share:.1%} of its prunable"
        return "\n".join([*rows, f"{shares} cost (convention {self.convention!r})"])


def count_flops(
    model_or_config,
    config: PruningConfig | str | os.PathLike | None = None,
    n_visual: int | None = None,
    n_text: int | None = None,
    convention: str = "exact",
    n_logits: int = 1,
    images: Sequence | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> FlopsReport:
    """Count the prefill FLOPs of one sample under a pruning configuration.

    Each layer costs F_layer(n), see `vispco.flops`, with n = n_text + its whole visual tokens.

    model_or_config: a Hugging Face VLM, or its configuration.
    config: the pruning configuration, or the path of its file; None for the full model.
    n_visual, n_text: tokens of the sample, 576 and 64 by default. n_logits: positions with logits.
    convention: a name in `CONVENTIONS`.
    images: sizes of the sample's images, for families whose vision tower depends on more than
        `n_visual`: rows of `image_grid_thw` or `image_sizes`, see the adapter's `vision_flops`.
    inputs: a processor's output for one sample, in place of `n_visual`, `n_text` and `images`.
    Raises ValueError for a configuration of another number of layers, numbers of tokens that are
    negative or not whole, several samples, an unknown convention, or a model that cannot be built.

    >>> from transformers import LlavaConfig
    >>> config = PruningConfig.from_fastv(k=2, drop=0.5, num_layers=32)
    >>> model = LlavaConfig(text_config={"model_type": "llama"})
    >>> f"{count_flops(model, config, convention='fastv').share:.0%}"
    '57%'
    """
    if isinstance(model_or_config, PruningConfig):
        raise ValueError(
            "expected a model or its configuration, got a PruningConfig: the model comes first"
        )
    if isinstance(model_or_config, str | os.PathLike):
        name = str(model_or_config)
        raise ValueError(
            f"expected a model or its configuration, got the name {name!r}: "
            f"transformers.AutoConfig.from_pretrained({name!r}) reads all that is needed"
        )
    config = None if config is None else as_config(config)
    adapter = adapter_for(model_or_config)
    hf_config = getattr(model_or_config, "config", model_or_config)
    if inputs is not None:
        if (n_visual, n_text, images) != (None, None, None):
            raise ValueError("inputs say what n_visual, n_text and images are: leave these out")
        if not isinstance(inputs, Mapping):
            kind = type(inputs).__name__
            raise ValueError(f"inputs must be what a processor makes of one sample, got {kind}")
        n_visual, n_text, vision = adapter.sample(hf_config, inputs)
    n_visual, n_text = 576 if n_visual is None else n_visual, 64 if n_text is None else n_text
    for name, value in {"n_visual": n_visual, "n_text": n_text, "n_logits": n_logits}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{name} must be a whole number of tokens, got {value!r}")
    dimensions = adapter.dimensions(hf_config)
    if config is not None and config.num_layers != dimensions.layers:
        layers = f"but the model has {dimensions.layers} decoder layers"
        raise ValueError(f"the configuration has {config.num_layers} keep_ratios, {layers}")
    method = build_method(config.method, config.method_options) if config else None
    tokens = config.tokens(n_visual) if config else [n_visual] * dimensions.layers
    cost = CostModel(dimensions, method, convention, n_logits)
    if cost.exact and inputs is None:
        vision = adapter.vision_flops(hf_config, n_visual, images)
    tower, projector = (vision.tower, vision.projector) if cost.exact else (0, 0)
    drops = [i for i, n in enumerate(tokens) if n < [n_visual, *tokens][i]]
    if tower and method is not None:
        who = [method.at(i) for i in drops]
        read = {depth for each in who if each.reads_vision for depth in (None, *each.vision_depths)}
        tower += len(read) * (vision.reading or 0)
    counts = torch.tensor(tokens)
    return FlopsReport(
        per_layer=cost.layers(counts, n_text).tolist(),
        scoring=int(cost.scoring(counts, n_visual, n_text)),
        lm_head=cost.lm_head,
        vision=tower,
        projector=projector,
        tokens=tokens,
        n_text=n_text,
        convention=convention,
        full=int(cost.full(n_visual, n_text)),
        text_only=int(cost.text_only(n_text)),
    )
