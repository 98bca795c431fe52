"""Qwen2-VL (`Qwen2VLForConditionalGeneration`): any resolution, images and video, three-part positions."""

from __future__ import annotations

from math import isqrt

import torch
from torch.nn.functional import interpolate

from ..registry import register_adapter
from .base import Adapter
from .towers import encoder_layer, rectangle, side, two_matrices


@register_adapter("qwen2_vl")
class Qwen2VL(Adapter):
    """Qwen2-VL: an image or video of t x h x w patches gives t h w / merge^2 visual tokens."""

    architectures = ("Qwen2VLForConditionalGeneration",)
    model_types = ("qwen2_vl",)

    def rotate(self, layer, kind, states, rotary):
        """transformers before 5.20 hands the decoder (3, B, N, E): time, height, width, to be joined."""
        if rotary[0].ndim == 4:
            sections = self.decoder.config.rope_parameters["mrope_section"] * 2
            parts = (x.split(sections, -1) for x in rotary)
            rotary = tuple(torch.cat([part[i % 3] for i, part in enumerate(p)], -1) for p in parts)
        return super().rotate(layer, kind, states, rotary)

    # ---- vision tower -----------------------------------------------------------------------------------
    tower = "visual"

    def tokens_from_patches(self, values, inputs, kind):
        """The patches of a token stand together."""
        return values.unflatten(0, (-1, self.merge(self.config) ** 2)).mean(1)

    def places(self, n, inputs, kind):
        """Frame after frame."""
        merge = self.merge(self.config)
        frames: list[torch.Tensor] = []
        for t, h, w in inputs[f"{kind}_grid_thw"].tolist():
            frames += [rectangle(len(frames) + i, h // merge, w // merge) for i in range(t)]
        return torch.cat(frames)

    @classmethod
    def merge(cls, config):
        """Patches along the side of a token."""
        return config.vision_config.spatial_merge_size

    @classmethod
    def vision_heads(cls, config):
        """Heads of the tower's attention."""
        return config.vision_config.num_heads

    @classmethod
    def vision_head_dim(cls, config):
        """Their size."""
        return cls.width(config.vision_config) // cls.vision_heads(config)

    # ---- input downsampling -----------------------------------------------------------------------------
    def smaller(self, inputs, scale):
        """Patches back to pictures, smaller, and to patches again; a token is merge x merge of them."""
        if inputs.get("pixel_values_videos") is not None:
            raise ValueError(
                "videos cannot be made smaller here: give the processor smaller frames"
            )
        v, merge, grids, pieces, tokens = (
            self.config.vision_config,
            self.merge(self.config),
            [],
            [],
            [],
        )
        colours, frames, size = v.in_channels, v.temporal_patch_size, v.patch_size
        sizes = inputs["image_grid_thw"].tolist()
        for piece, (t, h, w) in zip(
            inputs["pixel_values"].split([t * h * w for t, h, w in sizes]), sizes
        ):
            x = piece.view(t, h // merge, w // merge, merge, merge, colours, frames, size, size)
            x = x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(
                t * frames, colours, h * size, w * size
            )
            rows, columns = (max(1, round(n // merge * scale)) for n in (h, w))
            x = interpolate(
                x, (rows * merge * size, columns * merge * size), mode="bilinear", antialias=True
            )
            x = x.view(t, frames, colours, rows, merge, size, columns, merge, size)
            pieces.append(x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, piece.shape[1]))
            grids.append([t, rows * merge, columns * merge])
            tokens.append((t * h * w // merge**2, t * rows * columns))
        changed = torch.tensor(grids).to(inputs["image_grid_thw"])
        return {"pixel_values": torch.cat(pieces), "image_grid_thw": changed}, tokens

    # ---- costs ------------------------------------------------------------------------------------------
    @classmethod
    def vision_attention_flops(cls, config, n_visual, images=None):
        """Within frames."""
        squares = sum(n * n for n in cls.frames(cls.grids(config, n_visual, images)))
        return 2 * squares * cls.width(config.vision_config)

    @classmethod
    def grids(cls, config, n_visual: int, images=None) -> list[tuple[int, int, int]]:
        """Rows of `image_grid_thw`, `video_grid_thw`; by default one image as square as `n_visual` allows."""
        merge = config.vision_config.spatial_merge_size
        if images is None:
            height = max((h for h in range(1, isqrt(n_visual) + 1) if n_visual % h == 0), default=0)
            images = [(1, height * merge, n_visual // height * merge)] if height else []
        grids = [(int(t), int(h), int(w)) for t, h, w in images]
        tokens = sum(t * h * w for t, h, w in grids) // merge**2
        if tokens != n_visual:
            raise ValueError(
                f"images of {grids} patches (time, height, width) give {tokens} visual tokens, "
                f"not n_visual={n_visual}: a token is {merge} x {merge} patches"
            )
        return grids

    @classmethod
    def vision_flops(cls, config, n_visual, images=None):
        """Attention stays within a frame, so grids decide the cost. images: rows of `image_grid_thw`."""
        v, grids = config.vision_config, cls.grids(config, n_visual, images)
        n, d, unit = sum(t * h * w for t, h, w in grids), cls.width(v), v.spatial_merge_size**2
        embedding = 2 * n * v.in_channels * v.temporal_patch_size * side(v.patch_size) ** 2 * d
        blocks = sum(cls.block(v, i, n, grids) for i in range(v.depth))
        return embedding + blocks, cls.mergers(v) * two_matrices(
            n // unit, unit * d, unit * d, cls.out(v)
        )

    @staticmethod
    def frames(grids) -> list[int]:
        """Patches of each frame."""
        return [h * w for t, h, w in grids for _ in range(t)]

    @classmethod
    def block(cls, v, layer: int, patches: int, grids) -> int:
        """FLOPs of one block of the tower."""
        return encoder_layer(
            patches, v.embed_dim, v.embed_dim * v.mlp_ratio, spans=cls.frames(grids)
        )

    @staticmethod
    def width(v) -> int:
        """Hidden size of the tower."""
        return v.embed_dim

    @staticmethod
    def out(v) -> int:
        """Width of the merger's output."""
        return v.hidden_size

    @staticmethod
    def mergers(v) -> int:
        """Number of mergers (projectors)."""
        return 1
