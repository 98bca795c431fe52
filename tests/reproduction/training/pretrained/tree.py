"""Many questions about a picture as one tree of tokens.

Questions that begin alike share their beginning: a token is computed once for all questions that
it is in. A token sees the picture and the tokens on its way from the root, so each question is
answered as if it were alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: No target here.
NONE = -100


@dataclass(frozen=True)
class Question:
    """One question in tokens.

    hint: the token of what it refers to, or NONE. family: a number that its hits are counted under.
    """

    tokens: Sequence[int]
    answer: Sequence[int]
    hint: int
    family: int


class Tree:
    """The tokens of one picture's questions.

    tokens, parent (-1 at a root), depth, target, hint, family: one entry for each token.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parent: list[int] = []
        self.depth: list[int] = []
        self.target: list[int] = []
        self.hint: list[int] = []
        self.family: list[int] = []
        self._child: dict[tuple[int, int], int] = {}

    def add(self, question: Question, end: int | None) -> None:
        """Take in a question. end: the end token if it is to be predicted after the answer."""
        node = self._walk(-1, question.tokens)
        self.target[node] = question.answer[0]
        self.hint[node], self.family[node] = question.hint, question.family
        following = list(question.answer[1:])
        if end is not None:
            following.append(end)
        for token, after in zip(question.answer, following, strict=False):
            node = self._walk(node, (token,))
            self.target[node] = after

    def _walk(self, node: int, tokens: Sequence[int]) -> int:
        """The node that is reached over `tokens`; nodes that are missing are made."""
        for token in tokens:
            if (node, token) not in self._child:
                self._child[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.parent.append(node)
                self.depth.append(self.depth[node] + 1 if node >= 0 else 0)
                self.target.append(NONE)
                self.hint.append(NONE)
                self.family.append(-1)
            node = self._child[node, token]
        return node


def grow(
    questions: Sequence[Question], end: int, rng: np.random.Generator, ends: float = 2.0
) -> Tree:
    """A tree of questions. So many of them as `ends`, on average, also predict the end token.

    That is learned at once, so the others save its tokens.
    """
    tree = Tree()
    for question in questions:
        tree.add(question, end if rng.random() < ends / len(questions) else None)
    return tree


@dataclass(frozen=True)
class Trees:
    """B trees with T tokens each, filled up on the right.

    tokens, depth, target, hint, family: (B, T). seen: (B, T, T) bool, which tokens (the last axis)
    a token sees.
    """

    tokens: Tensor
    depth: Tensor
    target: Tensor
    hint: Tensor
    family: Tensor
    seen: Tensor


def stack(trees: Sequence[Tree], filler: int) -> Trees:
    """Make a batch. `filler` is the token that shorter trees are filled up with."""
    size = max(len(tree.tokens) for tree in trees)

    def column(name: str, fill: int) -> Tensor:
        rows = [getattr(tree, name) for tree in trees]
        return torch.tensor([row + [fill] * (size - len(row)) for row in rows])

    seen = np.zeros((len(trees), size, size), dtype=bool)
    for own, tree in zip(seen, trees, strict=True):
        for node, parent in enumerate(tree.parent):
            # A parent comes before its children.
            if parent >= 0:
                own[node] = own[parent]
            own[node, node] = True
        blank = np.arange(len(tree.parent), size)
        own[blank, blank] = True
    return Trees(
        tokens=column("tokens", filler),
        depth=column("depth", 0),
        target=column("target", NONE),
        hint=column("hint", NONE),
        family=column("family", -1),
        seen=torch.as_tensor(seen),
    )
