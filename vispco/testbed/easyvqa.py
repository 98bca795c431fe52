"""The published easy-VQA data set (64x64 images of one coloured shape), with its own train/test split."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .vocab import ID, encode

CALIBRATION_IMAGES = 200  # of the 4000 train images, held out of training for calibration


@dataclass(frozen=True)
class EasyVqa:
    """Questions of one split; `image` indexes `paths`."""

    question: list[str]
    answer: list[str]
    image: np.ndarray  # (Q,) int
    paths: list[str]


@lru_cache(maxsize=3)
def load(split: str) -> EasyVqa:
    """Questions of "train", "calibration" (images taken from the published train split) or "test"."""
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError('the testbed needs the easy-VQA data: pip install "vispco[testbed]"') from error
    if split == "test":
        (texts, answers, owners), where = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    else:
        (texts, answers, owners), where = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    names = sorted(where)
    if split != "test":
        order = np.random.default_rng(64).permutation(len(names))
        order = order[:CALIBRATION_IMAGES] if split == "calibration" else order[CALIBRATION_IMAGES:]
        names = [names[i] for i in sorted(order)]
    row = {name: index for index, name in enumerate(names)}
    kept = [i for i, owner in enumerate(owners) if owner in row]
    return EasyVqa(
        question=[texts[i].replace("?", "") for i in kept],
        answer=[answers[i] for i in kept],
        image=np.array([row[owners[i]] for i in kept]),
        paths=[where[name] for name in names],
    )


def read_image(path: str) -> np.ndarray:
    """One picture as (64, 64, 3) uint8."""
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.uint8)


def as_arrays(split: str) -> tuple[np.ndarray, list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """The whole split for training.

    Returns images (N, 64, 64, 3) uint8, the question rows of every image, and for all questions the token ids
    (Q, L) right-padded with 0, their lengths (Q,), and the answers' ids (Q,).
    """
    data = load(split)
    images = np.stack([read_image(path) for path in data.paths])
    rows = [np.flatnonzero(data.image == index) for index in range(len(images))]
    encoded = [encode(question) for question in data.question]
    length = np.array([len(tokens) for tokens in encoded])
    tokens = np.zeros((len(encoded), length.max()), dtype=np.int64)
    for index, row in enumerate(encoded):
        tokens[index, : len(row)] = row
    return images, rows, tokens, length, np.array([ID[answer] for answer in data.answer])
