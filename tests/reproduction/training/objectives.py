"""Auxiliary objectives of training: what the model should see. They are annealed to nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vispco.testbed import scenes
from vispco.testbed.questions import NEIGHBOUR
from vispco.testbed.vocab import CELLS, COLOURS

from .pack import Packed


class CellHeads(nn.Module):
    """Linear heads on the visual tokens, thrown away after training.

    They name the cell's place and its kind (colour with shape), and colour, shape and digit of the
    cell itself and of the cells north and west of it.
    """

    KINDS = len(COLOURS) * (scenes.DIGIT + 1) + 1
    #: Colours, shapes and digits, and 0 for an empty cell.
    PARTS = (len(COLOURS) + 1, scenes.DIGIT + 2, 11)

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.sizes = (CELLS, self.KINDS, *self.PARTS * (1 + len(NEIGHBOUR)))
        self.head = nn.Linear(hidden, sum(self.sizes))

    def forward(self, states: torch.Tensor, boards: scenes.Scenes) -> torch.Tensor:
        """Mean loss over the heads, of states (B, 64, hidden)."""
        logits = self.head(F.layer_norm(states, states.shape[-1:])).float()
        parts = logits.split(self.sizes, dim=-1)
        loss = [
            F.cross_entropy(part.flatten(0, 1), torch.as_tensor(truth).flatten())
            for part, truth in zip(parts, self.truths(boards), strict=True)
        ]
        return torch.stack(loss).mean()

    @staticmethod
    def truths(boards: scenes.Scenes) -> list[np.ndarray]:
        """What each head should say (B, 64)."""
        parts = [boards.colour + 1, boards.shape + 1, boards.digit + 1]
        kind = boards.colour * (scenes.DIGIT + 1) + boards.shape + 1
        kind = np.where(boards.colour >= 0, kind, 0)
        place = np.broadcast_to(np.arange(CELLS), kind.shape)
        near = [np.where(cell >= 0, part[:, cell], 0) for cell in NEIGHBOUR for part in parts]
        return [np.ascontiguousarray(truth) for truth in (place, kind, *parts, *near)]


def hint_loss(model: Any, states: torch.Tensor, batch: Packed) -> torch.Tensor:
    """How little the states (B, T, hidden) of the questions' last tokens resemble the hints.

    A hint is the embedding of what a question refers to.
    """
    embedding = model.get_input_embeddings().weight
    logits = F.layer_norm(states, states.shape[-1:]) @ embedding.T
    return F.cross_entropy(logits.float().flatten(0, 1), batch.hint.flatten(), ignore_index=-100)
