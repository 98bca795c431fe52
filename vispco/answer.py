"""One question, answered by the full and by the pruned model, side by side."""

from __future__ import annotations

import statistics
import time

import torch

from .config import PruningConfig
from .console import flops, layers_entered, percent, table, token_grid, tokens
from .costs import waiting
from .flops import count_flops
from .pruning import apply
from .registry import adapter_for


def answer(model, processor, inputs: dict, config: PruningConfig | None = None, max_new_tokens: int = 16) -> dict:
    """One unpadded prompt, answered greedily in full or under `config`.

    Returns answer, tokens (entering each layer), flops and share (of this prompt's prefill), depth (how many
    layers each visual token entered).
    """
    adapter = adapter_for(model)(model)
    visual, layers = adapter.visual_mask(inputs["input_ids"], None)[0], len(adapter.layers)
    n_visual, n_all = int(visual.sum()), len(visual)
    depth, options = [layers] * n_visual, {"max_new_tokens": max_new_tokens, "do_sample": False}
    inputs = on_device(inputs, model.device)
    with torch.no_grad():
        if config is None:
            output = model.generate(**inputs, **options)
        else:
            with apply(model, config) as pruner:
                output = model.generate(**inputs, **options)
                kept = {layer: mask[0].cpu() for layer, mask in pruner.kept().items()}
            depth = layers_entered(kept, visual.cpu(), layers)
    count = count_flops(model, config, n_visual, n_all - n_visual)
    return {"answer": processor.decode(output[0, n_all:], skip_special_tokens=True).strip(),
            "tokens": count.tokens, "flops": count.total, "share": count.prunable_share, "depth": depth}


def time_to_first_token(model, inputs: dict, config: PruningConfig | None, repeats: int = 3) -> dict:
    """Seconds from the prompt to its first new token, vision tower included: {"full": s, "pruned": s}, medians.

    Both in turns, so that a slow moment strikes both; one more round before is not counted.
    """
    inputs, wait = on_device(inputs, model.device), waiting(model)
    times: dict[str, list[float]] = {"full": [], "pruned": []}

    def once() -> float:
        wait()
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        wait()
        return time.perf_counter() - start

    with torch.no_grad():
        for _ in range(repeats + 1):
            times["full"].append(once())
            with apply(model, config):
                times["pruned"].append(once())
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def on_device(inputs: dict, device: torch.device) -> dict:
    """The same inputs, tensors moved."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def side_by_side(full: dict, pruned: dict, question: str, expected: str | None = None,
                 seconds: dict | None = None) -> str:
    """Two results of `answer` as text, with the times to the first token if they were measured."""
    times = {name: [f"{1000 * s:.1f} ms"] for name, s in (seconds or {}).items()}
    rows = [[name, a["answer"] or "(nothing)", flops(a["flops"]), percent(a["share"]), *times.get(name, []),
             tokens(a["tokens"])] for name, a in (("full", full), ("pruned", pruned))]
    head = f"question: {question}" + (f"\nexpected: {expected}" if expected else "")
    header = ["model", "answer", "FLOPs", "share", *["first token"] * bool(times), "visual tokens entering each layer"]
    body = table(header, rows)
    legend = "where the visual tokens are, and how long they stay (█ longest, · shortest):"
    return f"{head}\n\n{body}\n\n{legend}\n{token_grid(pruned['depth'])}"
