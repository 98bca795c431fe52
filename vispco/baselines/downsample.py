"""Input downsampling: smaller pictures give fewer visual tokens. A baseline without any pruning.

Nothing is hooked: the model runs in full, on a shorter prompt, and its vision tower is cheaper too.
Where the processor takes any size (Qwen-VL) that is all; a tower of fixed size (CLIP) interpolates
its position embeddings.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..calibration import PreparedBatch, answer_logits, prepare, run_teacher, shapes
from ..evaluate import Record, grade, record
from ..flops import CostModel
from ..pruning._masks import pack
from ..pruning.context import positions
from ..pruning.forward import on_device
from ..registry import adapter_for


def downsample(adapter, inputs: dict, scale: float) -> dict:
    """The same prompts, with the sides of every picture times `scale`.

    Sides are rounded to whole tokens, at least one. Padding stays on its side.
    inputs: as the family's processor makes them. Tensors of shape (B, S) lose the columns of the
    tokens that are no more.
    Raises ValueError if scale is not in (0, 1], or if the family gives no way (see
    `Adapter.smaller`).
    """
    if not 0 < scale <= 1:
        meant = "the share of each side that is left"
        raise ValueError(f"scale must be in (0, 1], {meant}, got {scale!r}")
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    changed, tokens = adapter.smaller(inputs, scale)
    visual = adapter.visual_mask(ids, None)
    stays = torch.cat([torch.arange(before) < after for before, after in tokens]).to(ids.device)
    if len(stays) != int(visual.sum()):
        raise ValueError(
            f"the pictures make {len(stays)} visual tokens, but the prompt has {int(visual.sum())}"
        )
    keep = real & torch.ones_like(real).masked_scatter(visual, stays)
    width = int(keep.sum(1).max())
    padded_right = not bool(real[:, -1].all())
    columns = positions(keep, width)[0][1] if padded_right else pack(keep, width)  # (B, width)
    kept = keep.gather(1, columns)
    pad_token = getattr(adapter.config.get_text_config(decoder=True), "pad_token_id", None) or 0
    padding = {"labels": -100, "input_ids": pad_token}
    short = dict(inputs)
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.shape == ids.shape:
            short[name] = x.gather(1, columns).masked_fill(~kept, padding.get(name, 0))
    return {**short, "attention_mask": kept.long(), **changed}


@torch.no_grad()
def evaluate_downsampled(model: nn.Module, prepared: list[PreparedBatch], scale: float) -> Record:
    """What `evaluate` measures, for pictures with sides times `scale`.

    Shares are of the full pictures' FLOPs.
    prepared: `prepare(model, batches)`, `batches` with pictures of full size. Raises ValueError for
    anything else.
    """
    if not all(isinstance(batch, PreparedBatch) for batch in prepared):
        raise ValueError(
            "prepared must be those of `vispco.calibration.prepare(model, batches)`, got other "
            "things"
        )
    adapter = adapter_for(model)(model)
    cost = CostModel(adapter.dimensions(adapter.config))
    grades, small = [], []
    for full in run_teacher(model, prepared):
        given = on_device({**full.inputs, "labels": full.labels}, model.device)
        (short,) = prepare(model, [downsample(adapter, given, scale)])
        short = replace(short, log_probs=full.log_probs)
        logits = answer_logits(model, replace(short, inputs=adapter.embedded(short.inputs)))
        grades.append(grade(short, logits))
        small.append(short)
    n_visual, n_text = shapes(prepared)
    spent = cost.full(*shapes(small)).double()
    full_cost = cost.full(n_visual, n_text).double()
    return record(grades, spent, full_cost, cost.text_only(n_text).double())
