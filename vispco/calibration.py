"""The full model as teacher: what it answers on a batch, computed once, and how far a pruned one is from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as _checkpoint

from .pruning.context import before_answer
from .utils.distributed import gathered
from .pruning._features import Features
from .pruning.forward import (
    OBJECTIVES as OBJECTIVES,
    answer_logits as answer_logits,
    check_objective as check_objective,
    during as during,
    kl_divergence as kl_divergence,
    token_losses as token_losses,
)
from .registry import adapter_for


@dataclass
class PreparedBatch:
    """One batch, with its answers located. B samples, A answer tokens in all, C columns that predict one.

    inputs: the model's inputs, without labels. labels: (B, S), -100 outside the answer.
    columns: (C,) positions whose logits predict an answer token of some sample. answers: (B, C) bool: of which.
    targets, rows: (A,) the answer tokens, and the sample each belongs to.
    n_visual, n_text: (B,) tokens of each prompt (the answer is not part of it).
    log_probs: (A, vocabulary) of the full model, once `run_teacher` has run.
    features: what the vision tower makes of the inputs, once it has run; None: it runs in every forward pass.
    """

    inputs: dict
    labels: Tensor
    columns: Tensor
    answers: Tensor
    targets: Tensor
    rows: Tensor
    n_visual: Tensor
    n_text: Tensor
    log_probs: Any = None
    features: Features | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]


def prepare(model: nn.Module, batches: Sequence[Mapping], *, keep_features: bool = False) -> list[PreparedBatch]:
    """Check the batches and find their answers.

    keep_features: run the vision tower once per batch, and keep what it makes in main memory (visual tokens x width numbers);
    for calibration data, which the language model sees many times, and as long as the tower's weights stay as they are.
    Raises ValueError, naming the batch, if it is no mapping, lacks `input_ids` or `labels`, has no visual tokens
    or no answer, or an answer right after a visual token (whose logits are gone once it is dropped).
    """
    if isinstance(batches, Mapping) or not hasattr(batches, "__iter__"):
        raise ValueError("batches must be a sequence of dicts of model inputs, got "
                         f"{type(batches).__name__}; for one batch, pass [batch]")
    adapter = adapter_for(model)(model)
    prepared = [_prepared(adapter, batch, f"batches[{i}]", keep_features) for i, batch in enumerate(batches)]
    if not prepared:
        raise ValueError("batches is empty: give at least one batch of questions with answers")
    return prepared


def _prepared(adapter, batch: Mapping, name: str, keep_features: bool) -> PreparedBatch:
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
        raise ValueError(f"{name} must be a dict with input_ids and labels (-100 outside the answer), got "
                         f"{sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__}")
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    if labels.shape != ids.shape:
        raise ValueError(f"{name}: labels have shape {tuple(labels.shape)}, input_ids {tuple(ids.shape)}; "
                         "they must be the same")
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool().cpu()
    visual = adapter.visual_mask(ids, None) & real
    if not visual.any():
        raise ValueError(f"{name} has no visual tokens (image token ids {adapter.image_token_ids()}): there is nothing "
                         "to prune; check that the processor was given the images")
    answer = labels[:, 1:] != -100  # (B, S - 1): this position predicts an answer token
    if not answer.any():
        raise ValueError(f"{name}: all labels are -100, so there is no answer to compare; label the answer's tokens")
    if (answer & visual[:, :-1]).any():
        raise ValueError(f"{name}: an answer starts right after a visual token, whose logits are gone once it is "
                         "dropped; put text (a question, a separator) between image and answer")
    columns = answer.any(0).nonzero()[:, 0]
    answers = answer[:, columns]
    return PreparedBatch({k: v for k, v in batch.items() if k != "labels"}, labels, columns, answers,
                  labels[:, 1:][:, columns][answers], answers.nonzero()[:, 0], visual.sum(1),
                  (before_answer(real, labels) & ~visual).sum(1), features=Features() if keep_features else None)


def shapes(prepared: Sequence[PreparedBatch]) -> tuple[Tensor, Tensor]:
    """Visual and text tokens of every prompt, of all processes: two (samples,) tensors."""
    n_visual, n_text = (gathered(torch.cat([getattr(prepared_batch, name) for prepared_batch in prepared])) for name in ("n_visual", "n_text"))
    return n_visual, n_text


@contextmanager
def frozen(model: nn.Module, checkpoint: bool = False) -> Iterator[None]:
    """Evaluation mode and no gradients for the weights, until the block ends; then both are as they were.

    checkpoint: of each decoder layer a gradient keeps the input only, and runs the layer again when it needs more. The
    pruner's hooks stay outside: tokens are ranked and drawn once.
    """
    learning, training = [p for p in model.parameters() if p.requires_grad], model.training
    layers = adapter_for(model)(model).layers if checkpoint else ()
    patched = [vars(layer).get("forward") for layer in layers]  # by others, such as accelerate
    model.requires_grad_(False).eval()
    try:
        for layer in layers:
            layer.forward = partial(_checkpointed, layer.forward)
        yield
    finally:
        for layer, before in zip(layers, patched):
            del layer.forward
            if before is not None:
                layer.forward = before
        for parameter in learning:
            parameter.requires_grad_(True)
        model.train(training)


def _checkpointed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return _checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@torch.no_grad()
def run_teacher(model: nn.Module, prepared: list[PreparedBatch]) -> list[PreparedBatch]:
    """Run the full model once over the prepared (those that it has not seen). Raises FloatingPointError as `answer_logits`."""
    for i, prepared_batch in enumerate(prepared):
        if prepared_batch.log_probs is None:
            with during(f"batches[{i}]"):
                prepared_batch.log_probs = answer_logits(model, prepared_batch).log_softmax(-1)
    return prepared
