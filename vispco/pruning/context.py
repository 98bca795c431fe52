"""Context: what a pruning method may look at when it ranks the tokens that enter a layer.

Methods and model families meet only here: a method sees tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


def positions(mask: Tensor, width: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Index pair that picks the True places of `mask` (B, N), in order, and which are real.

    Each sample has `width` places, (B, width); those beyond its own are filler.

    >>> index, real = positions(torch.tensor([[False, True, True], [True, False, False]]), 2)
    >>> torch.tensor([[10, 11, 12], [20, 21, 22]])[index].where(real, -1).tolist()
    [[11, 12], [20, -1]]
    """
    columns = mask.logical_not().to(torch.int8).argsort(dim=1, stable=True)[:, :width]  # (B, width)
    rows = torch.arange(mask.shape[0], device=mask.device)[:, None]
    return (rows, columns), mask[rows, columns]


def before_answer(real: Tensor, labels: Tensor | None) -> Tensor:
    """The real tokens before the first label (B, S) bool.

    real: (B, S) bool, no padding. labels: (B, S), -100 outside the answer, or None.
    Answers are no part of the prompt: no score may look at them.
    """
    if labels is None:
        return real
    return real & (labels != -100).to(real.device).cumsum(1).eq(0)


@dataclass(eq=False)
class Heard:
    """Queries and keys of N tokens as a layer hands them to its attention function.

    query: (B, H, N, E). key: (B, G, N, E). projected: (B, N, G E), keys as the layer's `k_proj`
    gave them; None if it has none.
    scaling: what q k^T is multiplied with. softcap: its bound c in c tanh(q k^T / c), or None.
    sinks: (H,) logits of a place without a token, or None.
    mask: the model's own mask for the whole sequence, or None: causal.
    value: (B, G, N, E), of a layer that ran ahead; else None.
    again: gives query and key without rotary positions; None if no method asks for them.
    """

    query: Tensor
    key: Tensor
    projected: Tensor | None
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    mask: Tensor | None
    value: Tensor | None = None
    again: Callable[[], tuple[Tensor, Tensor]] | None = None

    @classmethod
    def of(cls, query: Tensor, key: Tensor, options: dict, projected: Any, mask: Any) -> Heard:
        """From what an attention function is called with. options: its keyword arguments."""
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        softcap, sinks = options.get("softcap"), options.get("s_aux")
        return cls(query, key, projected, scaling, softcap, sinks, mask)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Heard:
        """With each token at another place. move: of (B, N, ...) tensors, to the new places."""

        def moved(x: Tensor) -> Tensor:
            return move(x.transpose(1, 2)).transpose(1, 2)

        again, value = self.again, None if self.value is None else moved(self.value)
        return replace(
            self,
            query=moved(self.query),
            key=moved(self.key),
            projected=None if self.projected is None else move(self.projected),
            value=value,
            again=None if again is None else lambda: (moved(again()[0]), moved(again()[1])),
        )

    def without_rotary(self) -> Heard:
        """The same layer's queries and keys as they were before rotary embedding."""
        if self.again is None:
            raise ValueError(
                "queries and keys without rotary positions are made only for methods that say so: "
                "set reads_unrotated = True in the class"
            )
        query, key = self.again()
        return replace(self, query=query.to(self.query), key=key.to(self.key))


@dataclass
class Context:
    """The tokens at the input of decoder layer `layer`, and what is known of them.

    Shapes: B samples, N tokens present now, n_visual visual slots (the most of any sample), D
    hidden, H heads, G key-value heads, E head size. Samples may have different numbers of visual
    tokens. So `x[ctx.visual]` gives (B, n_visual, ...) with filler in the slots where `ctx.valid`
    is False. A method may return anything for those slots, but the scores of valid slots must not
    depend on them.

    layer: the layer whose input is pruned.
    hidden: (B, N, D) its input.
    visual, valid: index pair and (B, n_visual) bool, as above.
    visual_mask: (B, N) bool, visual tokens.
    text_mask: (B, N) bool, text of the prompt: no padding, no answer tokens.
    present: (B, N) bool, tokens that exist: neither padding nor dropped before.
    order: (B, N) original position of each token.
    slot: (B, n_visual) number of each visual token among the sample's ORIGINAL visual tokens.
    n_visual: (B,) number of original visual tokens.
    keep: (B,) number of tokens that will be kept.
    last: (B, 1) place of the last prompt token.
    heard: queries and keys of the layer just run (of the last one that has attention), or None.
    rotary: cosines and sines that layer `layer` is given, each (B or 1, S, E), of the whole
        sequence; None if it is given none.
    start: (B, 1) original position of the first token that is no padding.
    ahead: runs layer `layer` up to its attention, on the tokens as they are; None if it has none.
        Its argument, True by default: with rotary positions.
    exhaustive: whether the order of ALL tokens matters (in search, the soft threshold looks past
        the last one kept); if not, only which `keep` tokens come first.
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
    inputs: Tensor
    sources: dict[str, Any]
    heard: Heard | None
    rotary: Any
    start: Tensor
    ahead: Callable[..., Heard | None]

    @property
    def embeddings(self) -> Tensor:
        """Input of layer 0 (B, N, D): image features and text embeddings of the tokens present."""
        return take(self.inputs, self.order)

    @property
    def vision_attention(self) -> Tensor:
        """Attention (B, n_visual) that each token's patches receive in the vision tower.

        It is that of the CLS token, if there is one, else of all patches; the mean over heads. For
        methods with `reads_vision = True`. See `vispco.pruning._tower.Tower.read`.
        """
        return self._of_tokens(self.sources["tower"]()[0])

    def vision_attention_at(self, depth: float) -> Tensor:
        """The same (B, n_visual) in another layer of the tower, 0 for the first, 1 for the last.

        depth: one of the method's `vision_depths`. The layer is number round(depth * layers), or
        the nearest to it that attends to whole frames.
        """
        if depth not in self.sources["depths"]:
            raise ValueError(f"set vision_depths = ({depth!r},) in the class, or on the object")
        return self._of_tokens(self.sources["depths"][depth]()[0])

    @property
    def vision_keys(self) -> Tensor:
        """Head-mean keys (B, n_visual, E) of the vision tower's layer that makes the tokens.

        For methods with `reads_vision = True`.
        """
        return self._of_tokens(self.sources["tower"]()[1])

    @property
    def grid(self) -> Tensor:
        """Frame, row and column of each token, (B, n_visual, 3) long.

        A frame is a tile, an image or a video frame of the sample. For methods with
        `reads_grid = True`.
        """
        return self._of_tokens(self.sources["grid"]())

    def _of_tokens(self, original: Tensor) -> Tensor:
        return take(original.to(self.order.device), self.order)[self.visual]

    @property
    def rotary_means(self) -> Tensor:
        """Mean cosine and mean sine (B, n_visual, 2) of each visual token's rotary embedding.

        Where padding on the left counts as positions, they are as they would be without it.
        Raises ValueError if the layer is given no cosines and sines.
        """
        given = self.rotary
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise ValueError(
                "the method reads the rotary embedding, and this model hands its layers no cosines "
                "and sines: use another method"
            )
        means = torch.stack([x.float().mean(-1) for x in given], -1)  # (B or 1, S, 2)
        # Nothing is turned at position 0.
        begins = take(given[1], self.start).abs().amax(-1) == 0  # (B, 1)
        return take(means, (self.order - self.start.masked_fill(begins, 0)).clamp(min=0))[
            self.visual
        ]

    def keys(self, layer: int | None = None, rotary: bool = True) -> Tensor:
        """Keys (B, G, N, E) as attention uses them, after rotary embedding.

        layer: the layer just run (default), or `ctx.layer`, see `attention`.
        rotary: False: as they would be without positions. For methods with
            `reads_unrotated = True`.
        """
        return self._heard(layer, rotary).key

    @property
    def values(self) -> Tensor:
        """Values (B, G, N, E) of the layer that comes, `ctx.layer`; see `attention`.

        Raises ValueError if that layer has no attention.
        """
        heard = self._heard(self.layer)
        if heard.value is None:
            raise ValueError(
                f"the method reads the values of layer {self.layer}, which has no attention: drop "
                "before another layer"
            )
        return heard.value

    @property
    def projected_keys(self) -> Tensor:
        """Keys (B, N, G E) of the layer just run, before any norm and rotary embedding.

        Those after them, where a family has no projection of the keys alone.
        """
        heard = self._heard(None)
        if heard.projected is None:
            return heard.key.transpose(1, 2).flatten(2)
        return heard.projected

    def queries(
        self, layer: int | None = None, at: Tensor | None = None, rotary: bool = True
    ) -> Tensor:
        """Queries (B, H, R, E) after rotary embedding, at the places `at` (B, R); default: all N.

        layer: the layer just run (default), or `ctx.layer`, see `attention`. rotary: as of `keys`.
        """
        query = self._heard(layer, rotary).query
        return query if at is None else take(query.transpose(1, 2), at).transpose(1, 2)

    def attention(
        self, layer: int | None = None, at: Tensor | None = None, rotary: bool = True
    ) -> Tensor:
        """Post-softmax attention (B, H, R, N) of the query rows `at` (B, R).

        at: default, the last prompt token. A row that sees nothing is 0.
        layer: the layer just run (default), whose probabilities these are, with nothing computed
            again but these rows; or `ctx.layer`, with what it would compute on the tokens as they
            are. That layer then runs up to its attention. Where either has no attention (linear
            attention, convolution), it is the last layer before it that has.
        rotary: as of `keys`.
        """
        heard, at = self._heard(layer, rotary), self.last if at is None else at
        query = take(heard.query.transpose(1, 2), at).transpose(1, 2)
        q, k = without_overflow(query), without_overflow(heard.key)
        q = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, G, H / G R, E)
        scores = (q @ k.transpose(-1, -2)).unflatten(2, (-1, at.shape[1])).flatten(1, 2).float()
        scores = scores * heard.scaling
        if heard.softcap is not None:
            scores = heard.softcap * (scores / heard.softcap).tanh()
        hidden = ~(self._seen(heard.mask, at) & self.present[:, None])[:, None]  # (B, 1, R, N)
        if heard.sinks is None:
            return masked_softmax(scores, hidden)
        # A sink is one more place to look at, where no token is.
        sinks = heard.sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        hidden = torch.cat([hidden, torch.zeros_like(hidden[..., :1])], -1)
        return masked_softmax(torch.cat([scores, sinks], -1), hidden)[..., :-1]

    def _seen(self, mask: Tensor | None, at: Tensor) -> Tensor:
        """Which tokens a layer's `mask` lets the rows `at` see (B, R, N) bool."""
        rows = self.order.gather(1, at)
        if mask is None or mask.ndim == 2:
            return self.order[:, None] <= rows[..., None]
        mask = take(mask[:, 0], rows).transpose(1, 2)  # (B, S, R): original positions
        seen = take(mask, self.order).transpose(1, 2)
        return seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2

    def _heard(self, layer: int | None, rotary: bool = True) -> Heard:
        layer = self.layer - 1 if layer is None else layer
        if layer not in (self.layer - 1, self.layer) or layer < 0:
            raise ValueError(
                f"the tokens entering layer {self.layer} have queries and keys of layer "
                f"{self.layer - 1} (just run) and {self.layer} (next) only, not of layer {layer}; "
                "a method that reads the layer just run cannot prune before layer 1"
            )
        heard = self.ahead(rotary) if layer == self.layer else None
        if heard is None and self.heard is not None:
            heard = self.heard if rotary else self.heard.without_rotary()
        if heard is None:
            raise ValueError(
                f"no layer up to {layer} has attention whose queries and keys can be heard: prune "
                "later, or use a method that reads no attention"
            )
        return heard


def without_overflow(x: Tensor) -> Tensor:
    """float16 as float32.

    Products of queries and keys may exceed 65504, where the model's fused attention does not.
    """
    return x.float() if x.dtype == torch.float16 else x


def masked_softmax(scores: Tensor, hidden: Tensor) -> Tensor:
    """Softmax of `scores` (..., N) over those that are not `hidden`.

    Those hidden get 0, all of them if need be; NaN stays NaN.

    >>> hidden = torch.tensor([[False, False, True], [True, True, True]])
    >>> masked_softmax(torch.tensor([[1.0, 1.0, 9.0], [1.0, 2.0, 3.0]]), hidden)
    tensor([[0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 0.0000]])
    """
    least = torch.finfo(scores.dtype).min
    return scores.masked_fill(hidden, least).softmax(-1).masked_fill(hidden, 0.0)


def column_sum(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Sum over `dim`, not the last, as if in exact arithmetic: equal columns have equal sums.

    On a CPU, PyTorch adds up the last few columns in another order than the others. In float32,
    tokens with equal scores would come to differ by a rounding, and ties would not go to the first.
    """
    # mps has no float64.
    precise = torch.float32 if x.device.type == "mps" else torch.float64
    return x.sum(dim, dtype=precise).to(x.dtype)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather `index` (B, K) along dim 1 of `x` (B or 1, N, ...)."""
    rows = torch.arange(index.shape[0], device=index.device)[:, None]
    # Copies whole rows. `gather` would look up each number.
    return x.expand(index.shape[0], *x.shape[1:])[rows, index]
