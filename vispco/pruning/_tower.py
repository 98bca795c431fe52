"""What the vision tower says of its patches: the attention they receive there, and their keys.

For methods that prune before the language model read it (VisionZip, VisPruner). One layer is read,
whose output becomes the visual tokens. No attention implementation is forced: queries and keys are
caught where they are projected, and multiplied once more if a method asks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ._hooks import Replaced
from .context import column_sum, masked_softmax, without_overflow

#: Attention probabilities that are held at a time.
CHUNK = 2**24


class Tower:
    """Listens to one attention layer of an adapter's vision tower.

    inputs: what the features of the prompt's images and videos were made from (`image_grid_thw`,
        `image_sizes`, ...). `generate` makes the features before it calls the model.
    """

    def __init__(self, adapter: Any):
        self.adapter = adapter
        self.inputs: dict[str, Any] = {}
        # By kind: what went through the attention.
        self._seen: dict[str, dict[str, Any]] = {}
        # "image" or "video", while its features are being made.
        self._kind: str | None = None
        # A backbone that makes them in its own forward pass: whatever runs is of images.
        self._always = not hasattr(adapter.backbone, "get_image_features")

    def register(self, add: Callable, attention: bool = True, turn: Callable = nullcontext) -> None:
        """Start to listen; `add` gets handles with `.remove()`.

        attention: whether `read` will be called. turn: makes the context that features are made in.
        """
        for kind in ("image", "video"):
            name, around = f"get_{kind}_features", partial(self._listen, kind, turn)
            if hasattr(self.adapter.backbone, name):
                add(Replaced(self.adapter.backbone, name, around))
        if attention:
            module = self.adapter.vision_attention()
            add(module.register_forward_pre_hook(self._on_attention, with_kwargs=True))
            for part, projection in self.adapter.vision_projections(module).items():
                add(projection.register_forward_hook(partial(self._on_projection, part)))

    def clear(self) -> None:
        """Forget the prompt."""
        self.inputs, self._seen = {}, {}

    def sources(self, method: Any, inputs: dict, visual: Tensor) -> dict[str, Callable[[], Any]]:
        """What a method may ask of the vision side: made when first asked for, then kept.

        inputs: keyword arguments of the backbone. visual: (B, S) bool.
        """

        def source(flag: str, make: Callable) -> Callable[[], Any]:
            def made() -> Any:
                if not getattr(method, flag):
                    raise ValueError(
                        f"{type(method).__name__} looks at the vision side: set {flag} = True in "
                        "the class"
                    )
                return make({**inputs, **self.inputs}, visual)

            return cache(made)

        return {
            "tower": source("reads_vision", self.read),
            "grid": source("reads_grid", self.adapter.grid),
        }

    def _listen(self, kind: str, turn: Callable, make: Callable[[], Any], given: dict) -> Any:
        with turn():
            if self._kind is not None:
                # Some make the features of videos with the method for images.
                return make()
            self._kind, self._seen[kind] = kind, {"inputs": given}
            try:
                features = make()
            finally:
                self._kind = None
            self.inputs.update(given)
            if hasattr(features, "pooler_output"):
                # `generate` hands this to the model, perhaps at every step.
                features.vispco = self._seen[kind]
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

    # ---- reading --------------------------------------------------------------------------------
    def read(self, inputs: dict, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Attention that each visual token receives (B, S), and its head-mean keys (B, S, E).

        Both are 0 at text. A patch receives the softmax attention of the class token, if the tower
        has one. Otherwise it receives that of all patches of its image (frame, or what the layer
        attends within), averaged. It is always averaged over heads. Keys are those before rotary
        embedding. A token has the mean over the patches it was made of.

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
                raise ValueError(
                    "the method reads the vision tower, which did not run for this prompt's "
                    f"{kind} tokens: pass pixels to the pruned model, not ready-made features"
                )
            patches, made_from = self._patches(seen), {**inputs, **seen["inputs"]}
            full = full + placed(adapter.tokens_from_patches(patches, made_from, kind), mask)
        full = full * visual[..., None]
        return full[..., 0], full[..., 1:]

    def _patches(self, seen: dict) -> Tensor:
        """Attention and keys of each patch, in order: (tiles, n, 1 + E), or (n, 1 + E)."""
        heads = self.adapter.vision_heads(self.adapter.config)
        if "fused" in seen:
            # Pieces of any length, one after the other: (patches, H, E).
            query, key, _ = seen["fused"].unflatten(-1, (3, heads, -1)).unbind(-3)
            rotary = [part[:, None] for part in seen["position_embeddings"]]  # (patches, 1, E)
            sizes = seen["cu_seqlens"].diff().tolist()
            q, k = (turned(x, *rotary).to(x.dtype).split(sizes) for x in (query, key))
            attention = torch.cat(list(map(received, q, k)))
        else:
            # (tiles, n, H, E)
            query, key = (seen[part].unflatten(-1, (heads, -1)) for part in ("query", "key"))
            if self.adapter.class_token(self.adapter.config):
                product = without_overflow(query[:, :1]) * without_overflow(key)
                logits = full_precision(product.sum(-1)) * query.shape[-1] ** -0.5
                attention = logits.softmax(1).mean(-1)
            else:
                real = real_patches(seen.get("attention_mask"), key.shape[:2])
                attention = torch.stack(list(map(received, query, key, real)))
        return torch.cat([attention[..., None], full_precision(key).mean(-2).to(attention)], -1)


def ready_made(inputs: dict, kind: str) -> dict | None:
    """What was heard when the features in `inputs` were made; None if there are none."""
    features = (inputs.get("mm_encoder_outputs") or {}).get(kind)
    return None if features is None else getattr(features, "vispco", {})


def received(query: Tensor, key: Tensor, real: Tensor | None = None) -> Tensor:
    """Attention (n,) that each of n patches gets, the mean over heads and query rows.

    query, key: (n, H, E). real: (n,) bool, False for patches of padding, which neither get nor
    give. It is computed in chunks of query rows.
    """
    n, heads, size = query.shape
    rows, columns = without_overflow(query).transpose(0, 1), without_overflow(key).permute(1, 2, 0)
    real = torch.ones(n, dtype=torch.bool, device=key.device) if real is None else real
    step = max(1, CHUNK // (n * heads))
    total = rows.new_zeros(n)
    for chunk, gives in zip(rows.split(step, 1), real.split(step), strict=True):
        logits = full_precision(chunk @ columns) * size**-0.5  # (H, rows, n)
        attention = masked_softmax(logits, ~real).masked_fill(~gives[:, None], 0.0)
        total = total + column_sum(attention, (0, 1))
    return total / (heads * real.sum().clamp(min=1))


def real_patches(mask: Tensor | None, shape: tuple[int, int]) -> Tensor | list[None]:
    """(tiles, patches) bool, from the tower's mask.

    mask: boolean or additive (tiles, 1, n, n), or (tiles, n); None: all are real.
    """
    if mask is None:
        return [None] * shape[0]
    mask = mask if mask.ndim == 2 else mask[:, 0, 0]
    mask = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask.bool()
    return mask.expand(shape)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x` (..., E), whose halves are pairs, at least as precise as `cos`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin


def full_precision(x: Tensor) -> Tensor:
    """float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def placed(tokens: Tensor, mask: Tensor) -> Tensor:
    """Put `tokens` (n, C) at the True places of `mask` (B, S), in order: (B, S, C), 0 elsewhere.

    Beam search repeats each row of the mask, but not what was made of its images: rows then get
    copies.
    Raises ValueError if the numbers do not fit.
    """
    copies = max(1, int(mask.sum()) // max(1, len(tokens)))
    rows = mask[::copies]
    if int(rows.sum()) != len(tokens) or len(mask) % copies:
        raise ValueError(
            f"the vision tower's patches make {len(tokens)} tokens, but the prompt has "
            f"{int(mask.sum())} visual ones: pass the images of just this prompt, at the sizes "
            "that its processor gives"
        )
    full = tokens.new_zeros(*rows.shape, tokens.shape[-1], device=mask.device)
    full = full.masked_scatter(rows[..., None], tokens.to(mask.device))
    return full.repeat_interleave(copies, 0)
