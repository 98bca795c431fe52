"""What one family of models needs to be made tiny: options of its configuration, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

#: Token ids that every entry shares. Words are drawn from `WORDS`, which holds none of them.
PAD, BOS, EOS = 0, 1, 2
FILM_START, FILM_END = 4, 5
WORDS = range(6, 80)
IMAGE, VIDEO, START, END, AUDIO = 90, 91, 92, 93, 94
VOCAB = 100


class Media(NamedTuple):
    """Pictures or films as a model takes them, and the visual tokens that each one becomes."""

    inputs: dict[str, Any]
    tokens: list[int]
    """Visual tokens of each."""
    runs: int = 1
    """Into how many runs, with other tokens between, the tokens of each are split."""


#: `maker(counts, generator)` makes `counts[b]` pictures for each sample b of a batch.
Maker = Callable[[Sequence[int], torch.Generator], Media]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """How to build a tiny random model of one class of transformers, and what to show it.

    Nothing here imports the class: the release of transformers at hand may lack it.
    """

    cls: str
    """Name of the model's class in transformers."""
    images: Maker
    """Makes pictures, in the shapes that this class takes."""
    model_type: str | None = None
    """`model_type` of its configuration; None for the key of the entry."""
    text: Options = field(default_factory=dict)
    """Options of `text_config` beyond the shared ones; of the whole where there is none."""
    vision: Options = field(default_factory=dict)
    """Options of `vision_config` beyond the shared ones."""
    others: Mapping[str, Options] = field(default_factory=dict)
    """Options of any other configuration within: {"qformer_config": {...}}."""
    top: Options = field(default_factory=dict)
    """Options of the whole configuration."""
    text_class: str | None = None
    """Name of the class of `text_config`, where it is not the default."""
    attention: str | None = None
    """Attention implementation; None for the default (sdpa wherever the class has it)."""
    counts: tuple[int, ...] = (1, 2)
    """Pictures of each sample. Some classes take one a sample."""
    before: tuple[int, ...] = (START,)
    """Tokens right before the visual tokens of a picture."""
    after: tuple[int, ...] = (END,)
    """Tokens right after them."""
    types_mark_images: bool = True
    """Whether `token_type_ids` are 1 at visual tokens. (In PaliGemma they mark the answer.)"""
    extra: Callable[[torch.Tensor], dict[str, Any]] | None = None
    """Further inputs, made from the (B, n) mask of visual tokens."""
    video: Maker | None = None
    """Makes films; None for a class that takes none."""
    video_token: int = VIDEO
    """Id of the visual tokens of films: some classes give them that of pictures."""
    video_type: int = 2
    """Their number in `mm_token_type_ids`; visual tokens of pictures have 1."""
    shrink: Callable[[Any], None] | None = None
    """Makes smaller, in place, what no option of the configuration does."""
    ready: str = ""
    """Why the pictures are ready-made features; empty where the vision tower runs."""
    since: str = ""
    """First release of transformers whose class works as here: earlier ones fail, or differ."""
    video_since: str = ""
    """The same for films, where it is another."""
    fast: bool = False
    """Whether the default tests run this entry. `pytest --every` runs all."""
