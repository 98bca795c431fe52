"""`vispco.evaluate`: accuracy, KL and FLOPs of one configuration on labelled batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .config import PruningConfig
from .utils.distributed import gathered
from .flops import CostModel
from .pruning import apply, check_fits
from .registry import adapter_for, build_method
from .calibration import PreparedBatch, during, kl_divergence, prepare, shapes, run_teacher, token_losses


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
def evaluate(model: nn.Module, batches: Sequence[Mapping] | list[PreparedBatch], config: PruningConfig | None = None,
             *, mode: str = "deploy") -> Record:
    """Run `model` under `config` (None: in full) over `batches` and compare with the answers and the full model.

    batches: dicts of model inputs with `labels` (-100 outside the answer). To evaluate many configurations, pass
    `prepared = run_teacher(model, prepare(model, batches))` (from `vispco.calibration`): the full model then runs only once.
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
    prepared = given if _are_lessons(given) else prepare(model, given)
    training = model.training
    model.eval()
    try:
        run_teacher(model, prepared)
        with nullcontext() if config is None else apply(model, config, mode=mode) as pruner:
            grades = []
            for i, prepared_batch in enumerate(prepared):
                with during(f"batches[{i}]"):
                    grades.append(grade(prepared_batch, prepared_batch.log_probs if pruner is None else pruner.run(prepared_batch)))
    finally:
        model.train(training)
    return record(grades, *costs(adapter, prepared, config))


def grade(prepared_batch: PreparedBatch, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which answers are right (one bool per sample that has one); at each answer token, KL(pruned || full) and the task loss.

    logits: (A, vocabulary), or `prepared_batch.log_probs` itself, whose divergence is 0 to the bit.
    """
    same = logits is prepared_batch.log_probs
    divergence = torch.zeros(len(logits)) if same else kl_divergence(logits, prepared_batch.log_probs).cpu()
    wrong = (logits.argmax(-1).cpu() != prepared_batch.targets).long()
    misses = torch.zeros(len(prepared_batch), dtype=torch.long).index_add_(0, prepared_batch.rows, wrong)
    return (misses == 0)[prepared_batch.answers.any(1)], divergence, token_losses(logits, prepared_batch, "task").cpu()


def record(grades: list[tuple[Tensor, Tensor, Tensor]], flops: Tensor, full: Tensor, text: Tensor) -> Record:
    """The means over all samples; FLOPs (samples,) as they ran, in full and without visual tokens."""
    correct, divergence, task = (gathered(torch.cat(part)) for part in zip(*grades))
    return Record(float(correct.float().mean()), float(divergence.mean().clamp(min=0)), float(task.mean()), float(flops.mean()),
                  float(flops.sum() / full.sum()), float((flops - text).sum() / (full - text).sum()), len(correct), correct)


def costs(adapter, prepared: list[PreparedBatch], config: PruningConfig | None) -> tuple[Tensor, Tensor, Tensor]:
    """Prefill FLOPs of every sample: (under `config`, in full, without visual tokens), float64."""
    method = build_method(config.method, config.method_options) if config else None
    cost = CostModel(adapter.dimensions(adapter.config), method)
    n_visual, n_text = shapes(prepared)
    full, text = cost.full(n_visual, n_text).double(), cost.text_only(n_text).double()
    if config is None:
        return full, full, text
    counts = torch.tensor([config.tokens(n) for n in n_visual.tolist()])
    return cost(counts, n_visual, n_text).double(), full, text


def _are_lessons(batches) -> TypeGuard[list[PreparedBatch]]:
    return isinstance(batches, list) and bool(batches) and all(isinstance(b, PreparedBatch) for b in batches)
