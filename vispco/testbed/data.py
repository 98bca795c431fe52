"""Examples and batches of the eight tasks, made on the fly from seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from . import easyvqa, scenes
from .model import PATCH, SPECS, resolve
from .pack import image_inputs
from .questions import FAMILIES
from .vocab import EOS, ID, PAD, WORDS, encode

TASKS = ("easy_vqa", "place", "digit", "find", "count", "exist", "relation", "compare")
SPLITS = scenes.SPLITS


@dataclass(frozen=True)
class Example:
    """One question about one image."""

    image: np.ndarray  # (64, 64, 3) uint8; testbed-qwen also takes other sizes, in whole cells of 8 pixels
    question: str
    answer: str
    task: str


def _check(split: str, tasks: Sequence[str] | None, n: int) -> tuple[str, ...]:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}; pass one of those names")
    chosen = TASKS if tasks is None else (tasks,) if isinstance(tasks, str) else tuple(tasks)
    unknown = [task for task in chosen if task not in TASKS]
    if unknown or not chosen:
        raise ValueError(f"tasks must be names out of {TASKS}, got {tasks!r}; remove {unknown} or pass None for all")
    if n < 1:
        raise ValueError(f"n must be at least 1 example, got {n}")
    return chosen


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """Cut `total` into whole parts in proportion to `weights` (largest remainders first)."""
    exact = total * np.asarray(weights) / np.sum(weights)
    parts = np.floor(exact).astype(int)
    parts[np.argsort(parts - exact, kind="stable")[: total - parts.sum()]] += 1
    return parts.tolist()


def generate(rng: np.random.Generator, family: str, n: int, split: str) -> tuple[scenes.Scenes, np.ndarray, np.ndarray]:
    """`n` boards with a valid question of `family` each: (boards, question ids (n, L), answer ids (n,))."""
    kept: list[tuple] = []
    while (have := sum(len(part[0]) for part in kept)) < n:
        boards = scenes.sample(rng, 8 + 2 * (n - have), split)
        asked = FAMILIES[family].ask(boards, rng)
        index = np.flatnonzero(asked.valid)[: n - have]
        kept.append((boards.take(index), asked.tokens[index], asked.answer[index]))
    fields = ("colour", "shape", "digit", "writing")
    boards = scenes.Scenes(*(np.concatenate([getattr(part[0], f) for part in kept]) for f in fields))
    return boards, np.concatenate([part[1] for part in kept]), np.concatenate([part[2] for part in kept])


def _easy(rng: np.random.Generator, n: int, split: str) -> list[Example]:
    data = easyvqa.load(split)
    rows = rng.permutation(len(data.question))
    rows = np.resize(rows, n)  # repeats only when more are asked for than there are
    return [Example(easyvqa.read_image(data.paths[data.image[i]]), data.question[i], data.answer[i], "easy_vqa")
            for i in rows]  # fmt: skip


def _generated(key: list[int], task: str, n: int, split: str) -> list[Example]:
    names = [name for name, family in FAMILIES.items() if family.task == task]
    counts = _shares(n, [FAMILIES[name].share for name in names])
    out: list[Example] = []
    for number, (name, count) in enumerate(zip(names, counts, strict=True)):
        if count:
            rng = np.random.default_rng([*key, number])
            boards, tokens, answers = generate(rng, name, count, split)
            for image, row, answer in zip(scenes.render(rng, boards), tokens, answers, strict=True):
                out.append(Example(image, " ".join(WORDS[t] for t in row), WORDS[answer], task))
    return out


def examples(
    split: str = "test", n: int = 512, seed: int = 0, tasks: Sequence[str] | None = None
) -> list[Example]:
    """`n` examples, evenly over `tasks` and shuffled; the same arguments give the same examples.

    The splits share nothing: they draw boards from different random streams and digits from disjoint sets of
    handwritten images, and easy-VQA keeps its published test split ("calibration" is cut from its train split).
    """
    chosen = _check(split, tasks, n)
    out: list[Example] = []
    for task, count in zip(chosen, _shares(n, [1.0] * len(chosen)), strict=True):
        key = [2026, SPLITS.index(split), seed, TASKS.index(task)]
        if count:
            out += _easy(np.random.default_rng(key), count, split) if task == "easy_vqa" else _generated(
                key, task, count, split)  # fmt: skip
    order = np.random.default_rng([2026, SPLITS.index(split), seed]).permutation(len(out))
    return [out[i] for i in order]


def enlarge(items: Sequence[Example], height: int, width: int, seed: int = 0) -> list[Example]:
    """The same examples on larger pictures: the image in the upper left, blank paper to its right and below."""
    top, left = (max((item.image.shape[side] for item in items), default=0) for side in (0, 1))
    if height < top or width < left or height % PATCH or width % PATCH:
        raise ValueError(f"height and width must be multiples of {PATCH} from {top} and {left} on, got {height} and "
                         f"{width}; pass for example 64 and 80")  # fmt: skip
    rng = np.random.default_rng(seed)
    return [replace(item, image=scenes.extend(rng, item.image[None], height, width)[0]) for item in items]


def _prompt(name: str, item: Example) -> list[int]:
    """The image tokens, with what encloses them, and the question."""
    spec, (height, width) = SPECS[name], item.image.shape[:2]
    if height % PATCH or width % PATCH or not height * width:
        raise ValueError(f"images must have sides in whole cells of {PATCH} pixels, got {height}x{width}; resize or pad them")
    if name == "testbed-llava" and (height, width) != (64, 64):
        raise ValueError(f"testbed-llava takes images of 64x64 pixels, got {height}x{width}; pass "
                         'model="testbed-qwen", which takes others too')  # fmt: skip
    n = (height // PATCH) * (width // PATCH)
    return [*spec.before, *[spec.image] * n, *spec.after, *encode(item.question)]


def collate(
    items: Sequence[Example], padding_side: str = "left", with_answers: bool = True, model: str = "testbed-llava"
) -> dict[str, torch.Tensor]:
    """Inputs of the testbed model `model` for `items`: input_ids and attention_mask (B, S), pixel_values, labels (B, S).

    A prompt is one image token for 8x8 pixels (64 for a 64x64 image) and the question. pixel_values is (B, 3, 64, 64),
    for testbed-qwen the patches of all images (P, 96), with image_grid_thw (B, 3) and mm_token_type_ids (B, S). With
    answers, the answer and the end token follow, and `labels` holds them (-100 elsewhere). Without, the dict has no
    labels and fits `model.generate(**batch)`.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f'padding_side must be "left" or "right", got {padding_side!r}')
    if not items:
        raise ValueError("collate needs at least one example, got an empty sequence")
    name = resolve(model)
    prompts = [_prompt(name, item) for item in items]
    answers = [encode(item.answer) + [ID[EOS]] if with_answers else [] for item in items]
    size = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(items), size), ID[PAD])
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        length = len(prompt) + len(answer)
        start = size - length if padding_side == "left" else 0
        ids[row, start : start + length] = torch.tensor(prompt + answer)
        mask[row, start : start + length] = 1
        if answer:
            labels[row, start + len(prompt) : start + length] = torch.tensor(answer)
    out = {"input_ids": ids, "attention_mask": mask, **image_inputs(name, [item.image for item in items])}
    if name == "testbed-qwen":
        out["mm_token_type_ids"] = (ids == SPECS[name].image).long()
    return {**out, "labels": labels} if with_answers else out


def batches(
    split: str = "calibration",
    n: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    tasks: Sequence[str] | None = None,
    padding_side: str = "left",
    model: str = "testbed-llava",
) -> list[dict[str, torch.Tensor]]:
    """`examples(split, n, seed, tasks)`, collated in order for `model`; the tasks are read off the examples."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    items = examples(split, n, seed, tasks)
    return [collate(items[i : i + batch_size], padding_side, model=model) for i in range(0, len(items), batch_size)]
