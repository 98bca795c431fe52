"""The video task: questions about generated clips, and their batches for testbed-qwen-video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from . import clips
from .clip_questions import FAMILIES, TASKS as TASKS, Family
from .data import padded
from .images import video_inputs
from .model import FRAMES
from .processor import PATCH
from .scenes import SPLITS
from .vocab import EOS, PAD, VIDEO_ID, VIDEO_PAD, VIDEO_WORDS, VISION_END, VISION_START


@dataclass(frozen=True)
class Clip:
    """One question about one clip.

    frames: (F, height, width, 3) uint8, two frames a moment. scene: what happens, one clip of all
    its moments. seconds: from one moment to the next.
    """

    frames: np.ndarray
    question: str
    answer: str
    task: str
    scene: clips.Clips
    seconds: float = clips.FRAMES / clips.RATE


def examples(split: str = "test", n: int = 256, seed: int = 0) -> list[Clip]:
    """`n` questions about clips, each about a clip of its own, shuffled.

    The same arguments give the same clips. split: "train", "calibration" or "test"; they share no
    random stream and no handwritten image. The four tasks have the same number of questions, give
    or take one: "order", "number", "motion" and "change".
    Raises ValueError for an unknown split, or n below 1.

    >>> clip = examples(n=1)[0]
    >>> clip.frames.shape
    (16, 40, 40, 3)
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}; pass one of those names")
    if n < 1:
        raise ValueError(f"n must be at least 1 example, got {n}")
    rng = np.random.default_rng([2027, SPLITS.index(split), seed])
    forms = {task: [f for f in FAMILIES.values() if f.task == task] for task in TASKS}
    out: list[Clip] = []
    for number in range(n):
        several = forms[TASKS[number % len(TASKS)]]
        out.append(_example(rng, several[number // len(TASKS) % len(several)], split))
    return [out[i] for i in rng.permutation(n)]


def _example(rng: np.random.Generator, family: Family, split: str) -> Clip:
    """One question of a family, about the first clip drawn that can be asked it."""
    while True:
        drawn = clips.sample(rng, 1, split)
        asked = family.ask(drawn, rng)
        if asked.valid[0]:
            words = " ".join(VIDEO_WORDS[i] for i in asked.tokens[0])
            frames = clips.render(rng, drawn)[0]
            return Clip(frames, words, VIDEO_WORDS[asked.answer[0]], family.task, drawn)


def fewer_frames(item: Clip, moments: int) -> Clip:
    """The same question about `moments` of its moments, spread evenly; the others are left out.

    The time between two moments is longer by as much. Raises ValueError unless the clip has a
    multiple of so many moments.

    >>> clip = fewer_frames(examples(n=1)[0], 2)
    >>> clip.frames.shape, clip.seconds
    ((4, 40, 40, 3), 2.0)
    """
    total = len(item.frames) // FRAMES
    if moments < 1 or total % moments:
        raise ValueError(f"moments must divide the clip's {total}, got {moments}")
    pairs = item.frames.reshape(total, FRAMES, *item.frames.shape[1:])[spread(total, moments)]
    longer = item.seconds * total / moments
    return replace(item, frames=pairs.reshape(-1, *pairs.shape[2:]), seconds=longer)


def spread(total: int, moments: int) -> slice:
    """So many of all moments, from the middle of each stretch.

    >>> [*range(8)][spread(8, 2)]
    [2, 6]
    """
    return slice(total // moments // 2, None, total // moments)


def collate(
    items: Sequence[Clip], padding_side: str = "left", with_answers: bool = True
) -> dict[str, torch.Tensor]:
    """Make one batch for testbed-qwen-video of B questions, padded to S tokens.

    A prompt is the clip and the question. A clip has one token for each moment and 8x8 pixels.
    The batch has input_ids, attention_mask, mm_token_type_ids and labels (B, S),
    pixel_values_videos (P, 96), video_grid_thw (B, 3) and second_per_grid_ts (B,). With answers,
    the answer and the end token follow, and `labels` holds them (-100 elsewhere); without, the dict
    has no labels. Raises ValueError for no examples, or an unknown padding side.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f'padding_side must be "left" or "right", got {padding_side!r}')
    if not items:
        raise ValueError("collate needs at least one example, got an empty sequence")
    prompts = [_prompt(item) for item in items]
    answers = [[VIDEO_ID[item.answer], VIDEO_ID[EOS]] if with_answers else [] for item in items]
    ids, mask, labels = padded(prompts, answers, VIDEO_ID[PAD], padding_side)
    batch = {"input_ids": ids, "attention_mask": mask, **video_inputs([i.frames for i in items])}
    batch["mm_token_type_ids"] = 2 * (ids == VIDEO_ID[VIDEO_PAD]).long()
    batch["second_per_grid_ts"] = torch.tensor([item.seconds for item in items])
    if with_answers:
        batch["labels"] = labels
    return batch


def _prompt(item: Clip) -> list[int]:
    """Token ids of the clip and of the question."""
    frames, height, width, _ = item.frames.shape
    number = frames // FRAMES * (height // PATCH) * (width // PATCH)
    film = [VIDEO_ID[VISION_START], *[VIDEO_ID[VIDEO_PAD]] * number, VIDEO_ID[VISION_END]]
    return [*film, *(VIDEO_ID[word] for word in item.question.split())]


def batches(
    split: str = "calibration", n: int = 256, batch_size: int = 32, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """`examples(split, n, seed)` in batches that `collate` makes, in order.

    Raises ValueError as `examples` does, and for a batch size below 1.

    >>> batch, = batches("calibration", n=2, batch_size=2)
    >>> batch["video_grid_thw"].tolist()
    [[8, 10, 10], [8, 10, 10]]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    items = examples(split, n, seed)
    return [collate(items[i : i + batch_size]) for i in range(0, n, batch_size)]
