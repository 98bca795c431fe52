"""The video task: questions about generated clips, and their batches for testbed-qwen-video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from . import clips
from .clip_questions import FAMILIES, TASKS
from .data import _shares
from .images import video_inputs
from .model import FRAMES, QWEN_PATCH, MERGE
from .scenes import SPLITS
from .vocab import EOS, PAD, VIDEO_ID, VIDEO_PAD, VIDEO_WORDS, VISION_END, VISION_START


@dataclass(frozen=True)
class ClipExample:
    """One question about one clip.

    frames: (F, height, width, 3) uint8. rate: frames a second. question and answer: words.
    """

    frames: np.ndarray
    question: str
    answer: str
    task: str
    rate: float = clips.RATE
