"""Adapter: where a Hugging Face vision-language model keeps the things that pruning needs.

The defaults fit every family whose decoder is Llama-like (q_proj, k_proj, half-split rotary embedding) and
that follows the Hugging Face interface (`get_decoder()`, `config.image_token_id`). A family's own file names
its classes and overrides what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ..flops import Dimensions


class Adapter:
    """One loaded model, seen by the pruner.

    Subclasses set `architectures` (class names) and `model_types` (of their configurations).
    """

    architectures: ClassVar[tuple[str, ...]] = ()
    model_types: ClassVar[tuple[str, ...]] = ()
    #: No token sees ahead. (Sliding windows are found in the configuration.)
    causal: bool = True

    def __init__(self, model: nn.Module):
        self.model = model
        self.config = model.config
        self.decoder = model.get_decoder()
        self.layers = self.decoder.layers
        text = model.config.get_text_config(decoder=True)
        windows = ["sliding_attention"] if getattr(text, "sliding_window", None) else []
        self.causal = self.causal and {*(getattr(text, "layer_types", None) or windows)} <= {"full_attention"}

    # ---- which models -----------------------------------------------------------------------------------
    @classmethod
    def handles(cls, model) -> bool:
        """Whether this family is that of `model` (a module, by its class) or configuration (by its type)."""
        if isinstance(model, nn.Module):
            return any(base.__name__ in cls.architectures for base in type(model).__mro__)
        return getattr(model, "model_type", None) in cls.model_types

    # ---- inputs -----------------------------------------------------------------------------------------
    @property
    def backbone(self) -> nn.Module:
        """The module that receives `input_ids` and merges the image features in."""
        return self.model.model

    def image_token_ids(self) -> list[int]:
        """Token ids that stand for visual tokens."""
        names = ("image_token_id", "video_token_id")
        return [getattr(self.config, name) for name in names if getattr(self.config, name, None) is not None]

    def visual_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, S) bool: which tokens are visual."""
        ids = torch.tensor(self.image_token_ids())
        if input_ids is not None:
            return torch.isin(input_ids, ids.to(input_ids.device))
        table = self.model.get_input_embeddings()(ids.to(inputs_embeds.device))  # (I, D)
        return (inputs_embeds[:, :, None] == table).all(-1).any(-1)

    def take_late(self, kwargs: dict) -> tuple[dict, Any]:
        """Split the decoder's arguments: those it may have, and visual features it would add between layers.

        It would add them at their original places, where pruned hidden states have other tokens.
        """
        return kwargs, None

    def late(self, features: Any, layer: int, hidden: Tensor) -> Tensor | None:
        """What to add to the input of `layer`, at original places (B, S, D), of what `take_late` took."""
        return None

    # ---- attention --------------------------------------------------------------------------------------
    def attention_module(self, layer: int) -> nn.Module:
        """The self-attention of a decoder layer."""
        return self.layers[layer].self_attn

    def projections(self, layer: int) -> dict[str, nn.Module]:
        """The modules whose outputs are the queries and keys before rotary embedding, (B, N, heads * E)."""
        attention = self.attention_module(layer)
        return {"query": attention.q_proj, "key": attention.k_proj}

    def project(self, layer: int, kind: str, hidden: Tensor) -> Tensor:
        """What `projections(layer)[kind]` will give for the layer's input `hidden`."""
        return self.projections(layer)[kind](self.layers[layer].input_layernorm(hidden))

    def rotate(self, layer: int, kind: str, states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Split (B, N, heads * E) into heads, norm them if the family does, turn them: (B, heads, N, E)."""
        attention = self.attention_module(layer)
        x = states.unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, {"query": "q_norm", "key": "k_norm"}[kind], None)
        x = (x if norm is None else norm(x)).transpose(1, 2)
        cos, sin = (part.unsqueeze(1) for part in rotary)
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1]:]
        first, second = turned.chunk(2, dim=-1)
        return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)

    def scaling(self, layer: int) -> float:
        """The factor on q k^T."""
        return self.attention_module(layer).scaling

    def cap(self, layer: int, logits: Tensor) -> Tensor:
        """What the layer does to q k^T, scaled, before the mask and the softmax (soft caps)."""
        return logits

    # ---- cache ------------------------------------------------------------------------------------------
    def lengthen(self, cache) -> None:
        """Make an empty cache keep all tokens: sliding windows would count kept tokens, not positions.

        The model's masks still hide what is out of the window.
        """
        cache.layers[:] = [DynamicLayer() if layer.is_sliding else layer for layer in cache.layers]

    def shortened_cache_layer(self, dropped: int) -> DynamicLayer:
        """An empty cache layer for layer 0 that counts `dropped` tokens more than it holds."""
        layer = ShortenedLayer()
        layer.dropped = dropped
        return layer

    # ---- costs ------------------------------------------------------------------------------------------
    @classmethod
    def dimensions(cls, config) -> Dimensions:
        """Sizes of the decoder, from the model's configuration."""
        text = config.get_text_config(decoder=True)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return Dimensions(text.num_hidden_layers, text.hidden_size, text.num_attention_heads,
                          text.num_key_value_heads, head_dim, text.intermediate_size, text.vocab_size)

    @classmethod
    def vision_flops(cls, config, n_visual: int, images: Sequence | None = None) -> tuple[int, int]:
        """FLOPs of the vision tower and of the projector for images that give `n_visual` tokens.

        images: their sizes, where `n_visual` does not tell (see the family); None: what the family assumes.
        """
        raise NotImplementedError


class ShortenedLayer(DynamicLayer):
    """The first layer's cache when tokens were dropped before it: reports the ORIGINAL length.

    Hugging Face derives position ids and masks from the length of this one layer.
    """

    dropped = 0

    def get_seq_length(self) -> int:
        """Tokens seen, dropped ones included."""
        length = super().get_seq_length()
        return length and length + self.dropped
