"""How an estimator's gradients agree with exact differences, and the tables of it."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .estimator_candidates import BATCH
from .markdown import markdown

if TYPE_CHECKING:
    from .estimators import Ground

#: Columns of the table: (score, tokens h of the difference).
_SCORES = (
    *(("cosine", "1"), ("cosine", "4"), ("cosine", "8")),
    *((name, "4") for name in ("cosine of a batch", "cosine of ten batches")),
    *((name, "4") for name in ("scale", "bias", "std", "descends")),
)
#: Columns of those with which real steps were tried.
_STEPS = ("steps that lower the KL", "KL after a step")
#: How many batches are drawn.
_DRAWS = 200


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine between vectors along the last dimension."""
    return cosine_similarity(a, b, dim=-1)


def compare(
    ground: Ground,
    gradients: Tensor,
    truths: dict[int, Tensor],
    cost: float,
    seed: int,
    steps: int = 0,
) -> dict:
    """Bias and spread of gradients (questions, P), along the budget.

    Numbers that refer to a truth are keyed by its h, in tokens. cost: passes a question. A batch
    costs what `BATCH` questions forward and backward (3 passes each) do. steps: real steps to try.
    """
    generator = torch.Generator().manual_seed(seed)
    flat = ground.tangent(gradients)
    mean, size = flat.mean(0), round(3 * BATCH / cost)

    def batches(count: int) -> Tensor:
        """Means (draws, P) of `count` questions, drawn anew."""
        drawn = [torch.randint(len(flat), (count,), generator=generator) for _ in range(_DRAWS)]
        return torch.stack([flat[rows].mean(0) for rows in drawn])

    one, ten = batches(size), batches(10 * size)
    spread = (one - mean).pow(2).sum(-1).mean().sqrt()
    row: dict = {}
    for reach, slopes in truths.items():
        truth = ground.tangent(slopes).mean(0)
        scores = {
            "cosine off the budget": cosine(gradients.mean(0), slopes.mean(0)),
            "cosine": cosine(mean, truth),
            "cosine of a batch": cosine(one, truth).mean(),
            "cosine of ten batches": cosine(ten, truth).mean(),
            "scale": mean @ truth / (truth @ truth),
            "bias": (mean - truth).norm() / truth.norm(),
            "std": spread / truth.norm(),
            "descends": (one @ truth > 0).double().mean(),
        }
        for name, value in scores.items():
            row.setdefault(name, {})[str(reach)] = float(value)
    if steps:
        row |= _real_steps(ground, one[:steps])
    return row


def _real_steps(ground: Ground, directions: Tensor) -> dict[str, float]:
    """What a step down each direction (steps, P) does to the KL of some batches."""
    some = slice(6)
    now = ground.kl(ground.drops, some).mean()
    after = [ground.kl(ground.stepped(direction), some).mean() for direction in directions]
    ratios = torch.stack(after) / now
    lower = torch.stack(after) < now
    return {_STEPS[0]: float(lower.double().mean()), _STEPS[1]: float(ratios.mean())}


def table(found: dict) -> str:
    """Markdown: each estimator's mean over the schedules, then every schedule's cosines."""
    means, single = [], []
    for name, by_schedule in found["estimators"].items():
        rows = list(by_schedule.values())
        scores = [f"{fmean(row[score][h] for row in rows):.2f}" for score, h in _SCORES]
        stepped = _STEPS[0] in rows[0]
        steps = [f"{fmean(row[s] for row in rows):.3f}" if stepped else "" for s in _STEPS]
        means.append([name, *scores, *steps])
        cosines = [(row["cosine"]["4"], row["cosine of a batch"]["4"]) for row in rows]
        single.append([name, *(f"{all_of:.2f} / {batch:.2f}" for all_of, batch in cosines)])
    head = ["estimator", *(f"{score}, h = {h}" for score, h in _SCORES), *_STEPS]
    where = f"{found['model']}, {found['method']}, {found['questions']} questions"
    parts = [
        f"Gradient estimators on {where}, seed {found['seed']}; along the budget, against "
        "differences over h tokens, mean over the schedules.",
        markdown(head, means),
        "Cosine of the mean gradient / of a batch's, h = 4, by schedule.",
        markdown(["estimator", *found["schedules"]], single),
    ]
    return "\n\n".join(parts) + "\n"
