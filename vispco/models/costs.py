"""Costs: the sizes of a family's parts and their FLOPs, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..flops import Dimensions
from ..reading.blank import Blueprint
from ..reading.measure import measured
from ..reading.structure import first
from ..reading.vision import Vision, count_sample, count_vision, square_tile
from .towers import class_token


class Costs:
    """What is known of a family's costs without a model: the base of `Adapter`.

    `config` is the configuration of a model of the family. `n_visual` is the number of visual
    tokens of a prompt. A tile is an image of the tower's own size.
    """

    #: Name of the vision tower, if it is none of the usual ones.
    tower: ClassVar[str] = ""

    @classmethod
    def dimensions(cls, config) -> Dimensions:
        """Sizes of the decoder, and of a vision head, from the model's configuration."""
        text = config.get_text_config(decoder=True)
        found = measured(Blueprint.of(cls, config))
        return Dimensions(
            layers=len(found.attention),
            hidden=first(text, ["hidden_size", "embed_dim"], 0),
            heads=found.size("heads"),
            kv_heads=found.size("kv_heads"),
            head_dim=found.size("head_dim"),
            ffn=ffn_width(text),
            vocab=text.vocab_size,
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
    def tokens_per_tile(cls, config) -> int:
        """Visual tokens made of one tile, an image of the tower's own size.

        Raises ValueError for a tower without such a size.
        """
        found = square_tile(Blueprint.of(cls, config))
        if found is None:
            raise ValueError(f"{config.model_type!r} models take no square tiles of one size")
        return found[1]

    @classmethod
    def vision_flops(cls, config, n_visual: int, images: Sequence | None = None) -> Vision:
        """FLOPs of the vision tower and the projector, for images that give `n_visual` tokens.

        Not known if the family does not say what such images are, see `pixels`.
        images: what the family needs to know of the images, such as their sizes, if `n_visual` does
        not tell; None: what the family assumes.
        """
        if not n_visual:
            return Vision(0, 0, 0)
        pixels = cls.pixels(config, n_visual, images)
        return Vision() if pixels is None else count_vision(Blueprint.of(cls, config), pixels)

    @classmethod
    def pixels(
        cls, config, n_visual: int, images: Sequence | None = None
    ) -> dict[str, Tensor] | None:
        """Inputs of `get_image_features` for images that give `n_visual` tokens.

        Only the shapes of floating-point tensors matter: they may be on the meta device. By default
        as many pictures of the tower's own size as give so many tokens; None if the tower takes
        others, or if they give other tokens than the decoder's. Arguments as of `vision_flops`.
        """
        found = square_tile(Blueprint.of(cls, config))
        if found is None:
            return None
        tile, tokens = found
        return {"pixel_values": tile.repeat_interleave(-(-n_visual // tokens), -4)}

    @classmethod
    def sample(cls, config, inputs: Mapping[str, Any]) -> tuple[int, int, Vision]:
        """Numbers of visual and of text tokens, and FLOPs of vision, of a processor's output.

        Raises ValueError unless it is of one sample, with `input_ids` (1, S).
        """
        vision = count_sample(Blueprint.of(cls, config), inputs)
        mask = inputs.get("attention_mask")
        total = inputs["input_ids"].shape[1] if mask is None else int(mask.sum())
        return vision.tokens, total - vision.tokens, vision


def ffn_width(text) -> int:
    """Width of the decoder's feed-forward network; the largest, if layers differ."""
    width = first(text, ["intermediate_size", "ffn_dim", "ffn_hidden_size"], 0)
    return max(width) if isinstance(width, (list, tuple)) else width


def vision_width(config) -> int:
    """Hidden size of the vision tower. Qwen2-VL calls the size of what comes out `hidden_size`."""
    return first(config.vision_config, ["embed_dim", "hidden_size"], 0)
