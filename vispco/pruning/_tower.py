"""What the vision tower says of its patches: the attention they receive there, and their keys.

For methods that prune before the language model read it (VisionZip, VisPruner). One layer is read,
whose output becomes the visual tokens. No attention implementation is forced: queries and keys are
heard where the layer hands them to its attention function, and multiplied once more if a method
asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..reading.hearing import Hearing
from ..reading.sharding import split_weights
from ._hooks import Replaced
from .context import column_sum, masked_softmax, products

#: Attention probabilities that are held at a time.
CHUNK = 2**24


class Tower:
    """Listens to one attention layer of an adapter's vision tower.

    group: of the processes over which the heads of the decoder are split; None: they are not.
    inputs: what the features of the prompt's images and videos were made from (`image_grid_thw`,
        `image_sizes`, ...). `generate` makes the features before it calls the model.
    """

    def __init__(self, adapter: Any, group: Any = None):
        self.adapter, self.group = adapter, group
        self.inputs: dict[str, Any] = {}
        # By kind: what went through the attention.
        self._seen: dict[str, dict[str, Any]] = {}
        # "image" or "video", while its features are being made.
        self._kind: str | None = None
        # A backbone that makes them in its own forward pass: whatever runs is of images.
        self._always = not hasattr(adapter.backbone, "get_image_features")

    def register(
        self,
        add: Callable,
        attention: bool = True,
        depths: Iterable[float] = (),
        turn: Callable = nullcontext,
    ) -> None:
        """Start to listen; `add` gets handles with `.remove()`.

        attention: whether `read` will be called. depths: of further layers that it will be asked
        for. turn: makes the context that features are made in.
        """
        for kind in ("image", "video"):
            name, around = f"get_{kind}_features", partial(self._listen, kind, turn)
            if hasattr(self.adapter.backbone, name):
                add(Replaced(self.adapter.backbone, name, around))
        if attention:
            # Several depths of a shallow tower may be one layer, which has one listener.
            layers: dict[Any, list] = {}
            for depth in (None, *depths):
                layers.setdefault(self.adapter.vision_layer(depth), []).append(depth)
            for layer, named in layers.items():
                if self.group is not None and any(True for _ in split_weights(layer)):
                    raise ValueError(
                        "the vision tower is sharded by tensor parallelism, and the method reads "
                        "its attention: leave the tower out of the plan, or use another method"
                    )
                add(Hearing(layer.modules(), partial(self._on_heard, named)))

    def clear(self) -> None:
        """Forget the prompt."""
        self.inputs, self._seen = {}, {}

    def sources(self, method: Any, inputs: dict, visual: Tensor) -> dict[str, Any]:
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
            "depths": {
                depth: source("reads_vision", partial(self.read, depth=depth))
                for depth in method.vision_depths
            },
            "grid": source("reads_grid", self.adapter.grid),
        }

    def _listen(self, kind: str, turn: Callable, make: Callable[[], Any], given: dict) -> Any:
        with turn():
            if self._kind is not None:
                # Some make the features of videos with the method for images.
                return make()
            self._kind, self._seen[kind] = kind, {"inputs": given, "heard": {}}
            try:
                features = make()
            finally:
                self._kind = None
            self.inputs.update(given)
            if hasattr(features, "pooler_output"):
                # `generate` hands this to the model, perhaps at every step.
                features.vispco = self._seen[kind]
            return features

    def _on_heard(self, depths: list, query: Tensor, key: Tensor, options: dict) -> None:
        kind = "image" if self._kind is None and self._always else self._kind
        if kind is not None:
            seen = self._seen.setdefault(kind, {"inputs": {}, "heard": {}})
            mask, scaling = options.get("attention_mask"), options.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            query, key, ends = query.detach(), key.detach(), options.get("cu_seq_lens_q")
            # FlashAttention gets all tiles in one row, and where each of them ends.
            sizes = [query.shape[2]] if ends is None else ends.diff().tolist()
            for q, k in zip(query.split(sizes, 2), key.split(sizes, 2), strict=True):
                for depth in depths:
                    seen["heard"].setdefault(depth, []).append((q, k, mask, scaling))

    # ---- reading --------------------------------------------------------------------------------
    def read(
        self, inputs: dict, visual: Tensor, depth: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention that each visual token receives (B, S), and its head-mean keys (B, S, E).

        Both are 0 at text. A patch receives the softmax attention of the class token, if the tower
        has one. Otherwise it receives that of all patches of its image (frame, or what the layer
        attends within), averaged. It is always averaged over heads. Keys are as the
        attention uses them. A token has the mean over the patches it was made of.

        inputs: keyword arguments of the backbone. visual: (B, S) bool.
        depth: of another layer than the one whose output becomes the tokens.
        Raises ValueError if there are visual tokens and the tower did not run.
        """
        adapter = self.adapter
        full = torch.zeros(*visual.shape, 1, device=visual.device)
        for kind, mask in adapter.kinds(inputs).items():
            if not bool((mask & visual).any()):
                continue
            seen = ready_made(inputs, kind)
            seen = self._seen.get(kind, {}) if seen is None else seen
            heard = seen.get("heard", {}).get(depth)
            if not heard:
                raise ValueError(
                    "the method reads the vision tower, which did not run for this prompt's "
                    f"{kind} tokens: pass pixels to the pruned model, not ready-made features"
                )
            patches = of_patches(heard, adapter.class_token(adapter.config))
            made_from = {**inputs, **seen["inputs"]}
            full = full + placed(adapter.tokens_from_patches(patches, made_from, kind), mask)
        full = full * visual[..., None]
        return full[..., 0], full[..., 1:]


def of_patches(heard: list, class_token: bool) -> Tensor:
    """Attention and keys of each patch, in order: (tiles, n, 1 + E).

    A tower whose tiles differ in size calls its attention for one after the other. Then n is of
    all of them, as of one tile.
    heard: of each call query (tiles, H, n, E), key (tiles, G, n, E), mask, and scaling.
    class_token: whether the first patch is one, whose row alone is read.
    """
    calls = [_of_call(q, k, mask, scaling, class_token) for q, k, mask, scaling in heard]
    return calls[0] if len(calls) == 1 else torch.cat(calls, 1)


def _of_call(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, class_token: bool
) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    if class_token:
        # One tile after the other: products in full precision take twice the memory of keys.
        each = zip(full_precision(query[:, :, :1]), key, strict=True)
        rows = torch.stack([(one * keys).sum(-1) for one, keys in each])
        attention = (rows * scaling).softmax(-1).mean(1)
    else:
        real = real_patches(mask, (len(key), key.shape[2]))
        tiles = zip(query, key, real, strict=True)
        attention = torch.stack([received(*tile, scaling=scaling) for tile in tiles])
    return torch.cat([attention[..., None], full_precision(key).mean(1).to(attention)], -1)


def ready_made(inputs: dict, kind: str) -> dict | None:
    """What was heard when the features in `inputs` were made; None if there are none."""
    features = (inputs.get("mm_encoder_outputs") or {}).get(kind)
    return None if features is None else getattr(features, "vispco", {})


def received(
    query: Tensor, key: Tensor, real: Tensor | None = None, scaling: float | None = None
) -> Tensor:
    """Attention (n,) that each of n patches gets, the mean over heads and query rows.

    query, key: (H, n, E). real: (n,) bool, False for patches of padding, which neither get nor
    give. scaling: of q k^T; None: E^-1/2. It is computed in chunks of query rows.
    """
    heads, n, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    real = torch.ones(n, dtype=torch.bool, device=key.device) if real is None else real
    step = max(1, CHUNK // (n * heads))
    total: Any = 0.0
    for chunk, gives in zip(query.split(step, 1), real.split(step), strict=True):
        logits = products(chunk, key) * scaling  # (H, rows, n)
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
