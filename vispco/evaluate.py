"""`vispco.evaluate`: accuracy, KL and FLOPs of one configuration on labelled batches."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .calibration import PreparedBatch, prepare, run_teacher, shapes
from .config import PruningConfig, as_config
from .flops import CostModel
from .pruning import apply, check_fits, unwrapped
from .pruning.forward import during, kl_divergence, token_losses
from .registry import adapter_for, build_method
from .utils.distributed import gathered

#: Of one batch: which answers are right, and which are the full model's; KL and task loss at each
#: answer token.
Grades = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Record:
    """What `evaluate` measured.

    accuracy: share of samples whose whole answer is right. Right is the arg max at every answer
        token, given the tokens before it, which is what greedy decoding gives. An empty answer
        scores 0.
    kl: mean KL(pruned || full) over the answer tokens, in nats.
    task_loss: mean cross-entropy of the right tokens, in nats.
    flops: mean prefill FLOPs of a sample, of the language model.
    share: the FLOPs over the full model's.
    prunable_share: the same of the prunable cost: 0 without visual tokens, 1 with all of them.
    n: samples with an answer. correct: (n,) bool, in order.
    agreement: share of samples at whose every answer token the arg max is the full model's; None in
        records of earlier versions.
    """

    accuracy: float
    kl: float
    task_loss: float
    flops: float
    share: float
    prunable_share: float
    n: int
    correct: Tensor = field(repr=False, compare=False)
    agreement: float | None = None

    def to_dict(self) -> dict:
        """The record as a JSON-ready dict, without the single answers."""
        return {name: value for name, value in asdict(self).items() if name != "correct"}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Sequence[Mapping] | list[PreparedBatch],
    config: PruningConfig | str | os.PathLike | None = None,
    *,
    mode: str = "deploy",
) -> Record:
    """Run `model` under `config` over `batches`; compare with the answers and the full model.

    batches: dicts of model inputs with `labels` (-100 outside the answer). To evaluate many
        configurations, pass `run_teacher(model, prepare(model, batches))` of `vispco.calibration`:
        the full model then runs only once.
    config: a configuration, or the path of its file; None is the full model.
    mode: "deploy" or "search", as of `vispco.apply`.
    Raises ValueError for batches without answers or visual tokens, and as `apply` does. Raises
    FloatingPointError, naming batch and layer, if logits, hidden states or scores are not finite.

    >>> from vispco import testbed
    >>> model, _ = testbed.load("testbed-llava")
    >>> record = evaluate(model, testbed.batches("test", n=64, batch_size=32))
    >>> record.kl, record.prunable_share, record.n
    (0.0, 1.0, 64)
    """
    model = unwrapped(model)
    adapter = adapter_for(model)(model)
    if config is not None:
        config = as_config(config)
        check_fits(config, adapter)
    given: Any = batches
    prepared = given if _are_prepared(given) else prepare(model, given)
    training = model.training
    model.eval()
    grades = []
    try:
        run_teacher(model, prepared)
        with nullcontext() if config is None else apply(model, config, mode=mode) as pruner:
            for i, batch in enumerate(prepared):
                with during(f"batches[{i}]"):
                    logits = batch.log_probs if pruner is None else pruner.run(batch)
                    grades.append(grade(batch, logits))
    finally:
        model.train(training)
    return record(grades, *costs(adapter, prepared, config))


def grade(batch: PreparedBatch, logits: Tensor) -> Grades:
    """Which answers are right, and which are the full model's, one bool per sample that has one.

    Then KL and task loss per answer token.

    logits: (A, vocabulary) at the answer tokens; or `batch.log_probs` itself, whose divergence is 0
        to the bit.
    """
    if logits is batch.log_probs:
        divergence = torch.zeros(len(logits))
    else:
        divergence = kl_divergence(logits, batch.log_probs).cpu()
    found, full = logits.argmax(-1).cpu(), batch.log_probs.argmax(-1).cpu()
    correct, same = (_whole(batch, found == expected) for expected in (batch.targets, full))
    return correct, same, divergence, token_losses(logits, batch, "task").cpu()


def _whole(batch: PreparedBatch, right: Tensor) -> Tensor:
    """Whether all of an answer's tokens are right, of each sample that has an answer."""
    misses = torch.zeros(len(batch), dtype=torch.long).index_add_(0, batch.rows, (~right).long())
    return (misses == 0)[batch.answers.any(1)]


def record(grades: list[Grades], flops: Tensor, full: Tensor, text: Tensor) -> Record:
    """The means over all samples.

    flops, full, text: (samples,) FLOPs as they ran, in full, and without visual tokens.
    """
    correct, same, divergence, task = (gathered(torch.cat(p)) for p in zip(*grades, strict=True))
    return Record(
        accuracy=float(correct.float().mean()),
        kl=float(divergence.mean().clamp(min=0)),
        task_loss=float(task.mean()),
        flops=float(flops.mean()),
        share=float(flops.sum() / full.sum()),
        prunable_share=float((flops - text).sum() / (full - text).sum()),
        n=len(correct),
        correct=correct,
        agreement=float(same.float().mean()),
    )


def costs(
    adapter, prepared: list[PreparedBatch], config: PruningConfig | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Prefill FLOPs (samples,), float64: under `config`, in full, and without visual tokens."""
    method = build_method(config.method, config.method_options) if config else None
    cost = CostModel(adapter.dimensions(adapter.config), method)
    n_visual, n_text = shapes(prepared)
    full = cost.full(n_visual, n_text).double()
    text = cost.text_only(n_text).double()
    if config is None:
        return full, full, text
    counts = torch.tensor([config.tokens(n) for n in n_visual.tolist()])
    return cost(counts, n_visual, n_text).double(), full, text


def _are_prepared(batches) -> TypeGuard[list[PreparedBatch]]:
    is_list = isinstance(batches, list) and bool(batches)
    return is_list and all(isinstance(batch, PreparedBatch) for batch in batches)
