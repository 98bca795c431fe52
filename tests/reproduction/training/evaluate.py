"""Accuracy by task, and what dropping visual tokens costs:

    python -m tests.reproduction.training.evaluate --model testbed-llava

The forward loop here is apart from the library's own pruner, so that the two can check each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch

from vispco.testbed import TASKS, Example, collate, enlarge, examples, load
from vispco.testbed.model import EMBEDDED, IMAGE_TOKENS
from vispco.testbed.vocab import CELLS

from .recipe import RECIPES, name_of


@torch.inference_mode()
def hits(
    model, items: Sequence[Example], keep: Sequence[int] | None = None, batch_size: int = 128
) -> np.ndarray:
    """Which answers are right, end token included: (N,) bool.

    keep: how many visual tokens enter each layer, non-increasing; None: all of them everywhere.
    Those stay that the last prompt token attends to most in the layer before (mean over heads).
    Raises ValueError for images of several sizes, or numbers that are no such schedule.
    """
    sizes = {item.image.shape for item in items}
    if len(sizes) != 1:
        raise ValueError(
            f"items must have images of one size, got {sorted(sizes)}; evaluate each size by itself"
        )
    height, width, _ = sizes.pop()
    layers = model.config.text_config.num_hidden_layers
    full = height * width * CELLS // 64**2
    keep = [full] * layers if keep is None else list(keep)
    rises = any(after > before for before, after in zip([full, *keep], keep, strict=False))
    if len(keep) != layers or rises or keep[-1] < 0:
        raise ValueError(f"keep needs {layers} non-increasing numbers out of 0..{full}, got {keep}")
    before = model.config._attn_implementation
    # Only eager attention hands out its weights.
    model.set_attn_implementation("eager")
    try:
        # Questions of like length need little padding.
        order = sorted(range(len(items)), key=lambda i: len(items[i].question))
        out = np.zeros(len(items), dtype=bool)
        for start in range(0, len(items), batch_size):
            index = order[start : start + batch_size]
            batch = collate([items[i] for i in index], "right", model=name_of(model))
            out[index] = _right(model, batch, keep)
        return out
    finally:
        model.set_attn_implementation(before)


def _right(model, batch: dict[str, torch.Tensor], keep: list[int]) -> np.ndarray:
    """Which answers of a batch are right.

    The batch is padded on the right: padding comes last, so the causal mask alone hides it.
    """
    decoder, lead = model.model.language_model, len(IMAGE_TOKENS[name_of(model)].before)
    hidden, position, now = _embedded(model, batch)
    rows = torch.arange(len(hidden))
    labels = batch["labels"][:, lead + now :]
    # The last prompt token, counted in what follows the image.
    last = (labels != -100).int().argmax(1) - 1
    score = None
    caught: list[torch.Tensor] = []
    handles = [
        layer.self_attn.register_forward_hook(lambda _m, _i, out: caught.append(out[1]))
        for layer in decoder.layers
    ]
    try:
        for layer, target in zip(decoder.layers, keep, strict=True):
            if target < now:
                kept = _kept(score, target, len(rows))
                around = torch.arange(hidden.shape[1]).expand(len(rows), -1)
                kept = torch.cat([around[:, :lead], lead + kept, around[:, lead + now :]], dim=1)
                hidden = hidden[rows[:, None], kept]
                position = position[:, rows[:, None], kept]
                now = target
            size = hidden.shape[1]
            lowest = torch.finfo(hidden.dtype).min
            mask = torch.full((size, size), lowest).triu(1)[None, None]
            rotary = decoder.rotary_emb(hidden, position if len(position) > 1 else position[0])
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
            score = caught.pop()[rows, :, lead + now + last, lead : lead + now].mean(1)
    finally:
        for handle in handles:
            handle.remove()
    guess = model.lm_head(decoder.norm(hidden[:, lead + now :])).argmax(-1)[:, :-1]
    wrong = (guess != labels[:, 1:]) & (labels[:, 1:] != -100)
    return (~wrong.any(1)).numpy()


def _kept(score: torch.Tensor | None, target: int, n: int) -> torch.Tensor:
    """The `target` visual tokens of the highest scores (n, target), in order; the first without."""
    if score is None or target == 0:
        return torch.arange(target).expand(n, -1)
    return score.argsort(dim=1, descending=True, stable=True)[:, :target].sort(dim=1).values


def _embedded(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Input of layer 0 (B, N, hidden), rotary positions (1 or 3, B, N), number of visual tokens."""
    inner, ids, grids = model.model, batch["input_ids"], batch.get("image_grid_thw")
    sizes = {} if grids is None else {"image_grid_thw": grids}
    features = inner.get_image_features(batch["pixel_values"], **sizes, return_dict=True)
    visual = torch.stack(list(features.pooler_output))
    lead, n = len(IMAGE_TOKENS[name_of(model)].before), visual.shape[1]
    text = inner.get_input_embeddings()(torch.cat([ids[:, :lead], ids[:, lead + n :]], dim=1))
    hidden = torch.cat([text[:, :lead], visual, text[:, lead:]], dim=1)
    if grids is None:
        position = torch.arange(hidden.shape[1]).expand(1, len(ids), -1)
    else:
        kinds = batch["mm_token_type_ids"]
        position, _ = inner.get_rope_index(ids, kinds, image_grid_thw=grids)
    return hidden, position, n


def by_task(items: Sequence[Example], right: np.ndarray) -> dict[str, float]:
    """Accuracy of every task that occurs in `items`, and their unweighted mean under "mean"."""
    names = np.array([item.task for item in items])
    out = {task: float(right[names == task].mean()) for task in TASKS if (names == task).any()}
    return {**out, "mean": float(np.mean(list(out.values())))}


def majority(items: Sequence[Example]) -> dict[str, float]:
    """Share of the commonest answer in every task, and the mean of the tasks."""
    common = np.zeros(len(items), dtype=bool)
    for task in {item.task for item in items}:
        answers = [item.answer for item in items if item.task == task]
        best = max(sorted(set(answers)), key=answers.count)
        common |= np.array([item.task == task and item.answer == best for item in items])
    return by_task(items, common)


def depth_profile(model, items: Sequence[Example]) -> list[dict[str, float]]:
    """Accuracy by task when all visual tokens are dropped at layer 0, 1, ..., and never (last)."""
    layers = model.config.text_config.num_hidden_layers
    schedules = [[CELLS] * at + [0] * (layers - at) for at in range(layers + 1)]
    return [by_task(items, hits(model, items, keep)) for keep in schedules]


def random_schedules(
    layers: int, budget: float, n: int, seed: int, tolerance: float = 0.01
) -> list[list[int]]:
    """`n` random non-increasing schedules with a mean keep ratio of `budget`.

    Layer 0 keeps every token.
    """
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
    """Print and return what the model answers to `n` test questions.

    Accuracy, that of the majority's answer and of dropping at each depth; how far random schedules
    of half the tokens differ; and for testbed-qwen the accuracy on larger pictures.
    """
    items = examples("test", n, seed)
    profile = depth_profile(model, items)
    rows = {"majority": majority(items)}
    rows |= {f"dropped at {at}": row for at, row in enumerate(profile[:-1])}
    rows["all tokens"] = profile[-1]
    print(f"{'':14s}" + "".join(f"{name:>10s}" for name in profile[0]))
    for name, row in rows.items():
        print(f"{name:14s}" + "".join(f"{100 * value:10.1f}" for value in row.values()))
    part = items[: max(8, n // 4)]
    keeps = random_schedules(model.config.text_config.num_hidden_layers, 0.5, schedules, seed)
    spread = [by_task(part, hits(model, part, keep)) for keep in keeps]
    means = [100 * row["mean"] for row in spread]
    low, high = min(means), max(means)
    print(f"{schedules} random schedules of half the tokens: {low:.1f} to {high:.1f}")
    measured = [{"keep": keep, **row} for keep, row in zip(keeps, spread, strict=True)]
    out = {"examples": n, "rows": rows, "schedules": measured}
    if RECIPES[name_of(model)].margins:
        sizes = [(64, 80), (80, 64), (80, 80)]
        larger = {f"{h}x{w}": by_task(part, hits(model, enlarge(part, h, w))) for h, w in sizes}
        found = ", ".join(f"{size} {100 * row['mean']:.1f}" for size, row in larger.items())
        print(f"on larger pictures: {found}")
        out["sizes"] = larger
    return out


def main() -> None:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m tests.reproduction.training.evaluate",
        description=__doc__.split(":")[0] + ".",
    )
    options.add_argument("--model", choices=EMBEDDED, default="testbed-llava")
    options.add_argument("--examples", type=int, default=4000)
    chosen = options.parse_args()
    report(load(chosen.model)[0], chosen.examples)


if __name__ == "__main__":
    main()
