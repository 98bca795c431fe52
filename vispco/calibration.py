"""Calibration data: batches with their answers located, and the full model's answers to them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as _checkpoint

from .pruning._features import Features
from .pruning.context import before_answer as before_answer
from .pruning.forward import answer_logits as answer_logits, during as during
from .reading.structure import first
from .registry import adapter_for
from .utils.distributed import gathered
from .utils.lazy import Lazy

#: Bytes of features to be kept from which on a warning is given.
MUCH = 4e9


@dataclass
class PreparedBatch:
    """One batch with its answers located: B samples, A answer tokens, C columns that predict one.

    inputs: the model's inputs, without labels; large tensors may be made when they are needed.
    labels: (B, S), -100 outside the answer.
    columns: (C,) positions whose logits predict an answer token of some sample.
    answers: (B, C) bool: the samples for which each column predicts an answer token.
    targets, rows: (A,) the answer tokens, and the sample that each belongs to.
    n_visual, n_text: (B,) tokens of each prompt. The answer is no part of the prompt.
    log_probs: (A, vocabulary) of the full model, once `run_teacher` has run.
    features: what the vision tower made of the inputs, once it has run; None: nothing is kept.
    """

    inputs: Mapping
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


def prepare(
    model: nn.Module, batches: Sequence[Mapping], *, keep_features: bool = False
) -> list[PreparedBatch]:
    """Check the batches and find their answers.

    keep_features: run the vision tower once per batch, and keep what it makes in main memory
        (visual tokens x width numbers). This is for calibration data, which the language model sees
        many times. The tower's weights must not change meanwhile. If this will be more than
        `MUCH` bytes, a warning says so before the tower runs.
    Raises ValueError, naming the batch, if it is no mapping; if it lacks `input_ids` or `labels`;
    if it has no visual tokens or no answer; or if an answer stands right after a visual token,
    whose logits are gone once the token is dropped.
    """
    if isinstance(batches, str | os.PathLike):
        raise ValueError(
            f"batches must be a sequence of dicts of model inputs, got the path {str(batches)!r}: "
            "read it, vispco.data.batches(processor, vispco.data.draw(path, 256).conversations)"
        )
    if isinstance(batches, Mapping) or not hasattr(batches, "__iter__"):
        kind = type(batches).__name__
        raise ValueError(
            f"batches must be a sequence of dicts of model inputs, got {kind}; for one batch, "
            "pass [batch]"
        )
    adapter = adapter_for(model)(model)
    prepared = []
    for i, batch in enumerate(batches):
        prepared.append(_locate_answers(adapter, batch, f"batches[{i}]"))
        if keep_features:
            prepared[-1].features = Features()
    if not prepared:
        raise ValueError("batches is empty: give at least one batch of questions with answers")
    if keep_features:
        _warn_of_much(adapter, prepared)
    return prepared


def _warn_of_much(adapter, prepared: Sequence[PreparedBatch]) -> None:
    """Warn if what the vision tower makes of all batches will be more than `MUCH` bytes."""
    if not hasattr(adapter.backbone, "get_image_features"):
        # Then nothing is kept.
        return
    tokens = sum(int(batch.n_visual.sum()) for batch in prepared)
    width = first(adapter.text, ["hidden_size", "embed_dim"], 0)
    bytes_each = getattr(adapter.model, "dtype", torch.float32).itemsize
    # Qwen3-VL and others add features of some of the tower's layers in the decoder's first ones.
    vision = getattr(adapter.config, "vision_config", None)
    deep = getattr(vision, "deepstack_visual_indexes", None) or ()
    size = tokens * (1 + len(deep)) * width * bytes_each
    if size > MUCH:
        warnings.warn(
            f"the {tokens:,} visual tokens of all questions will take about {size / 1e9:,.1f} GB "
            "of main memory: the search keeps what the vision tower makes of them. If that is too "
            "much, take fewer questions (--limit), or lower the most pixels that the processor "
            "makes tokens of (size or max_pixels in its configuration)",
            stacklevel=3,
        )


def _locate_answers(adapter, batch: Mapping, name: str) -> PreparedBatch:
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
        given = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"{name} must be a dict with input_ids and labels (-100 outside the answer), got "
            f"{given}"
        )
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    if labels.shape != ids.shape:
        raise ValueError(
            f"{name}: labels have shape {tuple(labels.shape)}, input_ids {tuple(ids.shape)}; "
            "they must be the same"
        )
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool().cpu()
    visual = adapter.visual_mask(ids, None) & real
    if not visual.any():
        raise ValueError(
            f"{name} has no visual tokens (image token ids {adapter.image_token_ids()}): there is "
            "nothing to prune; check that the processor was given the images"
        )
    # Position i predicts token i + 1.
    predicts = labels[:, 1:] != -100  # (B, S - 1)
    if not predicts.any():
        raise ValueError(
            f"{name}: all labels are -100, so there is no answer to compare; label the answer's "
            "tokens"
        )
    if (predicts & visual[:, :-1]).any():
        raise ValueError(
            f"{name}: an answer starts right after a visual token, whose logits are gone once it "
            "is dropped; put text (a question, a separator) between image and answer"
        )
    columns = predicts.any(0).nonzero()[:, 0]
    answers = predicts[:, columns]
    text = before_answer(real, labels) & ~visual
    return PreparedBatch(
        inputs=_without_labels(batch),
        labels=labels,
        columns=columns,
        answers=answers,
        targets=labels[:, 1:][:, columns][answers],
        rows=answers.nonzero()[:, 0],
        n_visual=visual.sum(1),
        n_text=text.sum(1),
    )


def _without_labels(batch: Mapping) -> Mapping:
    if isinstance(batch, Lazy):
        return batch.without("labels")
    return {name: value for name, value in batch.items() if name != "labels"}


def shapes(prepared: Sequence[PreparedBatch]) -> tuple[Tensor, Tensor]:
    """Visual and text tokens of every prompt, of all processes: two (samples,) tensors."""
    n_visual = torch.cat([batch.n_visual for batch in prepared])
    n_text = torch.cat([batch.n_text for batch in prepared])
    return gathered(n_visual), gathered(n_text)


@contextmanager
def frozen(model: nn.Module, checkpoint: bool = False) -> Iterator[None]:
    """Evaluation mode and no gradients for the weights, until the block ends.

    Then both are as they were before.
    checkpoint: for a gradient, keep only the input of each decoder layer, and run the layer again
        when more is needed. The pruner's hooks stay outside: tokens are ranked only once.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    layers = adapter_for(model)(model).layers if checkpoint else ()
    # Others, such as accelerate, may have replaced a layer's forward too.
    replaced = [vars(layer).get("forward") for layer in layers]
    model.requires_grad_(False).eval()
    try:
        for layer in layers:
            layer.forward = partial(_checkpointed, layer.forward)
        yield
    finally:
        for layer, before in zip(layers, replaced, strict=True):
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
    """Run the full model once over the batches that it has not seen; keep its log-probabilities.

    Returns the same batches. Raises FloatingPointError, naming the batch, for logits that are not
    finite.
    """
    for i, batch in enumerate(prepared):
        if batch.log_probs is None:
            with during(f"batches[{i}]"):
                batch.log_probs = answer_logits(model, batch).log_softmax(-1)
    return prepared
