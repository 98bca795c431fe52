"""`vispco.evaluate`: accuracy, KL and FLOPs of one configuration on labelled batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .config import PruningConfig
from .distributed import gathered
from .flops import CostModel
from .pruning import apply, check_fits
from .registry import adapter_for, build_method
from .teacher import Lesson, answer_logits, during, kl_divergence, prepare, shapes, teach, token_losses


@dataclass(frozen=True)
class Record:
    """What `evaluate` measured.

    accuracy: share of samples whose whole answer is right: the arg max at every answer token, given the tokens
        before it, which is what greedy decoding gives (an empty answer scores 0).
    kl: mean KL(pruned || full) over answer tokens, nats. task_loss: mean cross-entropy of the right tokens, nats. flops: mean prefill FLOPs of a sample, language model.
    share: of the full model's; prunable_share: of its prunable cost (0 text only, 1 full).
    n: samples with an answer; correct: one bool each, in order.
    """

    accuracy: float
    kl: float
    task_loss: float
    flops: float
    share: float
    prunable_share: float
    n: int
    correct: Tensor = field(repr=False, compare=False)

    def to_dict(self) -> dict:
        """JSON-ready, without the single answers."""
        return {k: v for k, v in asdict(self).items() if k != "correct"}


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Mapping] | list[Lesson], config: PruningConfig | None = None,
             *, mode: str = "deploy") -> Record:
    """Run `model` under `config` (None: in full) over `batches` and compare with the answers and the full model.

    batches: dicts of model inputs with `labels` (-100 outside the answer). To evaluate many configurations, pass
    `lessons = teach(model, prepare(model, batches))` (from `vispco.teacher`): the full model then runs only once.
    Raises ValueError for batches without answers or visual tokens, and as `apply` does; FloatingPointError, naming batch and
    layer, if logits, hidden states or scores are not finite.

    >>> from vispco import testbed
    >>> model, _ = testbed.load("testbed-llava")
    >>> record = evaluate(model, testbed.batches("test", n=64, batch_size=32))
    >>> record.kl, record.prunable_share, record.n
    (0.0, 1.0, 64)
    """
    adapter = adapter_for(model)(model)
    if config is not None:
        check_fits(config, adapter)
    given: Any = batches
    lessons = given if _are_lessons(given) else prepare(model, given)
    training = model.training
    model.eval()
    try:
        teach(model, lessons)
        with nullcontext() if config is None else apply(model, config, mode=mode) as pruner:
            grades = []
            for i, lesson in enumerate(lessons):
                with during(f"batches[{i}]"):
                    grades.append(grade(lesson, lesson.log_probs if pruner is None else answer_logits(model, lesson, pruner)))
    finally:
        model.train(training)
    return record(grades, *costs(adapter, lessons, config))


def grade(lesson: Lesson, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which answers are right (one bool per sample that has one); at each answer token, KL(pruned || full) and the task loss.

    logits: (A, vocabulary), or `lesson.log_probs` itself, whose divergence is 0 to the bit.
    """
    same = logits is lesson.log_probs
    divergence = torch.zeros(len(logits)) if same else kl_divergence(logits, lesson.log_probs).cpu()
    wrong = (logits.argmax(-1).cpu() != lesson.targets).long()
    misses = torch.zeros(len(lesson), dtype=torch.long).index_add_(0, lesson.rows, wrong)
    return (misses == 0)[lesson.answers.any(1)], divergence, token_losses(logits, lesson, "task").cpu()


def record(grades: list[tuple[Tensor, Tensor, Tensor]], flops: Tensor, full: Tensor, text: Tensor) -> Record:
    """The means over all samples; FLOPs (samples,) as they ran, in full and without visual tokens."""
    correct, divergence, task = (gathered(torch.cat(part)) for part in zip(*grades))
    return Record(float(correct.float().mean()), float(divergence.mean().clamp(min=0)), float(task.mean()), float(flops.mean()),
                  float(flops.sum() / full.sum()), float((flops - text).sum() / (full - text).sum()), len(correct), correct)


def costs(adapter, lessons: list[Lesson], config: PruningConfig | None) -> tuple[Tensor, Tensor, Tensor]:
    """Prefill FLOPs of every sample: (under `config`, in full, without visual tokens), float64."""
    method = build_method(config.method, config.method_options) if config else None
    cost = CostModel(adapter.dimensions(adapter.config), method)
    n_visual, n_text = shapes(lessons)
    full, text = cost.full(n_visual, n_text).double(), cost.text_only(n_text).double()
    if config is None:
        return full, full, text
    counts = torch.tensor([config.tokens(n) for n in n_visual.tolist()])
    return cost(counts, n_visual, n_text).double(), full, text


def _are_lessons(batches) -> TypeGuard[list[Lesson]]:
    return isinstance(batches, list) and bool(batches) and all(isinstance(b, Lesson) for b in batches)
