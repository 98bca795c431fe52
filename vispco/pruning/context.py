"""Context: what a pruning method may look at when it ranks the tokens that enter a layer.

Methods and model families meet only here: a method sees tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._tensors import column_sum as column_sum, masked_softmax, products as products, take
from .heard import Heard as Heard


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
        heard = self._heard(layer, rotary)
        return heard.whole(heard.key, 1)

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
        return heard.whole(heard.value, 1)

    @property
    def projected_keys(self) -> Tensor:
        """Keys (B, N, G E) of the layer just run, before any norm and rotary embedding.

        Those after them, where a family has no projection of the keys alone.
        """
        heard = self._heard(None)
        keys = heard.key.transpose(1, 2).flatten(2) if heard.projected is None else heard.projected
        return heard.whole(keys, 2)

    def queries(
        self, layer: int | None = None, at: Tensor | None = None, rotary: bool = True
    ) -> Tensor:
        """Queries (B, H, R, E) after rotary embedding, at the places `at` (B, R); default: all N.

        layer: the layer just run (default), or `ctx.layer`, see `attention`. rotary: as of `keys`.
        """
        heard = self._heard(layer, rotary)
        return heard.whole(heard.queries(at), 1)

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
        q, k = heard.queries(at), heard.key
        seen, before = self._seen(heard.mask, at, heard.past) & self.present[:, None], 0
        if heard.past is not None:
            if not rotary:
                raise ValueError(
                    "in later turns, the keys of earlier ones have rotary positions: use a method "
                    "whose attention has them, such as fastv without options"
                )
            # What came in earlier turns takes its share of the attention.
            keys, held = heard.past
            before, k = keys.shape[2], torch.cat([keys, k], 2)
            rows = self.order.gather(1, at)
            seen = torch.cat([held.seen(heard.mask, rows), seen], -1)
        q = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, G, H / G R, E)
        scores = products(q, k).unflatten(2, (-1, at.shape[1])).flatten(1, 2) * heard.scaling
        if heard.softcap is not None:
            scores = heard.softcap * (scores / heard.softcap).tanh()
        hidden = ~seen[:, None]  # (B, 1, R, P + N)
        if heard.sinks is None:
            return heard.whole(masked_softmax(scores, hidden)[..., before:], 1)
        # A sink is one more place to look at, where no token is.
        sinks = heard.sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        hidden = torch.cat([hidden, torch.zeros_like(hidden[..., :1])], -1)
        rows = masked_softmax(torch.cat([scores, sinks], -1), hidden)[..., before:-1]
        return heard.whole(rows, 1)

    def _seen(self, mask: Any, at: Tensor, past: Any = None) -> Tensor:
        """Which tokens a layer's `mask` lets the rows `at` see (B, R, N) bool."""
        rows = self.order.gather(1, at)
        if hasattr(mask, "mask_mod"):
            # Flex attention's: a function of sample, head, query and key.
            sample = torch.arange(len(rows), device=rows.device)[:, None, None]
            return mask.mask_mod(sample, 0 * sample, rows[..., None], self.order[:, None])
        if mask is None or mask.ndim == 2:
            return self.order[:, None] <= rows[..., None]
        mask = take(mask[:, 0], rows).transpose(1, 2)  # (B, S, R): original positions
        # Those of earlier turns come first.
        first = 0 if past is None else past[1].length
        seen = take(mask, self.order + first).transpose(1, 2)
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
