"""One question, answered by the full and by the pruned model, and how long each takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..calibration import frozen
from ..config import PruningConfig
from ..flops import count_flops
from ..latency import timing
from ..latency.table import LatencyTable, default_lengths, prefills
from ..latency.timing import in_turns, timed
from ..pruning import apply
from ..pruning.forward import on_device
from ..registry import adapter_for
from ..utils.console import flops, layers_entered, percent, table, token_grid, tokens


def answer(
    model, processor, inputs: dict, config: PruningConfig | None = None, max_new_tokens: int = 16
) -> dict:
    """One unpadded prompt, answered greedily in full or under `config`.

    Returns answer, tokens (entering each layer), flops and share (of this prompt's prefill), depth
    (how many layers each visual token entered).
    """
    adapter = adapter_for(model)(model)
    visual = adapter.visual_mask(inputs["input_ids"], None)[0]  # (S,)
    n_visual, n_layers = int(visual.sum()), len(adapter.layers)
    depth = [n_layers] * n_visual
    given = {**on_device(inputs, model.device), "do_sample": False}
    with torch.no_grad():
        if config is None:
            output = model.generate(**given, max_new_tokens=max_new_tokens)
        else:
            with apply(model, config) as pruner:
                output = model.generate(**given, max_new_tokens=max_new_tokens)
                kept = {layer: mask[0].cpu() for layer, mask in pruner.kept().items()}
            depth = layers_entered(kept, visual.cpu(), n_layers)
    count = count_flops(model, config, n_visual, len(visual) - n_visual)
    text = processor.decode(output[0, len(visual) :], skip_special_tokens=True).strip()
    cost = {"tokens": count.tokens, "flops": count.total, "share": count.prunable_share}
    return {"answer": text, **cost, "depth": depth}


def speeds(
    model, inputs: dict, config: PruningConfig, repeats: int = 3, new_tokens: int = 16
) -> dict:
    """How fast the full and the pruned model answer, as medians of `repeats` runs in turns.

    Returns {"seconds_to_first_token", "tokens_per_second"}, {"full": x, "pruned": y} each, and
    {"attention": how it runs}. The first token is timed from the prompt, vision tower included; the
    rate is of the `new_tokens` - 1 tokens after it, decoded in any case; None where they took no
    longer than the clock's noise. One more round before is not counted.
    """
    names = ("full", "pruned")
    calls = {(name, n): generation(model, inputs, n) for n in (1, new_tokens) for name in names}
    within = {key: partial(apply, model, config) for key in calls if key[0] == "pruned"}
    timer = timed(model.device)
    times = in_turns(calls, rounds=repeats, warmup=1, timer=timer, within=within)
    first, rate = {}, {}
    for name in names:
        short, long = times[name, 1], times[name, new_tokens]
        first[name] = statistics.median(short)
        rest = statistics.median(b - a for a, b in zip(short, long, strict=True))
        rate[name] = (new_tokens - 1) / rest if rest > 0 else None
    attention = model.config._attn_implementation
    return {"seconds_to_first_token": first, "attention": attention, "tokens_per_second": rate}


def first_token(model, inputs: dict) -> Callable[[], Any]:
    """A call that generates the first new token of a prompt."""
    return generation(model, inputs, 1)


def generation(model, inputs: dict, new_tokens: int) -> Callable[[], Any]:
    """A call that decodes exactly `new_tokens` tokens, even past the answer's end."""
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    given = {**on_device(inputs, model.device), **length, "do_sample": False}
    # Looked up when it is called: pruning puts its own around it.
    return lambda: model.generate(**given)


def latency(
    model,
    call: Callable[[], Any],
    configs: Sequence[PruningConfig],
    n_visual: int,
    n_text: int,
    *,
    batch_size: int = 1,
    rounds: int = 9,
    warmup: int = 2,
    timer: Callable[[Callable], float] | None = None,
) -> dict:
    """Time of `call` under each of `configs` over its time in full, measured and predicted.

    call: runs `model` on prompts of n_visual and n_text tokens each, from pictures to the first
    token or to the last. It is timed in turns, in full and under every configuration, beside the
    decoder alone at several lengths, from which `LatencyTable.ratio` predicts; so the machine's
    speed cancels.
    Returns {"n_visual", "n_text", "fixed": share of the full time that is not in the decoder's
    prefill, "full_ms", "configurations": [{"predicted", "measured", "low", "high", "predicted_ms",
    "measured_ms"}, ...]}; low, high: 10 % and 90 % quantiles of the rounds; milliseconds: on a GPU
    only, else None.

    >>> from vispco import testbed
    >>> model, processor = testbed.load("testbed-llava")
    >>> inputs = testbed.batches("test", 1, 1)[0]
    >>> del inputs["labels"]
    >>> n_text = inputs["input_ids"].shape[1] - 64
    >>> config = PruningConfig("fastv", [1] * 4 + [0.1] * 4)
    >>> found = latency(model, first_token(model, inputs), [config], 64, n_text, rounds=1)
    >>> sorted(found["configurations"][0])
    ['high', 'low', 'measured', 'measured_ms', 'predicted', 'predicted_ms']
    """
    adapter = adapter_for(model)(model)
    dimensions, longest = adapter.dimensions(adapter.config), n_visual + n_text
    counts = [config.tokens(n_visual) for config in configs]
    shortest = max(1, n_text + min((c[-1] for c in counts), default=n_visual))
    layers = prefills(model, sorted({shortest, longest, *default_lengths(longest)}), batch_size)
    calls: dict[Any, Callable[[], Any]] = {"full": call, **layers}
    within = {}
    for i, config in enumerate(configs):
        calls["pruned", i] = call
        within["pruned", i] = partial(apply, model, config)
    how = {"rounds": rounds, "warmup": warmup, "device": model.device, "timer": timer}
    with frozen(model), torch.no_grad():
        times = timing.side_by_side(calls, baseline="full", within=within, **how)
    # In units of the full call: a table of ratios to it, each taken in the same round.
    seconds = tuple(times[n]["ratio"] / dimensions.layers for n in layers)
    costs = LatencyTable(dimensions, tuple(layers), seconds)
    full, rows = times["full"]["ms"], []
    for i, count in enumerate(counts):
        predicted = float(costs.ratio(torch.tensor(count), n_visual, n_text, 1.0))
        found = times["pruned", i]
        row = {"predicted": predicted, "measured": found["ratio"]}
        row |= {"low": found["low"], "high": found["high"]}
        row |= {"predicted_ms": full and predicted * full, "measured_ms": found["ms"]}
        rows.append(row)
    fixed = max(0.0, 1 - float(costs.full(n_visual, n_text)))
    size = {"n_visual": n_visual, "n_text": n_text}
    return {**size, "fixed": fixed, "full_ms": full, "configurations": rows}


def side_by_side(
    full: dict, pruned: dict, question: str, expected: str | None = None, times: dict | None = None
) -> str:
    """Two results of `answer` as text. times: their `speeds`, if they were measured."""
    header = ["model", "answer", "FLOPs", "share"] + ["first token", "then"] * bool(times)
    rows = []
    for name, result in (("full", full), ("pruned", pruned)):
        text = result["answer"] or "(nothing)"
        row = [name, text, flops(result["flops"]), percent(result["share"])]
        if times:
            rate = times["tokens_per_second"][name]
            row.append(f"{1000 * times['seconds_to_first_token'][name]:.1f} ms")
            row.append("–" if rate is None else f"{rate:.1f} tokens/s")
        rows.append([*row, tokens(result["tokens"])])
    lines = [f"question: {question}"]
    lines += [f"expected: {expected}"] * bool(expected)
    lines += ["", table([*header, "visual tokens entering each layer"], rows), ""]
    if times:
        lines += [f"attention: {times['attention']}; medians of runs in turns", ""]
    legend = "where the visual tokens are, and how long they stay (█ longest, · shortest):"
    return "\n".join([*lines, legend, token_grid(pruned["depth"])])
