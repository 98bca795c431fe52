"""State of a forward pass: what changes from layer to layer, and how tokens are chosen."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_map_only

from ..reading.sharding import agreed
from ..relaxation import hard_mask
from ._arguments import SHARED
from ._masks import Packed, pack
from ._tensors import on_device
from .context import Context, Heard, positions, take
from .prompt import Prompt


@dataclass
class PassState:
    """One prompt on its way through the layers.

    exhaustive: whether tokens are ranked at layers that drop none, too, and all of them.
    counts: for each layer, the visual tokens that may enter it, of each sample.
    left: visual tokens that remain, of each sample.
    sources: what methods may ask of the vision side, made on demand.
    before: of a later turn: what layer i holds of earlier ones, before it runs; else None.
    held: that of the layer that runs just now.
    group: of the processes over which the attention heads are split; None: they are not.
    embeddings: (B, S, D) input of the decoder.
    flash: whether attention is FlashAttention's.
    packed: deploy, the tokens that remain; None until a token was dropped.
    alone: search, the same tokens, for layers that run on these alone; made when asked for.
    policy: search, the product of the masks so far (B, S); None until there was one.
    heard: queries and keys of the last layer that has attention, of the tokens that are there now.
    projected: its keys as its `k_proj` gave them, on the way.
    mask: the model's own mask in the layer that runs just now.
    rotary: its cosines and sines, of the whole sequence, or what else it is given of that name.
    ran: its hidden states and arguments, if a method asks for it without rotary positions.
    few: only the last tokens of the sequence enter the layer that runs just now.
    entered: (B, N) of what has entered the layer that runs just now.
    back: turns (B, N, D) into the decoder's own layout of hidden states.
    faulty: by layer, whether its hidden states and scores were not finite (2,) bool; see `check`.
    memo: masks and rotary embeddings that layers share, as long as the same tokens enter them.
    """

    adapter: Any
    method: Any
    exhaustive: bool
    prompt: Prompt
    counts: list[list[int]]
    left: list[int]
    sources: dict[str, Callable[[], Any]]
    group: Any = None
    before: Callable[[int], Packed] | None = None
    held: Packed | None = None
    embeddings: Any = None
    flash: bool = False
    packed: Packed | None = None
    alone: Packed | None = None
    policy: Tensor | None = None
    heard: Heard | None = None
    projected: Tensor | None = None
    mask: Tensor | None = None
    rotary: Any = None
    ran: tuple | None = None
    few: bool = False
    entered: tuple[int, ...] = ()
    back: Callable[[Tensor], Tensor] = lambda x: x
    faulty: dict[int, Tensor] = field(default_factory=dict)
    memo: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        # No other layers than these can drop tokens, whatever a method's limit does.
        self.dropping, least = set(), self.left
        for i, row in enumerate(self.counts):
            if any(map(operator.lt, row, least)):
                self.dropping.add(i)
            least = list(map(min, row, least))
        # The last layer with attention before each of them, and what is in between.
        self.heeded = set(range(len(self.counts))) if self.exhaustive else set()
        for i in self.dropping - self.heeded - {0}:
            between = range(i - 1, -1, -1)
            last = next(filter(self.adapter.attends, between), 0)
            self.heeded.update(range(last, i))

    def follow(self, device: torch.device, kwargs: dict) -> dict:
        """Of a model spread over devices: bring all that is known to `device`.

        Returns a layer's arguments there, which are not to be changed. Layers that are given the
        same share them.
        """
        if self.prompt.visual.device != device:
            self.memo = {}
            vars(self).update(vars(on_device(self, device)))
        # A GPU may be waiting for the host: what all layers share is looked at once.
        whole = ("given", *kwargs, *map(id, kwargs.values()))
        if whole in self.memo:
            return self.memo[whole][1]

        def here(x: Tensor) -> Tensor:
            key = ("moved", id(x))
            if x.device != device and key not in self.memo:
                self.memo[key] = x.to(device)
            return self.memo.get(key, x)

        names = kwargs.keys() - SHARED
        moved = tree_map_only(Tensor, here, {name: kwargs[name] for name in names})
        # Holds what was given, too: its numbers must not be given to others.
        self.memo[whole] = kwargs, {**kwargs, **moved}
        return self.memo[whole][1]

    def hear(self, i: int, query: Tensor, key: Tensor, options: dict, again: Any) -> None:
        """Layer i has handed over queries and keys, which a method may ask for: keep them."""
        past = 0 if self.held is None else key.shape[2] - query.shape[2]
        heard = self.heard_by(i, query, key[:, :, past:], options, self.projected)
        heard.past = None if self.held is None else (key[:, :, :past], self.held)
        heard.again, self.heard = again, heard
        self.projected, self.ran = None, None

    def heard_by(self, i: int, query: Tensor, key: Tensor, options: dict, projected: Any) -> Heard:
        """What layer i has handed to its attention function."""
        heard = Heard.of(query, key, options, projected, self.mask)
        if self.group is not None:
            heads = self.adapter.heads(i)
            if query.shape[1] * distributed.get_world_size(self.group) == heads:
                heard.group = self.group
            elif query.shape[1] != heads:
                own = f"{heads} attention heads, of which a process has {query.shape[1]}"
                raise ValueError(f"layer {i} has {own}: they must be split evenly, or not at all")
        return heard

    def target(self, i: int) -> list[int] | None:
        """Visual tokens of each sample that may enter layer i, or None if that drops none."""
        if i not in self.dropping:
            return None
        target = list(map(min, self.left, self.counts[i]))
        samples = zip(self.prompt.ends_visual, self.prompt.n_visual, target, strict=True)
        if any(end and n and not left for end, n, left in samples):
            raise ValueError(
                "a prompt ends in a visual token, from which its answer would be read, and the "
                "configuration drops them all: put text after the image, or keep at least one token"
            )
        return target if target != self.left else None

    def widths(self) -> list[int]:
        """Tokens of each sample that are left: all its text, its visual tokens, no padding.

        But the last column stays, padding or not: generation reads it.
        """
        prompt = self.prompt
        samples = zip(prompt.n_real, prompt.n_visual, self.left, prompt.tail, strict=True)
        return [real - visual + left + tail for real, visual, left, tail in samples]

    def pack(self, keep: Tensor, order: Tensor | None = None) -> tuple[Packed, Tensor]:
        """The tokens `keep` (B, N) bool of those at the original positions `order` (B, N).

        order: None: all of the sequence. `keep` must have as many as are left.
        Second result: their places (B, K) among the N.
        """
        prompt, widths = self.prompt, self.widths()
        if any(prompt.tail):
            keep = torch.cat([keep[:, :-1], torch.ones_like(keep[:, -1:])], 1)
        index, dense = pack(keep, max(widths)), len(set(widths)) == 1
        packed = Packed(
            order=index if order is None else take(order, index),
            valid=take(keep, index),
            length=prompt.visual.shape[1],
            dense=dense,
            plain=dense and prompt.plain and not any(prompt.tail),
        )
        return packed, index

    def context(
        self, i: int, hidden: Tensor, target: list[int], ahead: Callable[..., Heard | None]
    ) -> Context:
        """What a method sees at the input of layer i, of which `target` visual tokens will be kept.

        hidden: (B, N, D), the tokens that are there. ahead: see `Context`.
        """
        prompt, packed = self.prompt, self.packed
        if packed is None:
            order = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
            present = prompt.real if self.policy is None else prompt.real & (self.policy > 0)
            visual, most = prompt.visual, max(prompt.n_visual)
        else:
            order = packed.order
            present = packed.valid & prompt.real.gather(1, order)
            visual, most = packed.valid & prompt.visual.gather(1, order), max(self.left)
        index, there = positions(visual, most)
        question = present & prompt.question.gather(1, order)
        columns = torch.arange(hidden.shape[1], device=hidden.device)
        return Context(
            layer=i,
            hidden=hidden,
            visual=index,
            valid=there & present[index],
            visual_mask=visual & present,
            text_mask=question & ~visual,
            present=present,
            order=order,
            slot=(prompt.visual.cumsum(1) - 1).gather(1, order)[index],
            n_visual=prompt.visual.sum(1),
            keep=torch.tensor(target).to(hidden.device, non_blocking=True),
            last=(question * columns).argmax(1, keepdim=True),
            exhaustive=self.exhaustive,
            inputs=self.embeddings,
            sources=self.sources,
            heard=self.heard,
            rotary=self.rotary,
            start=prompt.real.int().argmax(1, keepdim=True),
            ahead=ahead,
        )

    def score(self, context: Context) -> tuple[Tensor, Tensor]:
        """The method's scores (B, V), and how many tokens to keep (B,).

        That number is `context.keep`, or the method's limit where it is lower. A sample that drops
        nothing here is processed only because others in its batch do: it keeps what it has.
        Raises ValueError for scores of another shape, and FloatingPointError as `check` does.
        """
        method = self.method.at(context.layer)
        scores, keep = method.score(context), context.keep
        if scores.shape != context.valid.shape:
            raise ValueError(
                f"{type(method).__name__}.score returned shape {tuple(scores.shape)}, expected one "
                f"score per visual slot, {tuple(context.valid.shape)}: index with [ctx.visual]"
            )
        precise = torch.promote_types(context.hidden.dtype, torch.float32)
        hidden_fails = ~context.hidden.sum(-1, dtype=precise).isfinite() & context.present
        scores_fail = ~(scores < math.inf) & context.valid
        self.faulty[context.layer] = torch.stack([hidden_fails.any(), scores_fail.any()])
        if self.exhaustive or scores.device.type == "cpu":
            self.check()
        limit = method.limit(context, scores)
        if self.group is not None:
            scores = agreed(scores, self.group)
            limit = None if limit is None else agreed(limit, self.group)
        if limit is not None:
            # 0 only where 0 were asked for.
            limit = torch.maximum(limit.to(keep), keep.clamp(max=1))
            keep = torch.minimum(keep, limit).where(keep < context.valid.sum(1), keep)
        if any(self.prompt.ends_visual):
            # The next token is read off the last one, so that one is never the first to go.
            last = context.order[context.visual] == self.prompt.end - 1
            scores = scores.masked_fill(last, math.inf)
        return scores, keep

    def choose(
        self, i: int, hidden: Tensor, target: list[int] | None, ahead: Callable
    ) -> tuple[Tensor, Context, Tensor, Tensor]:
        """Rank the visual tokens that enter layer i, choose those that stay, and merge the others.

        target: how many should stay, of each sample; None: all that are left.
        Returns the hidden states (B, N, D) after merging, what the method saw, its scores (B, V),
        and which tokens it chose (B, V) bool. Other arguments as in `context`.
        """
        wanted = target or self.left
        with torch.no_grad():
            context = self.context(i, hidden, wanted, cache(ahead))
            scores, keep = self.score(context)
            self.left = wanted if keep is context.keep else keep.tolist()
            context = replace(context, keep=keep)
            chosen = hard_mask(scores, keep, context.valid, check=False)
            into = None if target is None else self.method.merge(context, chosen)
        return merged(hidden, context, chosen, into), context, scores, chosen

    def check(self) -> None:
        """Raise FloatingPointError, naming the layer, if hidden states or scores were not finite.

        It waits for the device. So in deploy, a device other than the CPU is asked only once, at
        the end of the pass.
        """
        found, self.faulty = self.faulty, {}
        answers = torch.stack([*found.values()]).tolist() if found else []
        for layer, (hidden, scores) in zip(found, answers, strict=True):
            if hidden:
                raise FloatingPointError(
                    f"the hidden states that enter layer {layer} are not finite: check the model's "
                    "inputs and weights, and load it in float32 or bfloat16 (float16 ends at 65504)"
                )
            if scores:
                raise FloatingPointError(
                    f"the scores at layer {layer} contain NaN or infinity: expected numbers (-inf "
                    "for never) that rank the tokens; look for a division by zero, an overflow or "
                    "an all-masked softmax in the scoring method"
                )


def merged(hidden: Tensor, context: Context, kept: Tensor, into: Tensor | None) -> Tensor:
    """`hidden` (B, N, D) where every kept visual token is the mean of those merged into it.

    kept: (B, V) bool. into: (B, V) the slot of a kept token for each, or -1 (see `Method.merge`);
    None: nothing is merged.
    Raises ValueError if a token is merged into one that is not kept.
    """
    if into is None:
        return hidden
    into = into.masked_fill(~context.valid, -1)
    onto_kept = kept.gather(1, into.clamp(min=0)) | (into < 0)
    itself = into == torch.arange(into.shape[1], device=into.device)
    if not bool((onto_kept & (itself | ~kept)).all()):
        raise ValueError(
            "merge must send kept tokens to themselves and the others to a kept slot or to -1"
        )
    x = hidden[context.visual]  # (B, V, D)
    precise = torch.promote_types(x.dtype, torch.float32)
    weight = (into >= 0)[..., None].to(precise)
    where = into.clamp(min=0)[..., None]
    total = torch.zeros_like(x, dtype=precise).scatter_add(1, where.expand_as(x), x * weight)
    count = torch.zeros_like(weight).scatter_add(1, where, weight)
    mean = (total / count.clamp(min=1)).to(x.dtype)
    x = torch.where((kept & (count[..., 0] > 1))[..., None], mean, x)
    return hidden.scatter(1, context.visual[1][..., None].expand_as(x), x)
