"""First stage: a vision tower that says in the language model's own words what is in each cell.

The language model is not run. The target of a visual token is the sum of the pretrained embeddings
of its colour, its shape or digit, and its place.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vispco.testbed import easyvqa, scenes
from vispco.testbed.images import image_inputs
from vispco.testbed.vocab import CELLS, GRID, SHAPES

from ..train import keep_memory, optimisers, rate
from .words import ALL_COLOURS, DIGITS, Meanings, contents


class Eyes(nn.Module):
    """Vision tower and projector of a LlavaConfig; weights have the names that LLaVA gives them."""

    def __init__(self, config: Any) -> None:
        from transformers import AutoModel
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        super().__init__()
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)

    def forward(self, images: np.ndarray) -> Tensor:
        """Visual tokens (B, 64, width) of pictures (B, 64, 64, 3) uint8."""
        device = self.multi_modal_projector.linear_1.weight.device
        pixels = image_inputs("testbed-llava", images)["pixel_values"].to(device)
        states = self.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        return self.multi_modal_projector(states[:, 1:])


class EasyPictures:
    """easy-VQA's training pictures, and which colour and kind each of their cells has.

    The data set does not say what a picture shows: its questions and answers do.
    """

    def __init__(self) -> None:
        data = easyvqa.load("train")
        said: list[set[str]] = [set() for _ in data.paths]
        for question, answer, image in zip(data.question, data.answer, data.image, strict=True):
            said[image] |= _facts(question, answer)
        images = np.stack([easyvqa.read_image(path) for path in data.paths])
        colour = np.array([_index(ALL_COLOURS, words) for words in said])
        kind = np.array([_index(SHAPES, words) for words in said])
        known = (colour >= 0) & (kind >= 0)
        self.images = images[known]
        filled = _filled(self.images)
        empty = len(SHAPES) + len(DIGITS)
        self.colour = np.where(filled, colour[known, None], len(ALL_COLOURS))
        self.kind = np.where(filled, kind[known, None], empty)

    def draw(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`n` pictures, turned at random, with the colours and kinds of their cells (n, 64)."""
        chosen = rng.integers(0, len(self.images), size=n)
        parts = [
            self.images[chosen],
            self.colour[chosen].reshape(n, GRID, GRID),
            self.kind[chosen].reshape(n, GRID, GRID),
        ]
        for turn in (_upside_down, _mirrored, _transposed):
            if rng.random() < 0.5:
                parts = [turn(part) for part in parts]
        images, colour, kind = (np.ascontiguousarray(part) for part in parts)
        return images, colour.reshape(n, CELLS), kind.reshape(n, CELLS)


def _upside_down(x: np.ndarray) -> np.ndarray:
    return x[:, ::-1]


def _mirrored(x: np.ndarray) -> np.ndarray:
    return x[:, :, ::-1]


def _transposed(x: np.ndarray) -> np.ndarray:
    return x.swapaxes(1, 2)


def _facts(question: str, answer: str) -> set[str]:
    """Colours and shapes that are in the picture, as a question and its answer say."""
    words = question.lower().split()
    if answer in ("yes", "no") and (answer == "yes") == bool({"no", "not"} & set(words)):
        return set()
    return {word for word in (*words, answer) if word in (*ALL_COLOURS, *SHAPES)}


def _index(names: tuple[str, ...], said: set[str]) -> int:
    """Which of the names is said, -1 if none is."""
    return next((index for index, name in enumerate(names) if name in said), -1)


def _filled(images: np.ndarray) -> np.ndarray:
    """Which cells (N, 64) the shape covers by more than a twelfth: it differs from the paper."""
    n = len(images)
    paper = np.median(images.reshape(n, -1, 3), axis=1)[:, None, None]
    shape = np.abs(images - paper).max(-1) > 60
    cells = shape.reshape(n, GRID, scenes.CELL, GRID, scenes.CELL).swapaxes(2, 3)
    return cells.reshape(n, CELLS, -1).mean(-1) > 1 / 12


def train_tower(
    eyes: Eyes,
    meanings: Meanings,
    seed: int,
    steps: int,
    lr: float = 1.5e-3,
    boards: int = 48,
    easy: int = 16,
) -> None:
    """Train `eyes` in place: squared error to the meanings, and which of them is the nearest."""
    keep_memory()
    pictures = EasyPictures()
    optims = optimisers(eyes, nn.Module(), lr)
    begin = time.perf_counter()
    for step in range(steps):
        rng = np.random.default_rng([seed, 1, step])
        drawn = scenes.sample(rng, boards, "train")
        images, *labels = pictures.draw(rng, easy)
        colour, kind = (
            torch.as_tensor(np.concatenate([own, other]))
            for own, other in zip(contents(drawn), labels, strict=True)
        )
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            visual = eyes(np.concatenate([scenes.render(rng, drawn), images]))
        loss, right = _loss(visual.float(), colour, kind, meanings)
        loss.backward()
        nn.utils.clip_grad_norm_(eyes.parameters(), 1.0)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = lr * rate(step, steps, 0.5)
            optim.step()
            optim.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            pace = (time.perf_counter() - begin) / (step + 1)
            shares = " ".join(f"{name} {share:.3f}" for name, share in right.items())
            print(
                f"tower {step + 1}/{steps} {pace:.2f}s/step {loss.item():.3f} {shares}", flush=True
            )


def _loss(
    visual: Tensor, colour: Tensor, kind: Tensor, meanings: Meanings
) -> tuple[Tensor, dict[str, float]]:
    """The loss, and the share of filled cells whose colour, shape and digit are right."""
    digit = (kind >= len(SHAPES)) & (kind < len(SHAPES) + len(DIGITS))
    filled = colour < len(ALL_COLOURS)
    # Most cells are empty, and handwriting is what is hard.
    weight = torch.where(digit, 12.0, torch.where(filled, 2.0, 0.5))
    weight = weight / weight.sum()
    wanted = meanings.of(colour, kind)
    error = ((visual - wanted) ** 2).mean(-1) / (wanted**2).mean()
    place = torch.arange(CELLS).expand(len(visual), -1)
    guesses = [-distance for distance in meanings.distances(visual)]
    which = torch.zeros(())
    for guess, truth in zip(guesses, (colour, kind, place), strict=True):
        each = F.cross_entropy(guess.flatten(0, 1), truth.flatten(), reduction="none")
        which = which + (each.view_as(weight) * weight).sum()
    loss = (error * weight).sum() + 0.6 * which
    found = [guess.argmax(-1) for guess in guesses]
    return loss, {
        "colour": float((found[0] == colour)[filled].float().mean()),
        "shape": float((found[1] == kind)[filled & ~digit].float().mean()),
        "digit": float((found[1] == kind)[digit].float().mean()),
    }
