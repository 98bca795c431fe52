"""Context: what a pruning method may look at when it ranks the visual tokens that enter a layer.

Methods and model families meet only here. A method sees tensors; the adapter supplies the projections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def positions(mask: Tensor, width: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Index pair that picks the True places of `mask` (B, N), in order, padded to `width`; and which are real.

    >>> index, real = positions(torch.tensor([[False, True, True], [True, False, False]]), 2)
    >>> torch.tensor([[10, 11, 12], [20, 21, 22]])[index].where(real, -1).tolist()
    [[11, 12], [20, -1]]
    """
    columns = mask.logical_not().to(torch.int8).argsort(dim=1, stable=True)[:, :width]  # (B, width)
    rows = torch.arange(mask.shape[0], device=mask.device)[:, None]
    return (rows, columns), mask[rows, columns]


def before_answer(real: Tensor, labels: Tensor | None) -> Tensor:
    """(B, S) bool: the real tokens before the first label. Answers are no part of the prompt: no score may look at them."""
    return real if labels is None else real & (labels != -100).to(real.device).cumsum(1).eq(0)


@dataclass
class Context:
    """The tokens at the input of decoder layer `layer`, and what is known of them.

    Shapes: B samples, N tokens present now, n_visual visual slots (the most of any sample), D hidden,
    H heads, G key-value heads, E head size. Samples may have different numbers of visual tokens:
    `x[ctx.visual]` gives (B, n_visual, ...) with filler in the slots where `ctx.valid` is False. A method may
    return anything for those slots, but the scores of valid slots must not depend on them.

    layer: the layer whose input is pruned.
    hidden: (B, N, D) its input.
    visual, valid: index pair and (B, n_visual) bool, as above.
    visual_mask, text_mask: (B, N) bool: visual tokens; prompt text (no padding, no answer tokens).
    present: (B, N) bool: tokens that exist (neither padding nor dropped before).
    order: (B, N) original position of each token.
    slot: (B, n_visual) running number of each visual token among the sample's ORIGINAL visual tokens.
    n_visual: (B,) number of original visual tokens.
    keep: (B,) number of tokens that will be kept.
    last: (B, 1) place of the last prompt token.
    exhaustive: whether the order of ALL tokens matters (search, where the soft threshold looks past the last one
        kept); if not, only which `keep` come first.
    """

    layer: int
    hidden: Tensor
    visual: tuple[Tensor, Tensor]
    valid: Tensor
    visual_mask: Tensor
    text_mask: Tensor
    present: Tensor
    order: Tensor
    slot: Tensor
    n_visual: Tensor
    keep: Tensor
    last: Tensor
    exhaustive: bool
    adapter: Any
    inputs: Tensor
    captured: dict[str, Any]
    sources: dict[str, Any]

    @property
    def embeddings(self) -> Tensor:
        """Input of layer 0 (B, N, D): projected image features and text embeddings of the tokens present."""
        return take(self.inputs, self.order)

    @property
    def vision_attention(self) -> Tensor:
        """Attention (B, n_visual) that each token's patches receive in the vision tower: from the CLS token if there is
        one, else from all patches, head mean (`vispco.pruning._tower`). For methods with `reads_vision = True`."""
        return self._of_tokens(self.sources["tower"]()[0])

    @property
    def vision_keys(self) -> Tensor:
        """Head-mean keys (B, n_visual, E) of that layer of the tower. For methods with `reads_vision = True`."""
        return self._of_tokens(self.sources["tower"]()[1])

    @property
    def grid(self) -> Tensor:
        """Frame (tile, image or video frame of the sample), row and column of each token, (B, n_visual, 3) long.
        For methods with `reads_grid = True`."""
        return self._of_tokens(self.sources["grid"]())

    def _of_tokens(self, original: Tensor) -> Tensor:
        return take(original.to(self.order.device), self.order)[self.visual]

    def keys(self, layer: int | None = None) -> Tensor:
        """Keys (B, G, N, E) after rotary embedding, of the layer just run (default) or of `ctx.layer`."""
        cached = self.captured.get("cached") if self._layer(layer) < self.layer else None
        return self._project("key", layer, None) if cached is None else cached

    @property
    def projected_keys(self) -> Tensor:
        """Keys (B, N, G E) of the layer just run as its projection made them: before any norm, and before positions."""
        return self.captured["key"]

    def queries(self, layer: int | None = None, at: Tensor | None = None) -> Tensor:
        """Queries (B, H, R, E) after rotary embedding, at the places `at` (B, R); default all N."""
        return self._project("query", layer, at)

    def attention(self, layer: int | None = None, at: Tensor | None = None) -> Tensor:
        """Post-softmax attention (B, H, R, N) of the query rows `at` (B, R); default the last prompt token.

        The probabilities are those of the layer just run (default; nothing is recomputed but these rows), or
        what `ctx.layer` would compute on the tokens as they are (`layer=ctx.layer`). A row that sees nothing is 0.
        """
        at = self.last if at is None else at
        q, k = (without_overflow(x) for x in (self.queries(layer, at), self.keys(layer)))
        groups = q.shape[1] // k.shape[1]
        scores = q.unflatten(1, (k.shape[1], groups)).flatten(2, 3) @ k.transpose(-1, -2)  # (B, G, groups R, N)
        scores = scores.unflatten(2, (groups, -1)).flatten(1, 2).float() * self.adapter.scaling(self._layer(layer))
        scores = self.adapter.cap(self._layer(layer), scores)
        unseen = ~(self._seen(self._layer(layer), at) & self.present[:, None])[:, None]  # (B, 1, R, N)
        return masked_softmax(scores, unseen)

    def _seen(self, layer: int, at: Tensor) -> Tensor:
        """(B, R, N) bool: which tokens the model's mask of `layer` lets the rows `at` see."""
        rows, mask = self.order.gather(1, at), self.captured["mask"][layer]
        if mask is None:
            return self.order[:, None] <= rows[..., None]
        mask = take(mask[:, 0], rows).transpose(1, 2)  # (B, S, R): original positions
        seen = take(mask, self.order).transpose(1, 2)
        return seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2

    def _layer(self, layer: int | None) -> int:
        layer = self.layer - 1 if layer is None else layer
        if layer not in (self.layer - 1, self.layer) or layer < 0:
            raise ValueError(f"the tokens entering layer {self.layer} have queries and keys of layer "
                             f"{self.layer - 1} (just run) and {self.layer} (next) only, not of layer {layer}; a "
                             "method that reads the layer just run cannot prune before layer 1")
        return layer

    def _project(self, kind: str, layer: int | None, at: Tensor | None) -> Tensor:
        layer = self._layer(layer)
        if layer == self.layer:
            states = self.adapter.project(layer, kind, self.hidden if at is None else take(self.hidden, at)).to(self.hidden.device)
        else:
            states = self.captured[kind] if at is None else take(self.captured[kind], at)
        rotary = self.captured["rotary"][layer]
        return self.adapter.rotate(layer, kind, states, rotary if at is None else take_rotary(rotary, at))


def without_overflow(x: Tensor) -> Tensor:
    """float16 as float32: its products of queries and keys may exceed 65504 where the model's fused attention does not."""
    return x.float() if x.dtype == torch.float16 else x


def masked_softmax(scores: Tensor, hidden: Tensor) -> Tensor:
    """Softmax of `scores` (..., N) over those that are not `hidden`, which get 0, all of them if need be; NaN stays NaN.

    >>> masked_softmax(torch.tensor([[1.0, 1.0, 9.0], [1.0, 2.0, 3.0]]), torch.tensor([[False, False, True], [True, True, True]]))
    tensor([[0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 0.0000]])
    """
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0.0)


def column_sum(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Sum over `dim`, not the last, as if in exact arithmetic: equal columns have equal sums, wherever they stand.

    On a CPU, PyTorch adds up the last few columns in another order than the others. In float32, tokens with equal scores
    would come to differ by a rounding, and ties would not go to the first. (mps has no float64.)
    """
    return x.sum(dim, dtype=torch.float32 if x.device.type == "mps" else torch.float64).to(x.dtype)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather `index` (B, K) along dim 1 of `x` (B or 1, N, ...)."""
    rows = torch.arange(index.shape[0], device=index.device)[:, None]
    return x.expand(index.shape[0], *x.shape[1:])[rows, index]  # copies whole rows; `gather` would look up each number


def take_rotary(rotary: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
    """Gather `index` (B, K) along dim -2 of cos and sin: (B or 1, N, E), or (3, B, N, E) in some families."""
    def gather(x: Tensor) -> Tensor:
        x = x.expand(*x.shape[:-3], index.shape[0], *x.shape[-2:])
        return x.gather(-2, index[..., None].expand(*x.shape[:-3], *index.shape, x.shape[-1]))

    return tuple(gather(x) for x in rotary)
