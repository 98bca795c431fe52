"""Pictures and films, in the shapes that the families take them.

Each function returns a maker: `maker(counts, generator)` makes `counts[b]` pictures for sample b,
and says how many visual tokens each becomes.
"""

from __future__ import annotations

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from zoo.entry import Media

#: Height and width of pictures in patches, in turn: of several sizes, all even.
GRIDS = ((8, 8), (4, 12), (8, 4))


def squares(size=16, tokens=16, key="pixel_values", extra=None):
    """One square picture after the other: (pictures, 3, size, size).

    `extra(n, generator)` makes further inputs for n pictures.
    """

    def make(counts, generator):
        n = sum(counts)
        inputs = {key: torch.randn(n, 3, size, size, generator=generator)}
        if extra is not None:
            inputs |= extra(n, generator)
        return Media(inputs, [tokens] * n)

    return make


def of_each_sample(size=16, tokens=16, masked=False):
    """(B, most pictures of a sample, 3, size, size): zeros where a sample has fewer.

    `masked` adds the (B, most pictures) mask of those that there are.
    """

    def make(counts, generator):
        pixels = torch.zeros(len(counts), max(counts), 3, size, size)
        for row, n in zip(pixels, counts, strict=True):
            row[:n] = torch.randn(n, 3, size, size, generator=generator)
        inputs = {"pixel_values": pixels}
        if masked:
            there = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
            inputs["pixel_attention_mask"] = there
        return Media(inputs, [tokens] * sum(counts))

    return make


def tiles(size=8, tiles=3, tokens=16, shape=(16, 8)):
    """(pictures, tiles, 3, size, size): the whole picture small, then its tiles.

    `shape` is the height and width of the picture before it was cut, in pixels.
    """

    def make(counts, generator):
        n = sum(counts)
        inputs = {
            "pixel_values": torch.randn(n, tiles, 3, size, size, generator=generator),
            "image_sizes": torch.tensor([shape] * n),
        }
        return Media(inputs, [tokens] * n)

    return make


def cropped(size=16, patch=4, shapes=((16, 16), (16, 8), (8, 16))):
    """(pictures, 3, size, size) of which only `shapes` (height, width) are filled."""

    def make(counts, generator):
        n = sum(counts)
        sizes = [shapes[i % len(shapes)] for i in range(n)]
        inputs = {
            "pixel_values": torch.randn(n, 3, size, size, generator=generator),
            "image_sizes": torch.tensor(sizes),
        }
        return Media(inputs, [h * w // patch**2 for h, w in sizes])

    return make


def grid(frames=2, patch=2, merge=2, flat=True, tokens=None, extra=None):
    """Patches of all pictures in one list, and the grid (1, height, width) of each, in patches.

    A patch is flat, (3 * frames * patch * patch), or a small picture (3, patch, patch). A picture
    becomes one visual token for `merge` x `merge` patches, or `tokens(height, width)`.
    """
    count = tokens or (lambda height, width: height * width // merge**2)
    shape = (3 * frames * patch * patch,) if flat else (3, patch, patch)

    def make(counts, generator):
        n = sum(counts)
        grids = [GRIDS[i % len(GRIDS)] for i in range(n)]
        patches = sum(h * w for h, w in grids)
        inputs = {
            "pixel_values": torch.randn(patches, *shape, generator=generator),
            "image_grid_thw": torch.tensor([(1, h, w) for h, w in grids]),
        }
        if extra is not None:
            inputs |= extra(n, generator)
        return Media(inputs, [count(h, w) for h, w in grids])

    return make


def packed(patch=4, merge=2):
    """The patches of all pictures side by side, as one picture: (1, 3, patch, patch * patches).

    A picture becomes one visual token for `merge` x `merge` patches.
    """

    def make(counts, generator):
        n = sum(counts)
        sizes = [[side * merge // 2 for side in GRIDS[i % len(GRIDS)]] for i in range(n)]
        patches = sum(h * w for h, w in sizes)
        inputs = {
            "pixel_values": torch.randn(1, 3, patch, patch * patches, generator=generator),
            "target_sizes": torch.tensor(sizes, dtype=torch.int32),
        }
        return Media(inputs, [h * w // merge**2 for h, w in sizes])

    return make


def ready(*tokens, width=32, key="pooler_output", joined=None):
    """Features as the tower would give them (`mm_encoder_outputs`), in place of pictures.

    The pictures have `tokens` features each, in turn. `joined` makes one tensor of the list of
    (tokens, width): torch.stack or torch.cat.
    """

    def make(counts, generator):
        n = sum(counts)
        lengths = [tokens[i % len(tokens)] for i in range(n)]
        features = [torch.randn(k, width, generator=generator) for k in lengths]
        output = BaseModelOutputWithPooling(**{key: joined(features) if joined else features})
        return Media({"mm_encoder_outputs": {"image": output}}, lengths)

    return make
