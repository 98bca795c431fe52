"""Independent ways to compute what vispco computes.

By hand, one sample at a time; they share nothing with its code.
"""

from dataclasses import dataclass

import torch
from torch import nn

from vispco import Method
from vispco.pruning import Dropping, Masking
from vispco.registry import adapter_for


@dataclass
class Trace:
    """A forward pass made by hand.

    hidden[i]: input of layer i.
    attention[i]: weights of layer i (eager models only).
    """

    logits: torch.Tensor
    hidden: list
    attention: list
    places: list


def hook_counts(model):
    """Number of hooks on every module."""
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for m in model.modules()
    ]


def decoder_inputs(model, inputs):
    """What the decoder of an unhooked model receives, and what it gives to each of its layers."""
    decoder, seen, layers = model.get_decoder(), {}, []
    hooks = [decoder.register_forward_pre_hook(lambda m, a, kw: seen.update(kw), with_kwargs=True)]
    hooks += [
        layer.register_forward_pre_hook(
            lambda m, a, kw: layers.append({**kw, "hidden": a[0]}), with_kwargs=True
        )
        for layer in decoder.layers
    ]
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen, layers


@torch.no_grad()
def by_hand(model, inputs, kept=None, upto=None, merged=None):
    """Run the decoder of an unhooked model by hand, layer by layer.

    On ONE unpadded sample, dropping tokens physically.

    kept: {layer: (S,) bool} tokens that enter the layer.
    upto: stop after the attention of that layer.
    merged: {layer: (S,) position of the token that each is averaged into before the dropping, or
    -1}.
    """
    decoder = model.get_decoder()
    seen, given = decoder_inputs(model, inputs)
    hidden, late = given[0]["hidden"], seen.get("deepstack_visual_embeds") or []
    assert hidden.shape[0] == 1
    place = torch.arange(hidden.shape[1])
    trace = Trace(None, [], [], [])
    for i, layer in enumerate(decoder.layers):
        if merged and i in merged:
            target, mean = merged[i][place], hidden.clone()
            for at in target.unique()[target.unique() >= 0]:
                mean[:, place == at] = hidden[:, target == at].mean(1, keepdim=True)
            hidden = mean
        if kept and i in kept:
            stay = kept[i][place]
            hidden, place = hidden[:, stay], place[stay]
        rotary, mask = (
            [x[..., place, :] for x in given[i]["position_embeddings"]],
            given[i]["attention_mask"],
        )
        n = len(place)
        # A mask of the model's own, where it is more than causal.
        if mask is not None:
            mask = mask[..., place, :][..., place]
        else:
            mask = torch.full((n, n), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)[
                None, None
            ]
        trace.hidden.append(hidden)
        trace.places.append(place)
        weights = layer.self_attn(
            layer.input_layernorm(hidden), position_embeddings=rotary, attention_mask=mask
        )[1]
        trace.attention.append(weights)
        if i == upto:
            return trace
        hidden = layer(
            hidden, attention_mask=mask, position_embeddings=rotary, position_ids=place[None]
        )
        # Older releases return a tuple.
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        # Features that the family adds after this layer.
        if i < len(late):
            full = torch.zeros(
                seen["visual_pos_masks"].shape + hidden.shape[2:], dtype=hidden.dtype
            )
            full[seen["visual_pos_masks"]] = late[i]
            hidden = hidden + full[:, place]
    trace.logits = model.lm_head(decoder.norm(hidden))
    return trace


class Witness(Method):
    """Does what another method does, and writes down what that merges.

    merged: {layer: (B, S) position that each token is averaged into, or -1}.
    """

    def __init__(self, method):
        self.method, self.merged = method, {}
        for name in vars(Method).keys() - {"parts"}:
            if not (name.startswith("_") or callable(getattr(Method, name))):
                setattr(self, name, getattr(method, name))

    def score(self, ctx):
        """As the other."""
        return self.method.score(ctx)

    def limit(self, ctx, scores):
        """As the other."""
        return self.method.limit(ctx, scores)

    def merge(self, ctx, kept):
        """As the other."""
        into = self.method.merge(ctx, kept)
        if into is not None:
            place = ctx.order[ctx.visual]
            target = place.gather(1, into.clamp(min=0)).masked_fill((into < 0) | ~ctx.valid, -1)
            self.merged[ctx.layer] = torch.full(ctx.inputs.shape[:2], -1).scatter(1, place, target)
        return into


class Replay(Method):
    """Keeps the tokens it is told to.

    kept: what `Pruner.kept()` returned for the same prompt.
    merged: what `Pruner.merged()` returned for it.
    """

    first_layer = 0

    def __init__(self, kept, merged=None):
        self.kept, self.merged = kept, merged or {}

    def merge(self, ctx, kept):
        """As it is told."""
        if ctx.layer not in self.merged:
            return None
        place, told = ctx.order[ctx.visual], self.merged[ctx.layer]
        slot = torch.zeros(ctx.inputs.shape[:2], dtype=torch.long)
        slot = slot.scatter(1, place, torch.arange(place.shape[1]).expand_as(place))
        told = nn.functional.pad(told, (0, slot.shape[1] - told.shape[1]), value=-1).gather(
            1, place
        )
        return slot.gather(1, told.clamp(min=0)).masked_fill((told < 0) | ~ctx.valid, -1)

    def score(self, ctx):
        """1 for tokens to keep."""
        kept = self.kept[ctx.layer]
        kept = nn.functional.pad(kept, (0, int(ctx.order.max()) + 1 - kept.shape[1]))
        return kept.gather(1, ctx.order)[ctx.visual].float()


class Constant(Method):
    """All scores equal: every choice is a tie."""

    first_layer = 0

    def score(self, ctx):
        """Zeros."""
        return torch.zeros(ctx.valid.shape)


def pruned_with(model, method, ratios, mode="deploy", estimator=None):
    """A handle for a method OBJECT, which needs no registration; `ratios` may require gradients."""
    ratios = (
        ratios if isinstance(ratios, torch.Tensor) else torch.tensor(ratios, dtype=torch.float64)
    )
    given = adapter_for(model)(model), method, ratios
    return (Masking(*given, estimator) if mode == "search" else Dropping(*given)).install()


def error(a, b):
    """Largest difference, relative to the largest magnitude of `b`."""
    return ((a - b).abs().max() / b.abs().max()).item() if b.numel() else 0.0


def rows_alone(inputs, image_of, b):
    """Sample b of a padded batch, without padding and alone. image_of[b]: number of its images."""
    real = inputs["attention_mask"][b].bool()
    alone = {k: inputs[k][b : b + 1, real] for k in ("input_ids", "attention_mask")}
    first = sum(image_of[:b])
    if image_of[b]:
        alone["pixel_values"] = inputs["pixel_values"][first : first + image_of[b]]
    return alone, real
