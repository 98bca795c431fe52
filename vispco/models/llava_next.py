"""LLaVA-NeXT (`LlavaNextForConditionalGeneration`): images are cut into tiles; newline tokens."""

from __future__ import annotations

from ..registry import register_adapter
from .llava import Llava
from .towers import side


@register_adapter("llava_next")
class LlavaNext(Llava):
    """LLaVA-NeXT: any resolution. Newline tokens stand under the image's id and are pruned like others."""

    architectures = ("LlavaNextForConditionalGeneration",)
    model_types = ("llava_next",)

    @classmethod
    def vision_flops(cls, config, n_visual, images=None):
        """The tower sees each tile, and the whole image once more, with the padding that is cut off later.

        images: rows of `image_sizes`, or just the number of tiles. By default as few images as can give
        `n_visual` tokens, of one size, each in the smallest grid that holds it.
        """
        if images is None:
            images = cls.fewest_tiles(config, n_visual)
        if not isinstance(images, int):
            images = sum(cls.tiles(config, size) for size in images)
        return cls.tile_flops(config, images)

    @classmethod
    def tiles(cls, config, size) -> int:
        """Tiles of an image of `size` (height, width): of the grid that keeps most of it and wastes least."""
        height, width = (int(x) for x in size)

        def fit(grid):
            scale = min(grid[0] / height, grid[1] / width)
            kept = min(int(height * scale) * int(width * scale), height * width)
            return kept, kept - grid[0] * grid[1]

        return cls.grid(config, max(config.image_grid_pinpoints, key=fit))[2]

    @classmethod
    def grid(cls, config, pinpoint) -> tuple[int, int, int]:
        """Rows and columns of tiles, and tiles in all (with the whole image), of a grid given in pixels."""
        tile = side(config.vision_config.image_size)
        rows, columns = pinpoint[0] // tile, pinpoint[1] // tile
        return rows, columns, rows * columns + 1

    @classmethod
    def most_tokens(cls, config, pinpoint) -> int:
        """Tokens of an image that fills a grid: the whole, the tiles, and a newline a row."""
        v = config.vision_config
        patches = side(v.image_size) // side(v.patch_size)
        rows, columns, _ = cls.grid(config, pinpoint)
        return cls.tokens_per_tile(config) + rows * patches * (columns * patches + 1)

    @classmethod
    def fewest_tiles(cls, config, n_visual: int) -> int:
        """Tiles in all, if nothing but the number of tokens is known."""
        grids = [(cls.grid(config, p)[2], cls.most_tokens(config, p)) for p in config.image_grid_pinpoints]
        count = -(-n_visual // max(tokens for _, tokens in grids))
        return count and count * min(tiles for tiles, tokens in grids if tokens * count >= n_visual)
