"""The pictures and questions of one training step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vispco.testbed import easyvqa, scenes, smollm
from vispco.testbed.questions import FAMILIES, Family
from vispco.testbed.vocab import WORDS

from ..curriculum import Curriculum
from .decoder import Windows
from .tree import NONE, Question, Tree, Trees, grow, stack
from .words import answer, question

#: The number of easy-VQA among the families; the generated ones come before it.
EASY = len(FAMILIES)


@dataclass(frozen=True)
class Batch:
    """Pictures (B, 64, 64, 3) uint8 with trees of questions; the boards come before easy-VQA's."""

    images: np.ndarray
    boards: scenes.Scenes
    trees: Trees


class EasyQuestions:
    """easy-VQA's training pictures, each with its questions."""

    def __init__(self) -> None:
        data = easyvqa.load("train")
        self.images = np.stack([easyvqa.read_image(path) for path in data.paths])
        self.asked: list[list[tuple[str, str]]] = [[] for _ in data.paths]
        for asked, said, image in zip(data.question, data.answer, data.image, strict=True):
            self.asked[image].append((asked.lower(), said))


class Drawing:
    """Draws training steps. boards, easy: pictures a step of each sort.

    families: how many of them are asked about each board. questions: of each family; those that
    come out equal are asked once.
    """

    def __init__(self, boards: int, easy: int, families: int, questions: int) -> None:
        self.easy = EasyQuestions()
        self.n_boards, self.n_easy = boards, easy
        self.families, self.questions = families, questions
        self.names = list(FAMILIES)

    def step(self, rng: np.random.Generator, ladder: Curriculum) -> Batch:
        """Pictures and questions; the ladder says which families need practice."""
        boards = scenes.sample(rng, self.n_boards, "train")
        trees = [self._about(rng, boards.take(np.array([i])), ladder) for i in range(len(boards))]
        chosen = rng.integers(0, len(self.easy.images), size=self.n_easy)
        trees += [
            self._tree(rng, [(*asked, None, EASY) for asked in self.easy.asked[i]]) for i in chosen
        ]
        images = np.concatenate([scenes.render(rng, boards), self._turned(rng, chosen)])
        return Batch(images, boards, stack(trees, filler=smollm.PAD_ID))

    def _about(self, rng: np.random.Generator, board: scenes.Scenes, ladder: Curriculum) -> Tree:
        """A tree of questions about one board."""
        again = board.take(np.zeros(self.questions, dtype=np.int64))
        asked: dict[tuple, None] = {}
        for number in sorted(set(ladder.draw(rng, self.families))):
            family: Family = FAMILIES[self.names[number]]
            drawn = family.ask(again, rng)
            for row in np.flatnonzero(drawn.valid):
                text = " ".join(WORDS[word] for word in drawn.tokens[row])
                hint = WORDS[drawn.hint[row]] if drawn.hint[row] >= 0 else None
                asked[text, WORDS[drawn.answer[row]], hint, number] = None
        return self._tree(rng, list(asked))

    def _tree(self, rng: np.random.Generator, asked: list[tuple]) -> Tree:
        """A tree; in a quarter of them questions end with "?", half of these with a capital too."""
        mark = "?" if rng.random() < 1 / 4 else ""
        capital = bool(mark) and rng.random() < 1 / 2
        questions = [
            Question(
                question((text.capitalize() if capital else text) + mark),
                answer(said),
                answer(hint)[0] if hint else NONE,
                family,
            )
            for text, said, hint, family in asked
        ]
        return grow(questions, smollm.END_ID, rng)

    def _turned(self, rng: np.random.Generator, chosen: np.ndarray) -> np.ndarray:
        """easy-VQA pictures, turned at random: nothing is asked about places."""
        images = self.easy.images[chosen]
        if rng.random() < 0.5:
            images = images[:, ::-1]
        if rng.random() < 0.5:
            images = images[:, :, ::-1]
        if rng.random() < 0.5:
            images = images.swapaxes(1, 2)
        return np.ascontiguousarray(images)


def draw_windows(rng: np.random.Generator, rows: int, layers: int, early: float) -> Windows:
    """In which layers the rows see their pictures.

    Most see them from layer 0, 3 or 6 until the layer from which on they are gone: 22, 26 or none.
    So the decoder reads its picture deep inside, and is done before its end. A share `early` of the
    rows loses sight anywhere before layer 22: they learn what to answer without.
    """
    opens = rng.choice([0, 3, 6], p=[0.35, 0.3, 0.35], size=rows)
    drop = int(rng.choice([layers, 26, 22], p=[0.3, 0.2, 0.5]))
    closes = np.where(rng.random(rows) < early, rng.integers(0, 22, size=rows), layers)
    return Windows(torch.as_tensor(opens), torch.as_tensor(closes), drop)


def hits(logits: Tensor, trees: Trees, counted: Tensor) -> dict[int, float]:
    """The share of first answer tokens that are right, of each family.

    logits: (N, vocabulary), of the nodes with a target. counted: (N,) bool, which of them count.
    """
    asked = trees.target != NONE
    right = logits.argmax(-1) == trees.target[asked]
    family = torch.where(counted, trees.family[asked], -1)
    return {
        int(number): float(right[family == number].float().mean())
        for number in family.unique()
        if number >= 0
    }
