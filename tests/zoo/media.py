"""Pictures and films of one size, in the shapes that the families take them.

Each function returns a maker: `maker(counts, generator)` makes `counts[b]` pictures for sample b,
and says how many visual tokens each becomes.
"""

from __future__ import annotations

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from zoo.entry import Media


def in_turn(shapes, n):
    """n of the shapes, from the first on, again and again."""
    return [shapes[i % len(shapes)] for i in range(n)]


def squares(size=16, tokens=16, extra=None):
    """One square picture after the other: (pictures, 3, size, size).

    `extra(n, generator)` makes further inputs for n pictures.
    """

    def make(counts, generator):
        n = sum(counts)
        inputs = {"pixel_values": torch.randn(n, 3, size, size, generator=generator)}
        if extra is not None:
            inputs |= extra(n, generator)
        return Media(inputs, [tokens] * n)

    return make


def of_each_sample(size=16, tokens=16, frames=1, masked=False):
    """(B, most pictures of a sample, 3, size, size): zeros where a sample has fewer.

    With `frames`, films of so many pictures. `masked` adds the (B, most pictures) mask of those
    that there are.
    """

    def make(counts, generator):
        most = frames * max(counts)
        pixels = torch.zeros(len(counts), most, 3, size, size)
        for row, n in zip(pixels, counts, strict=True):
            row[: n * frames] = torch.randn(n * frames, 3, size, size, generator=generator)
        inputs = {"pixel_values": pixels}
        if masked:
            there = torch.arange(most) < frames * torch.tensor(counts)[:, None]
            inputs["pixel_attention_mask"] = there
        return Media(inputs, [frames * tokens] * sum(counts), frames)

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
    """(pictures, 3, size, size), and the part of each that counts: its height and width."""

    def make(counts, generator):
        sizes = in_turn(shapes, sum(counts))
        inputs = {
            "pixel_values": torch.randn(len(sizes), 3, size, size, generator=generator),
            "image_sizes": torch.tensor(sizes),
        }
        return Media(inputs, [h * w // patch**2 for h, w in sizes])

    return make


def frames(size=16, n=4, tokens=16, runs=1, listed=False, key="pixel_values_videos"):
    """Films of n frames: (films, n, 3, size, size), or (films * n, 3, size, size) if `listed`.

    The `tokens` visual tokens of a film are split into `runs`.
    """

    def make(counts, generator):
        films = sum(counts)
        shape = (films * n,) if listed else (films, n)
        pixels = torch.randn(*shape, 3, size, size, generator=generator)
        return Media({key: pixels}, [tokens] * films, runs)

    return make


def ready(tokens=16, width=32, kind="image"):
    """Features as the tower would give them (`mm_encoder_outputs`), in place of pictures.

    They are (pictures, tokens, width). `kind` "video" is for films.
    """

    def make(counts, generator):
        n = sum(counts)
        features = torch.randn(n, tokens, width, generator=generator)
        output = BaseModelOutputWithPooling(pooler_output=features)
        return Media({"mm_encoder_outputs": {kind: output}}, [tokens] * n)

    return make
