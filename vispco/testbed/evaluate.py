"""Accuracy by task, and what dropping visual tokens costs: `python -m vispco.testbed.evaluate --model testbed-llava`.

A local forward loop, apart from the library's own pruner, so that the two can check each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch

from .data import TASKS, Example, collate, enlarge, examples
from .model import MODELS, SPECS, load, name_of
from .vocab import CELLS


@torch.inference_mode()
def hits(model, items: Sequence[Example], keep: Sequence[int] | None = None, batch_size: int = 128) -> np.ndarray:
    """Which answers are right, end token included: (N,) bool.

    keep: how many visual tokens enter each layer, non-increasing; those that the last prompt token attends to
    most in the layer before (mean over heads) stay. None keeps all of them everywhere. All images have one size.
    """
    sizes = {item.image.shape for item in items}
    if len(sizes) != 1:
        raise ValueError(f"items must have images of one size, got {sorted(sizes)}; evaluate each size by itself")
    layers, (height, width, _) = model.config.text_config.num_hidden_layers, sizes.pop()
    full = height * width * CELLS // 64**2
    keep = [full] * layers if keep is None else list(keep)
    if len(keep) != layers or any(b > a for a, b in zip([full, *keep], keep, strict=False)) or keep[-1] < 0:
        raise ValueError(f"keep needs {layers} non-increasing numbers out of 0..{full}, got {keep}")
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # only eager attention hands out its weights
    try:
        order = sorted(range(len(items)), key=lambda i: len(items[i].question))  # little padding
        out = np.zeros(len(items), dtype=bool)
        for start in range(0, len(items), batch_size):
            index = order[start : start + batch_size]
            out[index] = _right(model, collate([items[i] for i in index], "right", model=name_of(model)), keep)
        return out
    finally:
        model.set_attn_implementation(before)


def _embedded(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Input of layer 0 (B, N, hidden), its rotary positions (1 or 3, B, N), and how many visual tokens there are."""
    inner, ids, grids = model.model, batch["input_ids"], batch.get("image_grid_thw")
    features = inner.get_image_features(
        batch["pixel_values"], **({} if grids is None else {"image_grid_thw": grids}), return_dict=True
    )
    visual, lead = torch.stack(list(features.pooler_output)), len(SPECS[name_of(model)].before)
    text = inner.get_input_embeddings()(torch.cat([ids[:, :lead], ids[:, lead + visual.shape[1] :]], dim=1))
    hidden = torch.cat([text[:, :lead], visual, text[:, lead:]], dim=1)
    if grids is None:
        position = torch.arange(hidden.shape[1]).expand(1, len(ids), -1)
    else:
        position, _ = inner.get_rope_index(ids, batch["mm_token_type_ids"], image_grid_thw=grids)
    return hidden, position, visual.shape[1]


def _right(model, batch: dict[str, torch.Tensor], keep: list[int]) -> np.ndarray:
    """One right-padded batch; padding comes last, so the causal mask alone keeps it out of sight."""
    decoder, lead = model.model.language_model, len(SPECS[name_of(model)].before)
    hidden, position, now = _embedded(model, batch)
    rows = torch.arange(len(hidden))
    labels = batch["labels"][:, lead + now :]
    last = (labels != -100).int().argmax(1) - 1  # the last prompt token, counted in what follows the image
    score, caught = None, []
    handles = [layer.self_attn.register_forward_hook(lambda _m, _i, o: caught.append(o[1])) for layer in decoder.layers]
    try:
        for layer, target in zip(decoder.layers, keep, strict=True):
            if target < now:
                if score is None or target == 0:
                    kept = torch.arange(target).expand(len(rows), -1)
                else:
                    kept = score.argsort(dim=1, descending=True, stable=True)[:, :target].sort(dim=1).values
                around = torch.arange(hidden.shape[1]).expand(len(rows), -1)
                kept = torch.cat([around[:, :lead], lead + kept, around[:, lead + now :]], dim=1)
                hidden, position = hidden[rows[:, None], kept], position[:, rows[:, None], kept]
                now = target
            size = hidden.shape[1]
            mask = torch.full((size, size), torch.finfo(hidden.dtype).min).triu(1)[None, None]
            rotary = decoder.rotary_emb(hidden, position if len(position) > 1 else position[0])
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
            score = caught.pop()[rows, :, lead + now + last, lead : lead + now].mean(1)
    finally:
        for handle in handles:
            handle.remove()
    guess = model.lm_head(decoder.norm(hidden[:, lead + now :])).argmax(-1)[:, :-1]
    wrong = (guess != labels[:, 1:]) & (labels[:, 1:] != -100)
    return (~wrong.any(1)).numpy()


def by_task(items: Sequence[Example], right: np.ndarray) -> dict[str, float]:
    """Accuracy of every task that occurs in `items`, and their unweighted mean under "mean"."""
    names = np.array([item.task for item in items])
    out = {task: float(right[names == task].mean()) for task in TASKS if (names == task).any()}
    return {**out, "mean": float(np.mean(list(out.values())))}


def majority(items: Sequence[Example]) -> dict[str, float]:
    """Share of the commonest answer in every task, and the mean."""
    common = np.zeros(len(items), dtype=bool)
    for task in {item.task for item in items}:
        answers = [item.answer for item in items if item.task == task]
        best = max(sorted(set(answers)), key=answers.count)
        common |= np.array([item.task == task and item.answer == best for item in items])
    return by_task(items, common)


def depth_profile(model, items: Sequence[Example]) -> list[dict[str, float]]:
    """Accuracy by task when all visual tokens are dropped at the input of layer 0, 1, ..., and never (last)."""
    layers = model.config.text_config.num_hidden_layers
    return [by_task(items, hits(model, items, [CELLS] * at + [0] * (layers - at))) for at in range(layers + 1)]


def random_schedules(layers: int, budget: float, n: int, seed: int, tolerance: float = 0.01) -> list[list[int]]:
    """`n` random non-increasing schedules with a mean keep ratio of `budget`; layer 0 keeps every token."""
    rng = np.random.default_rng(seed)
    out: list[list[int]] = []
    while len(out) < n:
        a, b = rng.uniform(0.3, 2.0, size=2)
        ratios = np.sort(rng.beta(a, b, size=layers - 1))[::-1]
        keep = np.rint(np.concatenate([[1.0], ratios]) * CELLS).astype(int)
        if abs(keep.mean() / CELLS - budget) <= tolerance:
            out.append(keep.tolist())
    return out


def report(model, n: int = 4000, schedules: int = 24, seed: int = 0) -> dict:
    """Print and return accuracy, majority and depth profile on `n` test examples, and the schedules' spread."""
    items = examples("test", n, seed)
    profile = depth_profile(model, items)
    rows = {"majority": majority(items)}
    rows |= {f"dropped at {at}": row for at, row in enumerate(profile[:-1])} | {"all tokens": profile[-1]}
    print(f"{'':14s}" + "".join(f"{name:>10s}" for name in profile[0]))
    for name, row in rows.items():
        print(f"{name:14s}" + "".join(f"{100 * value:10.1f}" for value in row.values()))
    layers = model.config.text_config.num_hidden_layers
    part = items[: max(8, n // 4)]
    keeps = random_schedules(layers, 0.5, schedules, seed)
    spread = [by_task(part, hits(model, part, keep)) for keep in keeps]
    means = [row["mean"] for row in spread]
    print(f"{schedules} random schedules of half the tokens: {100 * min(means):.1f} to {100 * max(means):.1f}")
    out = {"examples": n, "rows": rows, "schedules": [{"keep": keep, **row} for keep, row in zip(keeps, spread)]}
    if SPECS[name_of(model)].margins:
        sizes = [(64, 80), (80, 64), (80, 80)]
        larger = {f"{h}x{w}": by_task(part, hits(model, enlarge(part, h, w))) for h, w in sizes}
        print("on larger pictures: " + ", ".join(f"{key} {100 * row['mean']:.1f}" for key, row in larger.items()))
        out["sizes"] = larger
    return out


if __name__ == "__main__":
    options = argparse.ArgumentParser(prog="python -m vispco.testbed.evaluate", description=__doc__.split("\n")[0])
    options.add_argument("--model", choices=MODELS, default="testbed-llava")
    options.add_argument("--examples", type=int, default=4000)
    chosen = options.parse_args()
    report(load(chosen.model)[0], chosen.examples)
