"""Prefill: what is known of the prompt while one forward pass runs, and how its tokens are ranked and merged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..config import whole_tokens
from .context import Context, before_answer, positions, take_rotary
from ._attention import Bound
from ._masks import Packed

NOTHING = torch.empty(0)


@dataclass
class Prefill:
    """One prompt. B samples, S tokens, at most V visual ones each."""

    inputs: dict  # what the backbone was called with
    visual: Tensor  # (B, S) bool
    real: Tensor  # (B, S) bool: not padding
    prompt: Tensor  # (B, S) bool: real and before the answer
    n_visual: list[int]
    n_real: list[int]
    tail: list[int]  # 1 where the last token is padding
    ends_visual: list[int]  # 1 where the last token is visual: the next one is read off it
    plain: bool  # whether the model's mask is nothing but causal and padding
    left: list[int]  # visual tokens that remain, per sample
    ratios: list[list[float]]  # (B, L) on the host
    embeddings: Tensor = NOTHING  # (B, S, D), once the decoder is called
    late: Any = None  # what the decoder would add between its layers, as the adapter took it out
    rotary: tuple | None = None  # of the layer just run, for the tokens it ran on
    mask: Tensor | None = None  # the model's own, of the layer just run
    captured: dict[str, Tensor] = field(default_factory=dict)  # its queries and keys before rotary embedding
    packed: Packed | None = None  # deploy: the tokens that remain
    bound: Bound = field(default_factory=Bound)  # search: of the gradient by each token's mask
    policy: Tensor | None = None  # search: (B, S) straight-through mask so far
    faulty: dict[int, Tensor] = field(default_factory=dict)  # whether hidden states, scores were, at each step: see `check`
    steps: dict[int, Tensor | Packed] = field(default_factory=dict)  # packed or policy, at each step
    sources: dict[str, Callable[[], Any]] = field(default_factory=dict)  # what methods may ask for, made once, on demand
    moved: dict[tuple, Tensor] = field(default_factory=dict)  # what `follow` has moved of the layers' arguments

    @classmethod
    def start(cls, inputs: dict, visual: Tensor, labels: Tensor | None, causal: bool, ratios: Tensor) -> Prefill:
        """inputs: the caller's. causal: whether no token of this model sees ahead. ratios: (L,) or (B, L).

        Raises ValueError if several prompts are packed into a row, one after the other.
        """
        mask = inputs.get("attention_mask")
        plain = mask is None or mask.ndim == 2
        real = mask.bool() if mask is not None and plain else torch.ones_like(visual)
        visual = visual & real
        flags = [visual.sum(1), real.sum(1), ~real[:, -1], visual[:, -1], starts(inputs, visual)]
        n_visual, n_real, tail, ends, restarts = torch.stack(flags).tolist()  # the one synchronisation
        if any(n_visual) and (any(restarts) or inputs.get("cu_seq_lens_q") is not None):
            raise ValueError("several prompts are packed into one row (position_ids start again, or cu_seq_lens_q is given), "
                             "and would be pruned as one: give each a row of its own, padded")
        return cls(inputs, visual, real, before_answer(real, labels), n_visual, n_real, tail, ends, causal and plain, n_visual,
                   ratios.detach().expand(len(n_visual), -1).tolist())

    def check(self) -> None:
        """Raise FloatingPointError, naming the layer, if what was ranked, or the scores, were not finite.

        It waits for the device: so in deploy, a device other than the CPU is asked once, at the end of the pass.
        """
        found, self.faulty = self.faulty, {}
        for layer, (hidden, scores) in zip(found, torch.stack([*found.values()]).tolist() if found else ()):
            if hidden:
                raise FloatingPointError(f"the hidden states that enter layer {layer} are not finite: check the model's inputs "
                                         "and weights, and load it in float32 or bfloat16 (float16 ends at 65504)")
            if scores:
                raise FloatingPointError(f"the scores at layer {layer} contain NaN or infinity: expected numbers (-inf for never) "
                                         "that rank the tokens; look for a division by zero, an overflow or an all-masked "
                                         "softmax in the scoring method")

    def release(self) -> None:
        """Let go of what only this forward pass needed; `steps` stay."""
        self.inputs, self.captured, self.sources, self.moved = {}, {}, {}, {}
        self.embeddings, self.late, self.rotary, self.mask = NOTHING, None, None, None

    def follow(self, hidden: Tensor, kwargs: dict) -> dict:
        """Of a model spread over devices: bring what is known to where `hidden` is; returns a layer's arguments there."""
        device = hidden.device
        if self.visual.device != device:
            for name in ("visual", "real", "prompt", "embeddings", "rotary", "mask", "captured", "policy", "faulty"):
                setattr(self, name, tree_map_only(Tensor, lambda x: x.to(device), getattr(self, name)))
            if self.packed is not None:
                self.packed = replace(self.packed, order=self.packed.order.to(device), valid=self.packed.valid.to(device))

        def here(x: Tensor) -> Tensor:  # every layer is given the same ones, all on the decoder's device
            key = (id(x), device)
            if x.device != device and key not in self.moved:
                self.moved[key] = x.to(device)
            return self.moved.get(key, x)

        names = {"attention_mask", "position_ids", "position_embeddings"} & kwargs.keys()
        return {**kwargs, **tree_map_only(Tensor, here, {name: kwargs[name] for name in names})}

    def cut(self, i: int) -> bool:
        """Whether fewer tokens are to enter layer i than the layer before."""
        return any(i < len(row) and row[i] < (row[i - 1] if i else 1) for row in self.ratios)

    def target(self, i: int) -> list[int] | None:
        """Visual tokens of each sample that may enter layer i, or None if that drops none."""
        target = [min(left, whole_tokens(row[i], n)) for row, left, n in zip(self.ratios, self.left, self.n_visual)]
        if any(end and n and not t for end, n, t in zip(self.ends_visual, self.n_visual, target)):
            raise ValueError("a prompt ends in a visual token, from which its answer would be read, and the configuration "
                             "drops them all: put text after the image, or keep at least one token")
        return target if target != self.left else None

    def places(self, hidden: Tensor) -> Tensor:
        """Original positions (B, N) of the tokens in `hidden`."""
        if self.packed is not None:
            return self.packed.order
        return torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[0], -1)

    def context(self, i: int, hidden: Tensor, kwargs: dict, target: list[int], adapter, exhaustive: bool) -> Context:
        """What a method sees at the input of layer i."""
        order, rotary = self.places(hidden), kwargs["position_embeddings"]
        if self.packed is None:
            present = self.real if self.policy is None else self.real & (self.policy > 0)
            visual = self.visual
        else:
            rotary = take_rotary(rotary, order)
            present = self.packed.valid & self.real.gather(1, order)
            visual = self.packed.valid & self.visual.gather(1, order)
        index, there = positions(visual, max(self.n_visual if self.packed is None else self.left))
        prompt = present & self.prompt.gather(1, order)
        columns = torch.arange(hidden.shape[1], device=hidden.device)
        return Context(
            layer=i, hidden=hidden, visual=index, valid=there & present[index], visual_mask=visual & present,
            text_mask=prompt & ~visual, present=present, order=order, adapter=adapter, exhaustive=exhaustive,
            slot=(self.visual.cumsum(1) - 1).gather(1, order)[index], n_visual=self.visual.sum(1),
            keep=torch.tensor(target).to(hidden.device, non_blocking=True), last=(prompt * columns).argmax(1, keepdim=True),
            inputs=self.embeddings, sources=self.sources,
            captured={**self.captured, "cached": self.cached(i - 1, hidden, kwargs.get("past_key_values")),
                      "rotary": {i - 1: self.rotary, i: rotary},
                      "mask": {i - 1: self.mask, i: kwargs.get("attention_mask")}})

    @staticmethod
    def cached(layer: int, hidden: Tensor, cache) -> Tensor | None:
        """The keys (B, G, N, E) that this layer has put into the cache, after rotary embedding, if they are all there."""
        keys = getattr(cache.layers[layer], "keys", None) if cache is not None and 0 <= layer < len(cache.layers) else None
        return keys if keys is not None and keys.ndim == 4 and keys.shape[-2] == hidden.shape[1] else None

    def rank(self, method, context: Context, target: list[int]) -> tuple[Tensor, list[int]]:
        """The method's scores (B, V), and `target` lowered to the method's limit, if it has one (as `context.keep` is)."""
        scores = method.score(context)
        if scores.shape != context.valid.shape:
            raise ValueError(f"{type(method).__name__}.score returned shape {tuple(scores.shape)}, expected one score per "
                             f"visual slot, {tuple(context.valid.shape)}: index with [ctx.visual]")
        sums = context.hidden.sum(-1, dtype=torch.promote_types(context.hidden.dtype, torch.float32))
        self.faulty[context.layer] = torch.stack([(~sums.isfinite() & context.present).any(),
                                                  (~(scores < math.inf) & context.valid).any()])
        if context.exhaustive or scores.device.type == "cpu":
            self.check()
        limit = method.limit(context, scores)
        if limit is not None:
            limit = torch.maximum(limit.to(context.keep), context.keep.clamp(max=1))  # 0 only where 0 were asked for
            drops = context.keep < context.valid.sum(1)  # others are here for the sake of their batch mates only
            context.keep = torch.minimum(context.keep, limit).where(drops, context.keep)
            target = context.keep.tolist()
        if any(self.ends_visual):  # the next token is read off the last one, so that one is never the first to go
            last = context.order[context.visual] == self.visual.shape[1] - 1
            scores = scores.masked_fill(last, float("inf"))
        return scores, target


def starts(inputs: dict, visual: Tensor) -> Tensor:
    """(B,) how often positions go back within a row, by which Hugging Face knows several prompts in one (given no mask)."""
    ids = inputs.get("position_ids")
    if ids is None or inputs.get("attention_mask") is not None or ids.ndim == 3 and len(ids) == 3:
        return torch.zeros_like(visual[:, 0], dtype=torch.long)
    ids = ids[0] if ids.ndim == 3 else ids  # of text, of images in time, height and width
    return (ids.diff(dim=1) < 0).sum(1).expand(len(visual))


def merged(hidden: Tensor, context: Context, kept: Tensor, into: Tensor | None) -> Tensor:
    """`hidden` (B, N, D) with every kept visual token replaced by the mean of those that are merged into it.

    kept: (B, V) bool. into: (B, V) the slot of a kept token for each, or -1; see `Method.merge`. None: as it is.
    """
    if into is None:
        return hidden
    into = into.masked_fill(~context.valid, -1)
    onto_kept = kept.gather(1, into.clamp(min=0)) | (into < 0)
    itself = into == torch.arange(into.shape[1], device=into.device)
    if not bool((onto_kept & (itself | ~kept)).all()):
        raise ValueError("merge must send kept tokens to themselves and the others to a kept slot or to -1")
    x = hidden[context.visual]  # (B, V, D)
    precise = torch.promote_types(x.dtype, torch.float32)
    weight = (into >= 0)[..., None].to(precise)
    where = into.clamp(min=0)[..., None]
    total = torch.zeros_like(x, dtype=precise).scatter_add(1, where.expand_as(x), x * weight)
    count = torch.zeros_like(weight).scatter_add(1, where, weight)
    mean = (total / count.clamp(min=1)).to(x.dtype)
    x = torch.where((kept & (count[..., 0] > 1))[..., None], mean, x)
    return hidden.scatter(1, context.visual[1][..., None].expand_as(x), x)
