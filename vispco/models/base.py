"""Adapter: where a Hugging Face vision-language model keeps the things that pruning needs.

The defaults fit every family whose decoder is Llama-like (q_proj, k_proj, half-split rotary
embedding) and that follows the Hugging Face interface (`get_decoder()`, `config.image_token_id`).
A family's own file names its classes and overrides what differs.
"""

from __future__ import annotations

from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..pruning._tower import placed, ready_made, turned
from ..pruning.context import positions
from .costs import Costs
from .towers import squares


class Adapter(Costs):
    """One loaded model of a family, seen by the pruner.

    Subclasses set `architectures` and `model_types`, and override what differs here or in `Costs`.
    Shapes below: B samples, S tokens of the prompt, N tokens present now, D hidden, E head size.

    Attributes: `model`, its `config`, its language model `decoder`, and the decoder's `layers`.
    """

    #: Names of the model classes of this family.
    architectures: ClassVar[tuple[str, ...]] = ()
    #: `model_type` of their configurations.
    model_types: ClassVar[tuple[str, ...]] = ()
    #: Whether no token of the decoder sees a later one, and each sees all before it. An instance
    #: looks its sliding windows up in the configuration.
    causal: bool = True

    def __init__(self, model: Any):
        self.model = model
        self.config: Any = model.config
        self.decoder = self.model.get_decoder()
        self.layers = self.decoder.layers
        text = self.config.get_text_config(decoder=True)
        windowed = (
            "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
        )
        kinds = getattr(text, "layer_types", None) or [windowed]
        self.causal = self.causal and set(kinds) == {"full_attention"}

    # ---- which models ----------------------------------------------------------------------------
    @classmethod
    def handles(cls, model) -> bool:
        """Whether `model` is of this family: a module by its class, a configuration by its type."""
        if isinstance(model, nn.Module):
            return any(base.__name__ in cls.architectures for base in type(model).__mro__)
        return getattr(model, "model_type", None) in cls.model_types

    # ---- inputs ----------------------------------------------------------------------------------
    @property
    def backbone(self) -> Any:
        """The module that receives `input_ids` and puts the image features among the embeddings."""
        return self.model.model

    def token_ids(self) -> dict[str, int]:
        """{"image" or "video": id of the token that stands for a visual token in a prompt}."""
        ids = {kind: getattr(self.config, f"{kind}_token_id", None) for kind in ("image", "video")}
        return {kind: number for kind, number in ids.items() if number is not None}

    def image_token_ids(self) -> list[int]:
        """The ids that stand for visual tokens in a prompt, of images and of videos."""
        return list(self.token_ids().values())

    def visual_mask(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, ids: Any = None
    ) -> Tensor:
        """(B, S) bool: which tokens of a prompt are visual.

        The prompt is given as ids (B, S) or as embeddings (B, S, D).
        ids: the token ids that count as visual; default: `image_token_ids`.
        Raises ValueError if neither input_ids nor inputs_embeds is given.
        """
        given = inputs_embeds if input_ids is None else input_ids
        if given is None:
            raise ValueError(
                "the model was called with neither input_ids nor inputs_embeds: give it the prompt"
            )
        ids = torch.tensor(self.image_token_ids() if ids is None else ids)
        ids = ids.to(given.device, non_blocking=True)
        if input_ids is not None:
            return torch.isin(input_ids, ids)
        table = self.model.get_input_embeddings()(ids)  # (ids, D)
        return (given[:, :, None] == table).all(-1).any(-1)

    # ---- vision tower ----------------------------------------------------------------------------
    #: Name of the vision tower in the backbone.
    tower: ClassVar[str] = "vision_tower"

    def vision_attention(self) -> nn.Module:
        """Attention module of the tower's layer whose output becomes the visual tokens.

        Of several such layers, the deepest. Raises ValueError if no attention is found.
        """
        modules = self.backbone.get_submodule(self.tower).named_modules()
        lists = [m for name, m in modules if name.split(".")[-1] in ("layers", "layer", "blocks")]
        if lists:
            layers = lists[0]
            for module in layers[self.vision_layer(len(layers))].modules():
                if self.vision_projections(module):
                    return module
        raise ValueError(
            f"{type(self.model).__name__} has no attention with known projections in "
            f"{self.tower!r}: use a method that does not read the vision tower, or override "
            "`vision_attention` and `vision_projections` in the adapter"
        )

    def vision_layer(self, depth: int) -> int:
        """Number of the tower's layer, of `depth`, whose output becomes the visual tokens.

        `vision_feature_layer` counts hidden states. The first of these is the tower's input, so
        hidden state i is the output of layer i - 1.
        """
        chosen = getattr(self.config, "vision_feature_layer", -1)
        chosen = chosen if isinstance(chosen, (list, tuple)) else [chosen]
        return max(0, max(state % (depth + 1) for state in chosen) - 1)

    def vision_projections(self, attention: nn.Module) -> dict[str, nn.Module]:
        """The modules of a tower's attention whose outputs are queries and keys, before rotary.

        {"query": module, "key": module}; or {"fused": module} if one module gives queries, keys
        and values; or {} if `attention` is no attention of a known form.
        """
        if hasattr(attention, "qkv"):
            return {"fused": attention.get_submodule("qkv")}
        for kind in ("norm", "proj"):
            if hasattr(attention, f"q_{kind}"):
                names = {"query": f"q_{kind}", "key": f"k_{kind}"}
                return {part: attention.get_submodule(name) for part, name in names.items()}
        return {}

    def kinds(self, inputs: dict) -> dict[str, Tensor]:
        """{"image" or "video": (B, S) bool, its visual tokens}.

        inputs: keyword arguments of the backbone.
        """
        prompt = inputs.get("input_ids"), inputs.get("inputs_embeds")
        return {kind: self.visual_mask(*prompt, [i]) for kind, i in self.token_ids().items()}

    def tokens_from_patches(self, values: Tensor, inputs: dict, kind: str) -> Tensor:
        """Numbers of the tower's patches to numbers of the visual tokens that are made of them.

        By default a token is the mean of a square of patches.
        values: (tiles, patches, C), or (patches, C) in towers without tiles.
        inputs: what the features were made from. kind: "image" or "video".
        Returns (n, C), in the order in which the n tokens stand in the prompt.
        """
        patches = values[:, self.class_token(self.config) :]
        return squares(patches, self.patches_per_token_side(self.config)).flatten(0, 1)

    def places(self, n: int, inputs: dict, kind: str) -> Tensor:
        """Frame, row and column (n, 3) of `n` visual tokens of one kind, "image" or "video".

        A frame is a tile, an image or a video frame; frames are counted through the batch. By
        default each frame is a square. inputs: what the features were made from.
        """
        size = self.tokens_per_tile(self.config)
        token, across = torch.arange(n), isqrt(size)
        # A class token stands where the first patch does.
        place = (token % size - size % across).clamp(min=0)
        return torch.stack([token // size, place // across, place % across], -1)

    def grid(self, inputs: dict, visual: Tensor) -> Tensor:
        """Frame, row and column (B, S, 3) of each visual token; 0 at text.

        A frame is a tile, an image or a video frame; frames are counted through the sample. A token
        that ends a row stands after its last column.
        inputs: keyword arguments of the backbone. visual: (B, S) bool.
        """
        full = torch.zeros(*visual.shape, 3, dtype=torch.long, device=visual.device)
        for i, (kind, mask) in enumerate(self.kinds(inputs).items()):
            if bool(mask.any()):
                made_from = (ready_made(inputs, kind) or {}).get("inputs", {})
                places = self.places(int(mask.sum()), {**inputs, **made_from}, kind)
                # Even numbers for the frames of images, odd ones for those of videos.
                places = places * torch.tensor([2, 1, 1]) + torch.tensor([i, 0, 0])
                full = full + placed(places, mask)
        index, _ = positions(visual, visual.shape[1])
        frames = full[index][..., 0]
        number = nn.functional.pad((frames[:, 1:] != frames[:, :-1]).cumsum(1), (1, 0))
        full[..., 0] = number.scatter(1, index[1], number)
        return full * visual[..., None]

    # ---- input downsampling ----------------------------------------------------------------------
    def smaller(self, inputs: dict, scale: float) -> tuple[dict, list[tuple[int, int]]]:
        """The pictures in a processor's `inputs`, with their sides times `scale`, in whole tokens.

        Returns the inputs that change, and (tokens before, tokens after) of each picture.
        Raises ValueError if the family's pictures cannot be made smaller after its processor.
        """
        raise ValueError(
            f"the processed pictures of {type(self.model).__name__} cannot be made smaller here: "
            "give its processor smaller pictures, or override `smaller` in an adapter"
        )

    def embedded(self, inputs: dict) -> dict:
        """What the model runs with on the pictures that `smaller` made.

        That is `inputs` itself, unless the tower takes pictures of one size only.
        """
        return inputs

    # ---- attention -------------------------------------------------------------------------------
    def attention_module(self, layer: int) -> Any:
        """The self-attention of a decoder layer."""
        return self.layers[layer].self_attn

    def projections(self, layer: int) -> dict[str, nn.Module]:
        """{"query": module, "key": module}, of a decoder layer.

        Their outputs (B, N, heads * E) are its queries and keys before rotary embedding.
        """
        attention = self.attention_module(layer)
        return {"query": attention.q_proj, "key": attention.k_proj}

    def project(self, layer: int, kind: str, hidden: Tensor) -> Tensor:
        """What `projections(layer)[kind]` will give for the layer's input `hidden` (B, N, D).

        kind: "query" or "key".
        """
        return self.projections(layer)[kind](self.layers[layer].input_layernorm(hidden))

    def rotate(
        self, layer: int, kind: str, states: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Queries or keys as the layer's attention uses them, (B, heads, N, E).

        They are split into heads, normed if the family does so, and turned by rotary embedding.
        kind: "query" or "key". states: (B, N, heads * E), from the projection.
        rotary: cos and sin of the tokens' positions.
        """
        attention = self.attention_module(layer)
        x = states.unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, {"query": "q_norm", "key": "k_norm"}[kind], None)
        x = (x if norm is None else norm(x).to(x.device)).transpose(1, 2)
        cos, sin = (part.unsqueeze(1) for part in rotary)
        size = cos.shape[-1]
        return torch.cat([turned(x[..., :size], cos, sin), x[..., size:]], -1)

    def scaling(self, layer: int) -> float:
        """The factor that a decoder layer multiplies q k^T with, before the softmax."""
        return self.attention_module(layer).scaling

    def cap(self, layer: int, logits: Tensor) -> Tensor:
        """What a decoder layer does to its scaled q k^T before the mask and the softmax: soft caps.

        By default nothing.
        """
        return logits
