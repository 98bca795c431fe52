"""LLaVA-NeXT (`LlavaNextForConditionalGeneration`): images are cut into tiles; newline tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reading.vision import Vision
from ..registry import register_adapter
from .llava import Llava
from .towers import patches_a_side, rectangle, side


@register_adapter("llava_next")
class LlavaNext(Llava):
    """LLaVA-NeXT: any resolution.

    Newline tokens stand under the image's id and are pruned like others.
    """

    architectures = ("LlavaNextForConditionalGeneration",)
    model_types = ("llava_next",)

    # ---- vision tower ----------------------------------------------------------------------------
    def tokens_from_patches(self, values, inputs, kind):
        """A token per patch, less the padding that is cut off; newline tokens get 0."""
        tiles = values[:, self.class_token(self.config) :].split(self.tiles_of_images(inputs))
        return torch.cat(self.joined_tiles(tiles, inputs["image_sizes"]))

    def places(self, n, inputs, kind):
        """Frame, row and column (n, 3) of the tokens.

        The whole image is one frame, its tiles side by side are the next. Newlines end rows.
        """
        side, counts = patches_a_side(self.config.vision_config), self.tiles_of_images(inputs)
        ones = torch.ones(sum(counts), side**2, 1).split(counts)
        images = self.joined_tiles(ones, inputs["image_sizes"])
        found = [self.places_of_image(i, image[:, 0] == 0, side) for i, image in enumerate(images)]
        return torch.cat(found)

    @staticmethod
    def places_of_image(image: int, newline: Tensor, side: int) -> Tensor:
        """Frame, row and column (n, 3) of the tokens of one image.

        image: its number. newline: (n,) bool. side: tokens along the side of a tile.
        """
        width = int(newline.nonzero()[0]) - side**2 + 1
        whole = rectangle(2 * image, side, side)
        # An image that is not cut into tiles has one newline, at its end.
        rest = torch.tensor([[2 * image, side - 1, side]])
        if width > 1:
            rest = rectangle(2 * image + 1, (len(newline) - side**2) // width, width)
        return torch.cat([whole, rest])

    def joined_tiles(self, tiles, sizes) -> list[Tensor]:
        """The model's own way to join the tiles (tiles, patches, C) of each image: (n, C) each."""
        newline = tiles[0].new_zeros(tiles[0].shape[-1])
        strategy = self.config.vision_feature_select_strategy
        return self.backbone.pack_image_features(tiles, sizes, strategy, newline)[0]

    def tiles_of_images(self, inputs) -> list[int]:
        """Number of tiles of each image, the whole image included."""
        return [self.tiles(self.config, size) for size in inputs["image_sizes"]]

    # ---- costs -----------------------------------------------------------------------------------
    @classmethod
    def pixels(cls, config, n_visual, images=None):
        """Tiles of the images, and their sizes. Arguments as of `sizes`."""
        sizes, tile = cls.sizes(config, n_visual, images), side(config.vision_config.image_size)
        most = max(cls.tiles(config, size) for size in sizes)
        tiles = torch.empty(len(sizes), most, 3, tile, tile, device="meta")
        return {"pixel_values": tiles, "image_sizes": torch.tensor(sizes)}

    @classmethod
    def vision_flops(cls, config, n_visual, images=None):
        """FLOPs of tower and projector; `images` may be the number of tiles."""
        if not isinstance(images, int):
            return super().vision_flops(config, n_visual, images)
        one = config.image_grid_pinpoints[0]
        whole, tiles = super().vision_flops(config, n_visual, [one]), cls.tiles(config, one)
        return Vision(*((part or 0) * images // tiles for part in whole))

    @classmethod
    def sizes(cls, config, n_visual, images=None) -> list[list[int]]:
        """Height and width of each image.

        images: rows of `image_sizes`. None: as few images as can give `n_visual` tokens, of one
        size, each in the smallest grid that holds it.
        """
        if images is not None:
            return [[int(x) for x in size] for size in images]
        grids = [
            (cls.tile_grid(config, p)[2], cls.most_tokens(config, p), list(p))
            for p in config.image_grid_pinpoints
        ]
        count = -(-n_visual // max(tokens for _, tokens, _ in grids))
        return [min(grid for grid in grids if grid[1] * count >= n_visual)[2]] * count

    @classmethod
    def tiles(cls, config, size) -> int:
        """Number of tiles of an image of `size` (height, width), the whole image included.

        Its grid is the one that keeps most of the image and wastes least.
        """
        height, width = (int(x) for x in size)

        def fit(grid):
            scale = min(grid[0] / height, grid[1] / width)
            kept = min(int(height * scale) * int(width * scale), height * width)
            return kept, kept - grid[0] * grid[1]

        return cls.tile_grid(config, max(config.image_grid_pinpoints, key=fit))[2]

    @classmethod
    def tile_grid(cls, config, pinpoint) -> tuple[int, int, int]:
        """(rows, columns, tiles) of a grid given in pixels; the whole image is one more tile."""
        tile = side(config.vision_config.image_size)
        rows, columns = pinpoint[0] // tile, pinpoint[1] // tile
        return rows, columns, rows * columns + 1

    @classmethod
    def most_tokens(cls, config, pinpoint) -> int:
        """Tokens of an image that fills a grid: whole image, tiles, and a newline for each row."""
        patches = patches_a_side(config.vision_config)
        rows, columns, _ = cls.tile_grid(config, pinpoint)
        return cls.tokens_per_tile(config) + rows * patches * (columns * patches + 1)
