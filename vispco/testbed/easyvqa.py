"""The published easy-VQA data set: 64x64 images of one coloured shape, with its own test split."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

#: So many of the 4000 train images are kept out of training, for calibration.
CALIBRATION_IMAGES = 200


@dataclass(frozen=True)
class EasyVqa:
    """Questions of one split. image: (Q,) int, which of `paths` a question is about."""

    question: list[str]
    answer: list[str]
    image: np.ndarray
    paths: list[str]


@lru_cache(maxsize=3)
def load(split: str) -> EasyVqa:
    """Questions of "train", "calibration" or "test".

    The calibration images are taken from the published train split. Raises ImportError without the
    data.
    """
    try:
        import easy_vqa
    except ImportError as error:
        message = 'the testbed needs the easy-VQA data: pip install "vispco[testbed]"'
        raise ImportError(message) from error
    if split == "test":
        texts, answers, owners = easy_vqa.get_test_questions()
        where = easy_vqa.get_test_image_paths()
        names = sorted(where)
    else:
        texts, answers, owners = easy_vqa.get_train_questions()
        where = easy_vqa.get_train_image_paths()
        names = _part(sorted(where), split)
    row = {name: index for index, name in enumerate(names)}
    kept = [i for i, owner in enumerate(owners) if owner in row]
    return EasyVqa(
        question=[texts[i].replace("?", "") for i in kept],
        answer=[answers[i] for i in kept],
        image=np.array([row[owners[i]] for i in kept]),
        paths=[where[name] for name in names],
    )


def _part(names: list, split: str) -> list:
    """The published train images that are of the split "train" or "calibration"."""
    calibration, train = np.split(
        np.random.default_rng(64).permutation(len(names)), [CALIBRATION_IMAGES]
    )
    return [names[i] for i in sorted(calibration if split == "calibration" else train)]


def read_image(path: str) -> np.ndarray:
    """One picture as (64, 64, 3) uint8."""
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=np.uint8)
