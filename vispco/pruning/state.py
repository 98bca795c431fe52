"""State of a forward pass: what changes from layer to layer, and how tokens are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..relaxation import hard_mask
from ._masks import Packed
from .context import Context, positions, take_rotary
from .prompt import Prompt


@dataclass
class PassState:
    """One prompt on its way through the layers.

    exhaustive: whether tokens are ranked at layers that drop none, too, and all of them.
    counts: for each layer, the visual tokens that may enter it, of each sample.
    left: visual tokens that remain, of each sample.
    sources: what methods may ask of the vision side, made on demand.
    embeddings: (B, S, D) input of the decoder.
    packed: deploy, the tokens that remain; None until a token was dropped.
    policy: search, the product of the masks so far (B, S); None until there was one.
    rotary, mask: rotary embeddings of the tokens in the layer just run, and the model's own mask.
    captured: queries and keys of the layer just run, before rotary embedding.
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
    embeddings: Any = None
    packed: Packed | None = None
    policy: Tensor | None = None
    rotary: tuple[Tensor, ...] | None = None
    mask: Tensor | None = None
    captured: dict[str, Tensor] = field(default_factory=dict)
    faulty: dict[int, Tensor] = field(default_factory=dict)
    memo: dict = field(default_factory=dict)

    def follow(self, device: torch.device, kwargs: dict) -> dict:
        """Of a model spread over devices: bring all that is known to `device`.

        Returns a layer's arguments there. Every layer is given the same, on the decoder's device.
        """
        if self.prompt.visual.device != device:
            self.memo = {}
            vars(self).update(vars(on_device(self, device)))

        def here(x: Tensor) -> Tensor:
            key = ("moved", id(x))
            if x.device != device and key not in self.memo:
                self.memo[key] = x.to(device)
            return self.memo.get(key, x)

        names = {"attention_mask", "position_ids", "position_embeddings"} & kwargs.keys()
        return {**kwargs, **tree_map_only(Tensor, here, {name: kwargs[name] for name in names})}

    def target(self, i: int) -> list[int] | None:
        """Visual tokens of each sample that may enter layer i, or None if that drops none."""
        target = list(map(min, self.left, self.counts[i])) if i < len(self.counts) else self.left
        samples = zip(self.prompt.ends_visual, self.prompt.n_visual, target, strict=True)
        if any(end and n and not left for end, n, left in samples):
            raise ValueError(
                "a prompt ends in a visual token, from which its answer would be read, and the "
                "configuration drops them all: put text after the image, or keep at least one token"
            )
        return target if target != self.left else None

    def context(self, i: int, hidden: Tensor, kwargs: dict, target: list[int]) -> Context:
        """What a method sees at the input of layer i, of which `target` visual tokens will be kept.

        hidden: (B, N, D), the tokens that are there. kwargs: the arguments of the layer.
        """
        prompt, packed, rotary = self.prompt, self.packed, kwargs["position_embeddings"]
        if packed is None:
            order = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
            present = prompt.real if self.policy is None else prompt.real & (self.policy > 0)
            visual, most = prompt.visual, max(prompt.n_visual)
        else:
            order, rotary = packed.order, take_rotary(rotary, packed.order)
            present = packed.valid & prompt.real.gather(1, order)
            visual, most = packed.valid & prompt.visual.gather(1, order), max(self.left)
        index, there = positions(visual, most)
        question = present & prompt.question.gather(1, order)
        columns = torch.arange(hidden.shape[1], device=hidden.device)
        mask = kwargs.get("attention_mask")
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
            adapter=self.adapter,
            inputs=self.embeddings,
            sources=self.sources,
            captured={
                **self.captured,
                "cached": cached_keys(kwargs.get("past_key_values"), i - 1, hidden.shape[1]),
                "rotary": {i - 1: self.rotary, i: rotary},
                "mask": {i - 1: self.mask, i: mask},
            },
        )

    def score(self, context: Context) -> tuple[Tensor, Tensor]:
        """The method's scores (B, V), and how many tokens to keep (B,).

        That number is `context.keep`, or the method's limit where it is lower. A sample that drops
        nothing here is processed only because others in its batch do: it keeps what it has.
        Raises ValueError for scores of another shape, and FloatingPointError as `check` does.
        """
        method = self.method
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
        if limit is not None:
            # 0 only where 0 were asked for.
            limit = torch.maximum(limit.to(keep), keep.clamp(max=1))
            keep = torch.minimum(keep, limit).where(keep < context.valid.sum(1), keep)
        if any(self.prompt.ends_visual):
            # The next token is read off the last one, so that one is never the first to go.
            last = context.order[context.visual] == self.prompt.visual.shape[1] - 1
            scores = scores.masked_fill(last, math.inf)
        return scores, keep

    def choose(
        self, i: int, hidden: Tensor, kwargs: dict, target: list[int] | None
    ) -> tuple[Tensor, Context, Tensor, Tensor]:
        """Rank the visual tokens that enter layer i, choose those that stay, and merge the others.

        target: how many should stay, of each sample; None: all that are left.
        Returns the hidden states (B, N, D) after merging, what the method saw, its scores (B, V),
        and which tokens it chose (B, V) bool. Other arguments as in `context`.
        """
        wanted = target or self.left
        with torch.no_grad():
            context = self.context(i, hidden, kwargs, wanted)
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


def cached_keys(cache: Any, layer: int, tokens: int) -> Tensor | None:
    """Keys (B, G, tokens, E), after rotary embedding, that a layer has put into the cache.

    None if there is no cache, or if it does not hold just these tokens.
    """
    if cache is None or not 0 <= layer < len(cache.layers):
        return None
    keys = getattr(cache.layers[layer], "keys", None)
    return keys if keys is not None and keys.ndim == 4 and keys.shape[-2] == tokens else None


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


def on_device(x: Any, device: torch.device) -> Any:
    """`x` with all its tensors on `device`: a dataclass, of tensors, dicts or dataclasses."""

    def moved(value: Any) -> Any:
        if is_dataclass(value):
            return on_device(value, device)
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)

    return replace(x, **{each.name: moved(getattr(x, each.name)) for each in fields(x)})
