"""Prompts for the models of the zoo: batches of words and pictures."""

from __future__ import annotations

import inspect

import torch

from zoo.entry import BOS, FILM_END, FILM_START, IMAGE, PAD, WORDS

#: Inputs with 0 at a word, 1 at a visual token of a picture, 2 at one of a film.
MARKS = ("mm_token_type_ids", "moe_mm_token_type_ids")
#: What Video-LLaVA and Fuyu used to call `pixel_values`.
OLD_NAMES = ("pixel_values_images", "image_patches")


def prompts(model, entry, counts=None, text=(9, 7), padding="left", seed=0, video=False):
    """A batch of prompts: `counts[b]` pictures among `text[b]` words.

    `counts` is the entry's own by default: (1, 2) where a sample may have two pictures. With
    `video`, films take the place of the pictures. Each row reads: the first token, two words, the
    pictures with the tokens around them, the other words; then, or before, the padding.

    Returns the inputs of `model`, by name, and the number of visual tokens of each row. Raises
    ValueError if the entry has no films.
    """
    if video and entry.video is None:
        raise ValueError(f"{entry.cls} has no films here: leave out video=True")
    counts = entry.counts if counts is None else counts
    maker, token = (entry.video, entry.video_token) if video else (entry.images, IMAGE)
    generator = torch.Generator().manual_seed(seed)
    media = maker(counts, generator)
    tokens = iter(media.tokens)
    rows, n_visual = [], []
    for pictures, length in zip(counts, text, strict=True):
        words = torch.randint(WORDS.start, WORDS.stop, (length,), generator=generator).tolist()
        own = [next(tokens) for _ in range(pictures)]
        visual = [ids for k in own for ids in shown(entry, token, k, media.runs, video)]
        rows.append([BOS, *words[:2], *visual, *words[2:]])
        n_visual.append(sum(own))
    inputs = {
        "input_ids": padded(rows, PAD, padding),
        "attention_mask": padded([[1] * len(row) for row in rows], 0, padding),
    }
    inputs |= marks(model, entry, inputs["input_ids"] == token, entry.video_type if video else 1)
    return {**inputs, **renamed(model, media.inputs)}, n_visual


def shown(entry, token, tokens, runs, video):
    """The ids of one picture or film: its visual tokens, in runs, and those around them."""
    run = [*entry.before, *[token] * (tokens // runs), *entry.after]
    return [FILM_START, *run * runs, FILM_END] if video else run * runs


def padded(rows, fill, side):
    """(B, longest) tensor of rows, filled up on one side."""
    width = max(map(len, rows))
    space = [[fill] * (width - len(row)) for row in rows]
    pairs = zip(rows, space, strict=True)
    return torch.tensor([more + row if side == "left" else row + more for row, more in pairs])


def marks(model, entry, visual, kind):
    """The inputs that say which tokens are visual, of those that the model takes."""
    takes = inspect.signature(type(model).forward).parameters
    found = {name: visual.int() * kind for name in MARKS if name in takes}
    if "token_type_ids" in takes:
        found["token_type_ids"] = visual.long() * entry.types_mark_images
    return found | (entry.extra(visual) if entry.extra else {})


def renamed(model, inputs):
    """The inputs, under the names that this release of transformers gives them."""
    takes = inspect.signature(type(model).forward).parameters
    old = next((name for name in OLD_NAMES if name in takes), "pixel_values")
    now = "pixel_values" if "pixel_values" in takes else old
    return {now if name == "pixel_values" else name: value for name, value in inputs.items()}
