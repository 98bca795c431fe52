"""Costs: the sizes of a family's parts and their FLOPs, from its configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..flops import Dimensions
from .blank import Blueprint
from .measure import measured
from .structure import first
from .towers import class_token, patches
from .vision import count_vision


class Costs:
    """What is known of a family's costs without a model: the base of `Adapter`.

    `config` is the configuration of a model of the family. `n_visual` is the number of visual
    tokens of a prompt. A tile is an image of the tower's own size.
    """

    #: Name of the module that is the vision tower.
    tower: ClassVar[str]

    @classmethod
    def dimensions(cls, config) -> Dimensions:
        """Sizes of the decoder, and of a vision head, from the model's configuration."""
        text = config.get_text_config(decoder=True)
        found = measured(Blueprint.of(config))
        attention = (found.size(name) for name in ("heads", "kv_heads", "head_dim"))
        return Dimensions(
            len(found.attention),
            first(text, ["hidden_size", "embed_dim"], 0),
            *attention,
            ffn_width(text),
            text.vocab_size,
            vision_head_dim=cls.vision_head_dim(config),
            measured=found,
        )

    @classmethod
    def class_token(cls, config) -> bool:
        """Whether the tower puts a class token before its patches."""
        return class_token(config.vision_config)

    @classmethod
    def vision_head_dim(cls, config) -> int:
        """Size of a head of the tower's attention; 0 if its configuration does not say."""
        heads = first(getattr(config, "vision_config", None), ["num_attention_heads", "num_heads"])
        return vision_width(config) // heads if heads else 0

    @classmethod
    def patches_per_token_side(cls, config) -> int:
        """Patches along the side of the square of patches that makes a visual token."""
        return 1

    @classmethod
    def tokens_per_tile(cls, config) -> int:
        """Visual tokens made of one tile, an image of the tower's own size."""
        return patches(config.vision_config) // cls.patches_per_token_side(config) ** 2

    @classmethod
    def tile_count(cls, config, n_visual: int, images: Sequence | None = None) -> int:
        """Number of tiles that the tower sees: as few as give `n_visual` tokens.

        images: what a family needs to know of the images, if `n_visual` does not tell.
        """
        return -(-n_visual // cls.tokens_per_tile(config))

    @classmethod
    def vision_attention_flops(cls, config, n_visual: int, images: Sequence | None = None) -> int:
        """FLOPs of reading the tower's attention once more: q k^T of one layer (`pruning._tower`).

        0 with a class token, whose one row is not counted. Arguments as of `vision_flops`.
        """
        n = patches(config.vision_config)
        product = 0 if cls.class_token(config) else 2 * n**2 * vision_width(config)
        return cls.tile_count(config, n_visual, images) * product

    @classmethod
    def vision_flops(
        cls, config, n_visual: int, images: Sequence | None = None
    ) -> tuple[int, int] | tuple[None, None]:
        """FLOPs of the vision tower, and of the projector, for images that give `n_visual` tokens.

        (None, None) if the family does not say what such images are.
        images: what the family needs to know of the images, such as their sizes, if `n_visual` does
        not tell; None: what the family assumes.
        """
        pixels = cls.pixels(config, n_visual, images) if n_visual else {}
        if not pixels:
            return (0, 0) if pixels == {} else (None, None)
        return count_vision(Blueprint.of(config), cls.tower, pixels)[:2]

    @classmethod
    def pixels(
        cls, config, n_visual: int, images: Sequence | None = None
    ) -> dict[str, Tensor] | None:
        """Inputs of `get_image_features` for images that give `n_visual` tokens.

        Only the shapes of floating-point tensors matter: they may be on the meta device. By default
        as many pictures of the tower's own size as give so many tokens; None if the tower takes
        others, or if they give other tokens than the decoder's. Arguments as of `vision_flops`.
        """
        v = getattr(config, "vision_config", None)
        size = getattr(v, "image_size", None)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        if not height or height != width:
            return None
        one = torch.empty(
            1, first(v, ["num_channels", "in_channels"], 3), height, width, device="meta"
        )
        try:
            tokens = count_vision(Blueprint.of(config), cls.tower, {"pixel_values": one}).tokens
        except ValueError:
            return None
        return {"pixel_values": one.repeat(-(-n_visual // tokens), 1, 1, 1)} if tokens else None


def ffn_width(text) -> int:
    """Width of the decoder's feed-forward network; the largest, if layers differ."""
    width = first(text, ["intermediate_size", "ffn_dim", "ffn_hidden_size"], 0)
    return max(width) if isinstance(width, (list, tuple)) else width


def vision_width(config) -> int:
    """Hidden size of the vision tower. Qwen2-VL calls the size of what comes out `hidden_size`."""
    return first(config.vision_config, ["embed_dim", "hidden_size"], 0)
