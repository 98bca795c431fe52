"""Input downsampling: smaller pictures give fewer visual tokens. The baseline that needs no pruning method at all.

Nothing is hooked: the model runs in full, on a shorter prompt, and its vision tower is cheaper too. Where the
processor takes any size (Qwen-VL) that is all; a tower of fixed size (CLIP) interpolates its position embeddings.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..evaluate import Record, grade, record
from ..flops import CostModel
from ..pruning._masks import pack
from ..registry import adapter_for
from ..calibration import PreparedBatch, answer_logits, prepare, shapes, run_teacher


def downsample(adapter, inputs: dict, scale: float) -> dict:
    """The same prompts, with the sides of every picture times `scale` (rounded to whole tokens, at least one).

    inputs: as the family's processor makes them; tensors of shape (B, S) lose the columns of the tokens that
    are no more. Padding stays on its side.
    Raises ValueError if scale is not in (0, 1], or the family gives no way (see `Adapter.smaller`).
    """
    if not 0 < scale <= 1:
        raise ValueError(
            f"scale must be in (0, 1], the share of each side that is left, got {scale!r}"
        )
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
    width, right = int(keep.sum(1).max()), not bool(real[:, -1].all())
    order = pack(keep.flip(1), width).flip(1) if right else pack(keep, width)
    order = ids.shape[1] - 1 - order if right else order
    kept = keep.gather(1, order)

    def shorter(name: str, x: Tensor) -> Tensor:
        return x.gather(1, order).masked_fill(
            ~kept, {"labels": -100, "input_ids": _padding(adapter)}.get(name, 0)
        )

    short = {
        k: shorter(k, v) if isinstance(v, Tensor) and v.shape == ids.shape else v
        for k, v in inputs.items()
    }
    return {**short, "attention_mask": kept.long(), **changed}


def _padding(adapter) -> int:
    config = adapter.config.get_text_config(decoder=True)
    return getattr(config, "pad_token_id", None) or 0


@torch.no_grad()
def evaluate_downsampled(model: nn.Module, prepared: list[PreparedBatch], scale: float) -> Record:
    """What `evaluate` measures, for pictures of sides times `scale`; shares are of the full pictures' FLOPs.

    prepared: `prepare(model, batches)`, `batches` with pictures of full size. Raises ValueError for anything else.
    """
    if not all(isinstance(prepared_batch, PreparedBatch) for prepared_batch in prepared):
        raise ValueError(
            "prepared must be those of `vispco.calibration.prepare(model, batches)`, got other things"
        )
    adapter = adapter_for(model)(model)
    cost = CostModel(adapter.dimensions(adapter.config))
    run_teacher(model, prepared)
    grades, small = [], []
    for prepared_batch in prepared:
        inputs = downsample(
            adapter, {**prepared_batch.inputs, "labels": prepared_batch.labels}, scale
        )
        (short,) = prepare(model, [inputs])
        small.append(replace(short, log_probs=prepared_batch.log_probs))
        grades.append(
            grade(
                small[-1],
                answer_logits(model, replace(short, inputs=adapter.embedded(short.inputs))),
            )
        )
    n_visual, n_text = shapes(prepared)
    return record(
        grades,
        cost.full(*shapes(small)).double(),
        cost.full(n_visual, n_text).double(),
        cost.text_only(n_text).double(),
    )
