"""Examples and batches of the eight tasks, made on the fly from seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from . import easyvqa, scenes, smollm
from .images import image_inputs
from .model import IMAGE_TOKENS, resolve
from .processor import PATCH
from .questions import FAMILIES
from .vocab import EOS, ID, PAD, WORDS, encode

TASKS = ("easy_vqa", "place", "digit", "find", "count", "exist", "relation", "compare")
SPLITS = scenes.SPLITS


@dataclass(frozen=True)
class Example:
    """One question about one image.

    image: (64, 64, 3) uint8. testbed-qwen also takes other sizes, in whole cells of 8 pixels.
    """

    image: np.ndarray
    question: str
    answer: str
    task: str


def examples(
    split: str = "test", n: int = 512, seed: int = 0, tasks: Sequence[str] | None = None
) -> list[Example]:
    """`n` examples, evenly over `tasks` and shuffled; the same arguments give the same examples.

    split: "train", "calibration" or "test". The splits share nothing: they draw boards from
    different random streams and digits from disjoint sets of handwritten images. easy-VQA keeps its
    published test split. tasks: names out of `TASKS`; None: all eight. Raises ValueError for an
    unknown name, or n below 1.
    """
    chosen = _check(split, tasks, n)
    out: list[Example] = []
    for task, count in zip(chosen, _shares(n, [1.0] * len(chosen)), strict=True):
        key = [2026, SPLITS.index(split), seed, TASKS.index(task)]
        make = _easy if task == "easy_vqa" else _generated
        out += make(key, task, count, split)
    order = np.random.default_rng([2026, SPLITS.index(split), seed]).permutation(len(out))
    return [out[i] for i in order]


def _check(split: str, tasks: Sequence[str] | None, n: int) -> tuple[str, ...]:
    """The names of the tasks."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}; pass one of those names")
    chosen = (tasks,) if isinstance(tasks, str) else TASKS if tasks is None else tuple(tasks)
    unknown = [task for task in chosen if task not in TASKS]
    if unknown or not chosen:
        raise ValueError(
            f"tasks must be names out of {TASKS}, got {tasks!r}; "
            f"remove {unknown} or pass None for all"
        )
    if n < 1:
        raise ValueError(f"n must be at least 1 example, got {n}")
    return chosen


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """Whole parts of `total` in proportion to `weights`. The largest remainders are rounded up."""
    exact = total * np.asarray(weights) / np.sum(weights)
    parts = np.floor(exact).astype(int)
    parts[np.argsort(parts - exact, kind="stable")[: total - parts.sum()]] += 1
    return parts.tolist()


def _easy(key: list[int], task: str, n: int, split: str) -> list[Example]:
    """`n` examples of easy-VQA. They repeat only when more are asked for than there are."""
    if not n:
        return []
    data = easyvqa.load(split)
    rows = np.random.default_rng(key).permutation(len(data.question))
    return [
        Example(
            easyvqa.read_image(data.paths[data.image[i]]), data.question[i], data.answer[i], task
        )
        for i in np.resize(rows, n)
    ]


def _generated(key: list[int], task: str, n: int, split: str) -> list[Example]:
    """`n` examples of a generated task, shared out over its families."""
    names = [name for name, family in FAMILIES.items() if family.task == task]
    counts = _shares(n, [FAMILIES[name].share for name in names])
    out: list[Example] = []
    for number, (name, count) in enumerate(zip(names, counts, strict=True)):
        if count:
            rng = np.random.default_rng([*key, number])
            boards, questions, answers = generate(rng, name, count, split)
            images = scenes.render(rng, boards)
            for image, words, answer in zip(images, questions, answers, strict=True):
                out.append(Example(image, " ".join(WORDS[w] for w in words), WORDS[answer], task))
    return out


def generate(
    rng: np.random.Generator, family: str, n: int, split: str
) -> tuple[scenes.Scenes, np.ndarray, np.ndarray]:
    """Draw `n` boards, and a valid question of `family` about each.

    Returns the boards, the questions' token ids (n, L), and the answers' token ids (n,).
    """
    boards: list[scenes.Scenes] = []
    questions: list[np.ndarray] = []
    answers: list[np.ndarray] = []
    while (have := sum(map(len, boards))) < n:
        drawn = scenes.sample(rng, 8 + 2 * (n - have), split)
        asked = FAMILIES[family].ask(drawn, rng)
        index = np.flatnonzero(asked.valid)[: n - have]
        boards.append(drawn.take(index))
        questions.append(asked.tokens[index])
        answers.append(asked.answer[index])
    return scenes.join(boards), np.concatenate(questions), np.concatenate(answers)


def enlarge(items: Sequence[Example], height: int, width: int, seed: int = 0) -> list[Example]:
    """The same examples on larger pictures: blank paper follows to the right and below.

    Raises ValueError unless the sides are multiples of 8 pixels, and no smaller than any of the
    images.
    """
    top = max((item.image.shape[0] for item in items), default=0)
    left = max((item.image.shape[1] for item in items), default=0)
    if height < top or width < left or height % PATCH or width % PATCH:
        raise ValueError(
            f"height and width must be multiples of {PATCH} from {top} and {left} on, "
            f"got {height} and {width}; pass for example 64 and 80"
        )
    rng = np.random.default_rng(seed)
    return [
        replace(item, image=scenes.extend(rng, item.image[None], height, width)[0])
        for item in items
    ]


def padded(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], pad: int, padding_side: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels (B, S) of prompts, each followed by its answer.

    >>> ids, mask, labels = padded([[1, 2], [3]], [[4], [5]], pad=0, padding_side="left")
    >>> ids.tolist(), labels.tolist()
    ([[1, 2, 4], [0, 3, 5]], [[-100, -100, 4], [-100, -100, 5]])
    """
    size = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(prompts), size), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        length = len(prompt) + len(answer)
        start = size - length if padding_side == "left" else 0
        ids[row, start : start + length] = torch.tensor(prompt + answer)
        mask[row, start : start + length] = 1
        if answer:
            labels[row, start + len(prompt) : start + length] = torch.tensor(answer)
    return ids, mask, labels


def collate(
    items: Sequence[Example],
    padding_side: str = "left",
    with_answers: bool = True,
    model: str = "testbed-llava",
) -> dict[str, torch.Tensor]:
    """Make one batch for a testbed model of B examples, padded to S tokens.

    The batch has input_ids, attention_mask and labels (B, S), and pixel_values. A prompt is the
    image and the question. An image has one token for 8x8 pixels (64 for 64x64 pixels).
    pixel_values is (B, 3, 64, 64); for testbed-qwen the patches of all images (P, 96), with
    image_grid_thw (B, 3) and mm_token_type_ids (B, S). With answers, the answer and the end token
    follow, and `labels` holds them (-100 elsewhere). Without, the dict has no labels and fits
    `model.generate(**batch)`. Raises ValueError for no examples, an unknown padding side, or an
    image that the model does not take.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f'padding_side must be "left" or "right", got {padding_side!r}')
    if not items:
        raise ValueError("collate needs at least one example, got an empty sequence")
    name = resolve(model)
    prompts = [_prompt(name, item) for item in items]
    answers = [_answer(name, item) if with_answers else [] for item in items]
    pad = smollm.PAD_ID if name == smollm.NAME else ID[PAD]
    ids, mask, labels = padded(prompts, answers, pad, padding_side)
    batch = {"input_ids": ids, "attention_mask": mask}
    batch |= image_inputs(name, [item.image for item in items])
    if name == "testbed-qwen":
        batch["mm_token_type_ids"] = (ids == IMAGE_TOKENS[name].image).long()
    if with_answers:
        batch["labels"] = labels
    return batch


def _prompt(name: str, item: Example) -> list[int]:
    """Token ids of the image and of the question."""
    height, width = item.image.shape[:2]
    if height % PATCH or width % PATCH or not height * width:
        raise ValueError(
            f"images must have sides in whole cells of {PATCH} pixels, got {height}x{width}; "
            "resize or pad them"
        )
    if name != "testbed-qwen" and (height, width) != (64, 64):
        raise ValueError(
            f"{name} takes images of 64x64 pixels, got {height}x{width}; "
            'pass model="testbed-qwen", which takes others too'
        )
    tokens = IMAGE_TOKENS[name]
    visual = [tokens.image] * ((height // PATCH) * (width // PATCH))
    asked = smollm.question if name == smollm.NAME else encode
    return [*tokens.before, *visual, *tokens.after, *asked(item.question)]


def _answer(name: str, item: Example) -> list[int]:
    """Token ids of the answer and of its end."""
    if name == smollm.NAME:
        return [*smollm.answer(item.answer), smollm.END_ID]
    return [*encode(item.answer), ID[EOS]]


def batches(
    split: str = "calibration",
    n: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    tasks: Sequence[str] | None = None,
    padding_side: str = "left",
    model: str = "testbed-llava",
) -> list[dict[str, torch.Tensor]]:
    """`examples(split, n, seed, tasks)` in batches that `collate` makes for `model`, in order.

    >>> batch, = batches("calibration", n=4, batch_size=4)
    >>> sorted(batch), batch["pixel_values"].shape
    (['attention_mask', 'input_ids', 'labels', 'pixel_values'], torch.Size([4, 3, 64, 64]))
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    items = examples(split, n, seed, tasks)
    parts = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    return [collate(part, padding_side, model=model) for part in parts]
