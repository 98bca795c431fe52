"""What the vision tower says about its patches: how much attention they receive there, and their keys.

Methods that prune before the language model read it (VisionZip, VisPruner). One layer is read, that whose
output becomes the visual tokens, and no attention implementation is forced: queries and keys are caught where
they are projected, and multiplied once more if a method asks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ._hooks import Replaced, named

from .context import column_sum, masked_softmax, without_overflow

CHUNK = 2**24  # attention probabilities at a time

class Tower:
    """Listens to one attention layer of an adapter's vision tower.

    inputs: what the features of the prompt's images and videos were made from (`image_grid_thw`,
        `image_sizes`, ...). `generate` makes them before it calls the model, and hands it the features only.
    """

    def __init__(self, adapter):
        self.adapter = adapter
        self.inputs: dict[str, Any] = {}
        self._kind: str | None = None  # "image" or "video", while its features are being made
        self._always = False  # a backbone that makes them in its own forward pass: whatever runs is of images
        self._seen: dict[str, dict[str, Any]] = {}  # by kind: what went through the attention

    def register(self, add: Callable, attention: bool = True, turn: Callable = nullcontext) -> None:
        """Start to listen; `add` gets handles with `.remove()`. attention: whether `read` will be called. turn: makes the
        context that features are made in."""
        backbone = self.adapter.backbone
        self._always = not hasattr(backbone, "get_image_features")
        for kind in ("image", "video"):
            if hasattr(backbone, f"get_{kind}_features"):
                add(Replaced(backbone, f"get_{kind}_features", functools.partial(self._listening, kind, turn)))
        if attention:
            module = self.adapter.vision_attention()
            add(module.register_forward_pre_hook(self._on_attention, with_kwargs=True))
            for part, projection in self.adapter.vision_projections(module).items():
                add(projection.register_forward_hook(functools.partial(self._on_projection, part)))

    def clear(self) -> None:
        """Forget the prompt."""
        self.inputs, self._seen = {}, {}

    def _listening(self, kind: str, turn: Callable, method: Callable) -> Callable:
        arguments = named(method)

        def features(*args, **kwargs):
            with turn():
                if self._kind is not None:  # some make the features of videos with the method for images
                    return method(*args, **kwargs)
                made_from = arguments(args, kwargs)
                self._kind, self._seen[kind] = kind, {"inputs": made_from}
                try:
                    out = method(*args, **kwargs)
                finally:
                    self._kind = None
                self.inputs.update(made_from)
                if hasattr(out, "pooler_output"):  # `generate` hands this to the model, perhaps at every step
                    out.vispco = self._seen[kind]
                return out

        return features

    def _hears(self) -> dict | None:
        """Where to put what goes through the attention just now, if anywhere."""
        if self._kind is not None:
            return self._seen.get(self._kind)
        return self._seen.setdefault("image", {"inputs": {}}) if self._always else None

    def _on_attention(self, module, args, kwargs):
        heard = self._hears()
        if heard is not None:
            names = ("attention_mask", "cu_seqlens", "position_embeddings")
            heard.update({name: kwargs.get(name) for name in names})

    def _on_projection(self, part: str, module, args, output):
        heard = self._hears()
        if heard is not None:
            heard[part] = output.detach()

    # ---- reading ----------------------------------------------------------------------------------------
    def read(self, inputs: dict, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Attention that each visual token receives (B, S), and its head-mean keys (B, S, E); 0 at text.

        A patch receives the softmax attention of the class token, if the tower has one, otherwise that of all
        patches of its image (frame, or what the layer attends within), averaged; always averaged over heads.
        Keys are those before rotary embedding. A token has the mean over the patches it was made of.

        inputs: keyword arguments of the backbone. visual: (B, S) bool.
        Raises ValueError if there are visual tokens and the tower did not run.
        """
        adapter = self.adapter
        width = 1 + adapter.vision_head_dim(adapter.config)
        full = torch.zeros(*visual.shape, width, device=visual.device)
        for kind, mask in adapter.kinds(inputs).items():
            if not bool((mask & visual).any()):
                continue
            seen = ready_made(inputs, kind)
            seen = self._seen.get(kind, {}) if seen is None else seen
            if not {"fused", "key"} & seen.keys():
                raise ValueError("the method reads the vision tower, which did not run for this prompt's "
                                 f"{kind} tokens: pass pixels to the pruned model, not ready-made features")
            tokens = adapter.tokens_from_patches(self._patches(seen), {**inputs, **seen["inputs"]}, kind)
            full = full + placed(tokens, mask)
        full = full * visual[..., None]
        return full[..., 0], full[..., 1:]

    def _patches(self, seen: dict) -> Tensor:
        """Attention and keys of each patch, in the tower's order: (tiles, n, 1 + E), or (n, 1 + E)."""
        heads = self.adapter.vision_heads(self.adapter.config)
        if "fused" in seen:  # pieces of any length, one after the other
            query, key, _ = seen["fused"].unflatten(-1, (3, heads, -1)).unbind(-3)  # (patches, H, E)
            rotary = [part[:, None] for part in seen["position_embeddings"]]  # (patches, 1, E)
            q, k = (turned(x, *rotary).to(x.dtype) for x in (query, key))
            sizes = seen["cu_seqlens"].diff().tolist()
            attention = torch.cat([received(*piece) for piece in zip(q.split(sizes), k.split(sizes))])
        else:
            query, key = (seen[p].unflatten(-1, (heads, -1)) for p in ("query", "key"))  # (tiles, n, H, E)
            if self.adapter.class_token(self.adapter.config):
                logits = full_precision((without_overflow(query[:, :1]) * without_overflow(key)).sum(-1)) * query.shape[-1] ** -0.5
                attention = logits.softmax(1).mean(-1)
            else:
                real = real_patches(seen.get("attention_mask"), key.shape[:2])
                attention = torch.stack([received(*tile) for tile in zip(query, key, real)])
        return torch.cat([attention[..., None], full_precision(key).mean(-2).to(attention)], -1)


def ready_made(inputs: dict, kind: str) -> dict | None:
    """What was heard when the features in the backbone's `inputs` were made; None if there are none."""
    features = (inputs.get("mm_encoder_outputs") or {}).get(kind)
    return None if features is None else getattr(features, "vispco", {})


def received(query: Tensor, key: Tensor, real: Tensor | None = None) -> Tensor:
    """Attention (n,) that each of n patches gets, mean over heads and query rows. query, key: (n, H, E).

    real: (n,) bool, False for patches of padding, which neither get nor give. In chunks of query rows.
    """
    n, heads, size = query.shape
    query, columns, total = without_overflow(query), without_overflow(key).permute(1, 2, 0), query.new_zeros(n)
    real = torch.ones(n, dtype=torch.bool, device=key.device) if real is None else real
    step = max(1, CHUNK // (n * heads))
    for rows, weight in zip(query.transpose(0, 1).split(step, 1), real.split(step)):
        logits = full_precision(rows @ columns) * size**-0.5  # (H, rows, n)
        total = total + column_sum(masked_softmax(logits, ~real).masked_fill(~weight[:, None], 0.0), (0, 1))
    return total / (heads * real.sum().clamp(min=1))


def real_patches(mask: Tensor | None, shape: tuple[int, int]) -> Tensor | list[None]:
    """(tiles, patches) bool from the tower's mask: boolean or additive (tiles, 1, n, n), or (tiles, n)."""
    if mask is None:
        return [None] * shape[0]
    mask = mask if mask.ndim == 2 else mask[:, 0, 0]
    mask = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
    return mask.expand(shape)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x` (..., E), the halves of E being pairs. At least in the precision of `cos`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin


def full_precision(x: Tensor) -> Tensor:
    """float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def placed(tokens: Tensor, mask: Tensor) -> Tensor:
    """Put `tokens` (n, C) at the True places of `mask` (B, S), in order: (B, S, C), 0 elsewhere.

    Beam search repeats each row of the mask, and not what was made of its images: rows then get copies.
    Raises ValueError if the numbers do not fit.
    """
    copies = max(1, int(mask.sum()) // max(1, len(tokens)))
    rows = mask[::copies]
    if int(rows.sum()) != len(tokens) or len(mask) % copies:
        raise ValueError(f"the vision tower's patches make {len(tokens)} tokens, but the prompt has "
                         f"{int(mask.sum())} visual ones: pass the images of just this prompt, at the sizes "
                         "that its processor gives")
    full = tokens.new_zeros(*rows.shape, tokens.shape[-1], device=mask.device)
    full = full.masked_scatter(rows[..., None], tokens.to(mask.device))
    return full.repeat_interleave(copies, 0)
