"""What the full and a pruned model answer to some questions, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vispco.calibration import PreparedBatch, prepare, run_teacher
from vispco.config import PruningConfig
from vispco.evaluate import grade
from vispco.pruning import apply
from vispco.utils.digest import of_batches


@dataclass(frozen=True)
class Answers:
    """What one configuration answers to N questions.

    divergence: (N,) sum of KL(pruned || full) over the answer tokens. count: (N,) answer tokens.
    right: (N,) bool.
    """

    divergence: Tensor
    count: Tensor
    right: Tensor

    @property
    def kl(self) -> float:
        """Mean KL over the answer tokens, as of `vispco.evaluate`."""
        return float((self.divergence.sum() / self.count.sum()).clamp(min=0))

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.double().mean())


class Questions:
    """Batches of questions. count: (N,) answer tokens. digest: a name for the questions."""

    def __init__(self, model, batches: Sequence[Mapping]):
        self.batches = list(batches)
        self.prepared = prepare(model, batches, keep_features=True)
        self.digest = of_batches(batches)
        self.count = torch.cat([_answer_tokens(batch) for batch in self.prepared])

    def __len__(self) -> int:
        return len(self.count)

    def rows(self, part: Sequence[int]) -> Tensor:
        """Numbers of the questions in the batches `part`, in the order of these."""
        batches = torch.arange(len(self)).split([len(batch) for batch in self.prepared])
        return torch.cat([batches[i] for i in part])


def _answer_tokens(batch: PreparedBatch) -> Tensor:
    """How many each question of a batch has (B,)."""
    return torch.bincount(batch.rows, minlength=len(batch))


@torch.no_grad()
def ask(model, config: PruningConfig | None, prepared: list[PreparedBatch]) -> dict:
    """Answers under a configuration (None: of the full model), JSON-ready.

    {"kl": the divergence of each question, "right": a digit 0 or 1 for each}
    """
    run_teacher(model, prepared)
    if config is None:
        graded = [grade(batch, batch.log_probs) for batch in prepared]
    else:
        with apply(model, config) as pruner:
            graded = [grade(batch, pruner.run(batch)) for batch in prepared]
    divergence: list[float] = []
    right = ""
    for batch, (correct, _, kl, _) in zip(prepared, graded, strict=True):
        sums = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, batch.rows, kl.double())
        divergence += [float(f"{value:.7g}") for value in sums.tolist()]
        right += "".join("01"[value] for value in correct.tolist())
    return {"kl": divergence, "right": right}
