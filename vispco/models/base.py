"""Adapter: where a Hugging Face vision-language model keeps the things that pruning needs.

The defaults fit every family whose decoder is Llama-like (q_proj, k_proj, half-split rotary embedding) and
that follows the Hugging Face interface (`get_decoder()`, `config.image_token_id`). A family's own file names
its classes and overrides what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..pruning.context import positions
from ..flops import Dimensions
from ..pruning._tower import placed, ready_made, turned
from .towers import class_token, patches, squares


class Adapter:
    """One loaded model, seen by the pruner.

    Subclasses set `architectures` (class names) and `model_types` (of their configurations).
    """

    architectures: ClassVar[tuple[str, ...]] = ()
    model_types: ClassVar[tuple[str, ...]] = ()
    #: No token sees ahead. (Sliding windows are found in the configuration.)
    causal: bool = True

    def __init__(
        self, model: Any
    ):  # to a type checker, any attribute of an nn.Module is a tensor or a module
        self.model = model
        self.config: Any = model.config
        self.decoder = self.model.get_decoder()
        self.layers = self.decoder.layers
        text = self.config.get_text_config(decoder=True)
        windows = ["sliding_attention"] if getattr(text, "sliding_window", None) else []
        self.causal = self.causal and {*(getattr(text, "layer_types", None) or windows)} <= {
            "full_attention"
        }

    # ---- which models -----------------------------------------------------------------------------------
    @classmethod
    def handles(cls, model) -> bool:
        """Whether this family is that of `model` (a module, by its class) or configuration (by its type)."""
        if isinstance(model, nn.Module):
            return any(base.__name__ in cls.architectures for base in type(model).__mro__)
        return getattr(model, "model_type", None) in cls.model_types

    # ---- inputs -----------------------------------------------------------------------------------------
    @property
    def backbone(self) -> Any:
        """The module that receives `input_ids` and merges the image features in."""
        return self.model.model

    def token_ids(self) -> dict[str, int]:
        """Token ids that stand for visual tokens, of an "image" and of a "video"."""
        ids = {kind: getattr(self.config, f"{kind}_token_id", None) for kind in ("image", "video")}
        return {kind: number for kind, number in ids.items() if number is not None}

    def image_token_ids(self) -> list[int]:
        """All of them."""
        return list(self.token_ids().values())

    def visual_mask(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, ids=None
    ) -> Tensor:
        """(B, S) bool: which tokens are visual. ids: only those that these token ids stand for."""
        given = inputs_embeds if input_ids is None else input_ids
        if given is None:
            raise ValueError(
                "the model was called with neither input_ids nor inputs_embeds: give it the prompt"
            )
        ids = torch.tensor(self.image_token_ids() if ids is None else ids).to(
            given.device, non_blocking=True
        )
        if input_ids is not None:
            return torch.isin(input_ids, ids)
        table = self.model.get_input_embeddings()(ids)  # (I, D)
        return (given[:, :, None] == table).all(-1).any(-1)

    def take_late(self, kwargs: dict) -> tuple[dict, Any]:
        """Split the decoder's arguments: those it may have, and visual features it would add between layers.

        It would add them at their original places, where pruned hidden states have other tokens.
        """
        return kwargs, None

    def late(self, features: Any, layer: int, hidden: Tensor) -> Tensor | None:
        """What to add to the input of `layer`, at original places (B, S, D), of what `take_late` took."""
        return None

    # ---- vision tower -----------------------------------------------------------------------------------
    #: Name of the vision tower in the backbone.
    tower: ClassVar[str] = "vision_tower"

    def vision_attention(self) -> nn.Module:
        """The tower's attention whose layer's output becomes the visual tokens (the deepest of several)."""
        modules = self.backbone.get_submodule(self.tower).named_modules()
        layers = next(
            (m for name, m in modules if name.split(".")[-1] in ("layers", "layer", "blocks")), ()
        )
        for module in layers[self.vision_layer(len(layers))].modules() if layers else ():
            if self.vision_projections(module):
                return module
        raise ValueError(
            f"{type(self.model).__name__} has no attention with known projections in {self.tower!r}: "
            "use a method that does not read the vision tower, or override `vision_attention` "
            "and `vision_projections` in the adapter"
        )

    def vision_layer(self, depth: int) -> int:
        """Its number. `vision_feature_layer` counts hidden states, the first of which no layer has made."""
        chosen = getattr(self.config, "vision_feature_layer", -1)
        chosen = chosen if isinstance(chosen, (list, tuple)) else [chosen]
        return max(0, max(state % (depth + 1) for state in chosen) - 1)

    def vision_projections(self, attention: nn.Module) -> dict[str, nn.Module]:
        """Modules that give "query" and "key" before rotary embedding, or all three "fused"; or none."""
        if hasattr(attention, "qkv"):
            return {"fused": attention.get_submodule("qkv")}
        for query, key in (("q_norm", "k_norm"), ("q_proj", "k_proj")):
            if hasattr(attention, query):
                return {
                    "query": attention.get_submodule(query),
                    "key": attention.get_submodule(key),
                }
        return {}

    def kinds(self, inputs: dict) -> dict[str, Tensor]:
        """(B, S) bool of the tokens of images, and of videos, from the backbone's keyword arguments."""
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        return {
            kind: self.visual_mask(ids, embeds, [number])
            for kind, number in self.token_ids().items()
        }

    def tokens_from_patches(self, values: Tensor, inputs: dict, kind: str) -> Tensor:
        """Quantities of the tower's patches to those of visual tokens (n, C), in the order of the prompt.

        values: (tiles, patches, C), or (patches, C) in towers without tiles. inputs: what the features were
        made from. kind: "image" or "video". By default a token is the mean of a square of patches.
        """
        return squares(values[:, self.class_token(self.config) :], self.merge(self.config)).flatten(
            0, 1
        )

    def places(self, n: int, inputs: dict, kind: str) -> Tensor:
        """Frame (tile, image) in the batch, row and column of `n` tokens, (n, 3). By default, of squares."""
        size = self.tokens_per_tile(self.config)
        token, across = torch.arange(n), isqrt(size)
        place = (token % size - size % across).clamp(
            min=0
        )  # a class token stands where the first patch does
        return torch.stack([token // size, place // across, place % across], -1)

    def grid(self, inputs: dict, visual: Tensor) -> Tensor:
        """Frame (tile, image or video frame) in the sample, row and column of each visual token: (B, S, 3).

        A token that ends a row stands after its last column. 0 at text.
        """
        full = torch.zeros(*visual.shape, 3, dtype=torch.long, device=visual.device)
        for i, (kind, mask) in enumerate(self.kinds(inputs).items()):
            if bool(mask.any()):
                made_from = (ready_made(inputs, kind) or {}).get("inputs", {})
                places = self.places(int(mask.sum()), {**inputs, **made_from}, kind)
                full = full + placed(
                    places * torch.tensor([2, 1, 1]) + torch.tensor([i, 0, 0]), mask
                )
        index, _ = positions(visual, visual.shape[1])
        frames = full[index][..., 0]
        number = nn.functional.pad((frames[:, 1:] != frames[:, :-1]).cumsum(1), (1, 0))
        full[..., 0] = number.scatter(1, index[1], number)
        return full * visual[..., None]

    # ---- input downsampling -----------------------------------------------------------------------------
    def smaller(self, inputs: dict, scale: float) -> tuple[dict, list[tuple[int, int]]]:
        """The pictures in processed `inputs` with their sides times `scale`, in whole tokens.

        Returns the inputs that change, and the tokens of each picture before and after.
        """
        raise ValueError(
            f"the processed pictures of {type(self.model).__name__} cannot be made smaller here: give its "
            "processor smaller pictures, or override `smaller` in an adapter"
        )

    def embedded(self, inputs: dict) -> dict:
        """Inputs that the model runs on such pictures with: `inputs`, unless its tower takes pictures of one size only."""
        return inputs

    # ---- attention --------------------------------------------------------------------------------------
    def attention_module(self, layer: int) -> Any:
        """The self-attention of a decoder layer."""
        return self.layers[layer].self_attn

    def projections(self, layer: int) -> dict[str, nn.Module]:
        """The modules whose outputs are the queries and keys before rotary embedding, (B, N, heads * E)."""
        attention = self.attention_module(layer)
        return {"query": attention.q_proj, "key": attention.k_proj}

    def project(self, layer: int, kind: str, hidden: Tensor) -> Tensor:
        """What `projections(layer)[kind]` will give for the layer's input `hidden`."""
        return self.projections(layer)[kind](self.layers[layer].input_layernorm(hidden))

    def rotate(
        self, layer: int, kind: str, states: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Split (B, N, heads * E) into heads, norm them if the family does, turn them: (B, heads, N, E)."""
        attention = self.attention_module(layer)
        x = states.unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, {"query": "q_norm", "key": "k_norm"}[kind], None)
        x = (x if norm is None else norm(x).to(x.device)).transpose(1, 2)
        cos, sin = (part.unsqueeze(1) for part in rotary)
        size = cos.shape[-1]
        return torch.cat([turned(x[..., :size], cos, sin), x[..., size:]], -1)

    def scaling(self, layer: int) -> float:
        """The factor on q k^T."""
        return self.attention_module(layer).scaling

    def cap(self, layer: int, logits: Tensor) -> Tensor:
        """What the layer does to q k^T, scaled, before the mask and the softmax (soft caps)."""
        return logits

    # ---- costs ------------------------------------------------------------------------------------------
    @classmethod
    def dimensions(cls, config) -> Dimensions:
        """Sizes of the decoder, from the model's configuration."""
        text = config.get_text_config(decoder=True)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return Dimensions(
            text.num_hidden_layers,
            text.hidden_size,
            text.num_attention_heads,
            text.num_key_value_heads,
            head_dim,
            text.intermediate_size,
            text.vocab_size,
            vision_head_dim=cls.vision_head_dim(config),
        )

    @classmethod
    def class_token(cls, config) -> bool:
        """Whether the tower puts a class token before its patches."""
        return class_token(config.vision_config)

    @classmethod
    def vision_heads(cls, config) -> int:
        """Heads of the tower's attention; 0 if its configuration does not say."""
        return getattr(getattr(config, "vision_config", None), "num_attention_heads", 0)

    @classmethod
    def vision_head_dim(cls, config) -> int:
        """Their size."""
        heads = cls.vision_heads(config)
        return config.vision_config.hidden_size // heads if heads else 0

    @classmethod
    def merge(cls, config) -> int:
        """Patches along the side of the square that makes a token."""
        return 1

    @classmethod
    def tokens_per_tile(cls, config) -> int:
        """Tokens made of one image of the tower's size."""
        return patches(config.vision_config) // cls.merge(config) ** 2

    @classmethod
    def tile_count(cls, config, n_visual: int, images: Sequence | None = None) -> int:
        """Images (tiles) that the tower sees: as few as give `n_visual` tokens."""
        return -(-n_visual // cls.tokens_per_tile(config))

    @classmethod
    def vision_attention_flops(cls, config, n_visual: int, images: Sequence | None = None) -> int:
        """FLOPs of reading the tower (`vispco.pruning._tower`): q k^T of one layer; none with a class token."""
        v = config.vision_config
        product = 0 if cls.class_token(config) else 2 * patches(v) ** 2 * v.hidden_size
        return cls.tile_count(config, n_visual, images) * product

    @classmethod
    def vision_flops(cls, config, n_visual: int, images: Sequence | None = None) -> tuple[int, int]:
        """FLOPs of the vision tower and of the projector for images that give `n_visual` tokens.

        images: their sizes, where `n_visual` does not tell (see the family); None: what the family assumes.
        """
        raise NotImplementedError
