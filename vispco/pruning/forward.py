"""One forward pass as a function: from a batch to the logits at its answers, and to their loss.

A batch here is a `vispco.calibration.PreparedBatch`: A answer tokens in all, located beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import adapter_for
from ..utils.lazy import Lazy
from ._arguments import bound

OBJECTIVES = ("kl", "task")


def on_device(inputs: Mapping, device: Any) -> dict:
    """A model's inputs by name, with the tensors among them on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def answer_logits(
    model: nn.Module, batch: Any, whose: str = "full", *, reuse_features: bool = True
) -> Tensor:
    """Logits (A, vocabulary), float32, at the positions that predict answer tokens.

    whose: the word for the model in messages. reuse_features: take what the vision tower has made
    of this batch from `batch.features`, if the batch keeps it, instead of running the tower.
    Raises FloatingPointError if the logits are not finite. The message names the first layer
    where the hidden states are not.
    """
    device: Any = model.device
    reuses = reuse_features and batch.features is not None
    given = batch.inputs
    if reuses and batch.features.made and isinstance(given, Lazy):
        # The tower's output is known, so its input is not needed.
        given = given.outlines()
    inputs = on_device(given, device)
    # As numbers: a tensor could be on another device than the hidden states.
    columns = batch.columns.tolist()

    def run() -> Tensor:
        tower: Any = nullcontext()
        if reuses:
            tower = batch.features.used(adapter_for(model)(model).backbone)
        with tower:
            logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits
        return logits[batch.answers.to(logits.device)].float()

    logits = run()
    if reuses and batch.features.made and isinstance(batch.inputs, Lazy):
        batch.inputs.let_go()
    if not logits.isfinite().all():
        with torch.no_grad():
            where = _first_not_finite(model, run, inputs.get("attention_mask"))
        raise FloatingPointError(
            f"the {whose} model's logits are not finite{where}; check its inputs and weights, and "
            "load it in float32 or bfloat16 (float16 ends at 65504)"
        )
    return logits


def _first_not_finite(model: nn.Module, run: Callable[[], Any], mask: Tensor | None) -> str:
    """Where numbers fail first. Runs the forward pass again; padding may hold anything."""
    adapter, found = adapter_for(model)(model), []

    def look(states, where: str) -> None:
        # Layers of older releases of transformers give a tuple.
        states = states[0] if isinstance(states, tuple) else states
        real = mask.bool() if mask is not None and mask.shape == states.shape[:2] else ...
        if not states[real].isfinite().all():
            found.append(where)

    def on_first(module, args, kwargs) -> None:
        look(bound(module, args, kwargs)[0], ", already in what enters layer 0")

    def on_layer(i: int, module, args, output) -> None:
        look(output, f", from the output of layer {i} on")

    hooks = [adapter.layers[0].register_forward_pre_hook(on_first, with_kwargs=True)]
    for i, layer in enumerate(adapter.layers):
        hooks.append(layer.register_forward_hook(partial(on_layer, i)))
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


def check_objective(objective: str) -> None:
    """Raise ValueError unless `objective` is one of OBJECTIVES."""
    if objective not in OBJECTIVES:
        raise ValueError(
            "objective must be 'kl' (stay close to the full model) or 'task' (answer right), "
            f"got {objective!r}"
        )


def kl_divergence(logits: Tensor, log_probs: Tensor) -> Tensor:
    """KL(pruned || full) (A,), in nats: `sum_v p (log p - log q)` (VisPCO, arXiv 2604.15188).

    logits: (A, vocabulary) of the pruned model. log_probs: (A, vocabulary) of the full model.

    >>> logits = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    >>> kl_divergence(logits, logits.log_softmax(-1)).abs().max() < 1e-6
    tensor(True)
    """
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_probs)).sum(-1)


def token_losses(logits: Tensor, batch: Any, objective: str) -> Tensor:
    """The objective at each answer token (A,), in nats.

    "kl": `kl_divergence` from the full model's answers. "task": -log q(right token).
    """
    if objective == "kl":
        return kl_divergence(logits, batch.log_probs)
    return -logits.log_softmax(-1).gather(-1, batch.targets.to(logits.device)[:, None])[:, 0]
