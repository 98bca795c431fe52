"""The full model as teacher: what it answers on a batch, computed once, and how far a pruned one is from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as _checkpoint

from .pruning.context import before_answer
from .utils.distributed import gathered
from .pruning._features import Features
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


def answer_logits(model: nn.Module, prepared_batch: PreparedBatch, pruner=None) -> Tensor:
    """Logits (A, vocabulary), float32, at the positions that predict answer tokens.

    Raises FloatingPointError if they are not finite, naming the first layer where the hidden states are not.
    """
    device: Any = model.device
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in prepared_batch.inputs.items()}
    method = getattr(pruner, "method", None)
    listens = method is not None and (method.reads_vision or method.reads_grid)  # to the tower, as it runs

    def run() -> Tensor:
        if pruner is not None:
            pruner.labels = prepared_batch.labels  # so that no score looks at the answer
        once = nullcontext() if prepared_batch.features is None or listens else prepared_batch.features.used(adapter_for(model)(model).backbone)
        with once:
            logits = model(**inputs, logits_to_keep=prepared_batch.columns.tolist(), use_cache=False).logits  # a tensor could be on another device
        return logits[prepared_batch.answers.to(logits.device)].float()

    logits = run()
    if not logits.isfinite().all():
        with torch.no_grad():
            where = _first_not_finite(model, run, inputs.get("attention_mask"))
        raise FloatingPointError(f"the {'full' if pruner is None else 'pruned'} model's logits are not finite{where}; check its "
                                 "inputs and weights, and load it in float32 or bfloat16 (float16 ends at 65504)")
    return logits


def _first_not_finite(model: nn.Module, run: Callable[[], Any], mask: Tensor | None) -> str:
    """Where numbers fail first, by a pass that is run again: padding may hold anything."""
    adapter, found = adapter_for(model)(model), []

    def look(states, where: str) -> None:
        states = states[0] if isinstance(states, tuple) else states  # in older releases
        real = mask.bool() if mask is not None and mask.shape == states.shape[:2] else ...
        if not states[real].isfinite().all():
            found.append(where)

    hooks = [adapter.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: look(kwargs["inputs_embeds"], ", already in what enters layer 0"), with_kwargs=True)]
    hooks += [layer.register_forward_hook(lambda module, args, output, i=i: look(output, f", from the output of layer {i} on"))
              for i, layer in enumerate(adapter.layers)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ", though every layer's output is"


@contextmanager
def during(what: str) -> Iterator[None]:
    """A FloatingPointError in the block says that it came up during `what`.

    >>> with during("step 3"):
    ...     raise FloatingPointError("the loss is nan")
    Traceback (most recent call last):
    FloatingPointError: step 3: the loss is nan
    """
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{what}: {error}") from error


@torch.no_grad()
def run_teacher(model: nn.Module, prepared: list[PreparedBatch]) -> list[PreparedBatch]:
    """Run the full model once over the prepared (those that it has not seen). Raises FloatingPointError as `answer_logits`."""
    for i, prepared_batch in enumerate(prepared):
        if prepared_batch.log_probs is None:
            with during(f"batches[{i}]"):
                prepared_batch.log_probs = answer_logits(model, prepared_batch).log_softmax(-1)
    return prepared


def kl_divergence(logits: Tensor, log_probs: Tensor) -> Tensor:
    """KL(pruned || full) (A,), in nats: `sum_v p (log p - log q)` (VisPCO, arXiv 2604.15188, the objective).

    >>> logits = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    >>> kl_divergence(logits, logits.log_softmax(-1)).abs().max() < 1e-6
    tensor(True)
    """
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_probs)).sum(-1)


OBJECTIVES = ("kl", "task")


def check_objective(objective: str) -> None:
    """Raise ValueError unless `objective` is one of OBJECTIVES."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be 'kl' (stay close to the full model) or 'task' (answer right), got {objective!r}")


def token_losses(logits: Tensor, prepared_batch: PreparedBatch, objective: str) -> Tensor:
    """The objective at each answer token (A,), in nats: "kl", `kl_divergence`; "task", -log q(right token)."""
    if objective == "kl":
        return kl_divergence(logits, prepared_batch.log_probs)
    return -logits.log_softmax(-1).gather(-1, prepared_batch.targets.to(logits.device)[:, None])[:, 0]
