"""One question, answered by the full and by the pruned model, side by side; and how long each takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..latency import timing
from ..config import PruningConfig
from ..utils.console import flops, layers_entered, percent, table, token_grid, tokens
from ..latency.table import LatencyTable, prefills, spread
from ..flops import count_flops
from ..pruning import apply
from ..registry import adapter_for
from ..calibration import frozen
from ..latency.timing import in_turns, timed


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


def speeds(model, inputs: dict, config: PruningConfig, repeats: int = 3, new_tokens: int = 16) -> dict:
    """{"seconds_to_first_token", "tokens_per_second"}: {"full": x, "pruned": y} each, medians; "attention": how it runs.

    To the first token: from the prompt, vision tower included. Per second: of the `new_tokens` - 1 tokens after it, decoded
    in any case; None where they took no longer than the clock's noise. All in turns, so that a slow moment strikes all; one
    more round before is not counted.
    """
    calls = {(name, n): generation(model, inputs, n) for n in (1, new_tokens) for name in ("full", "pruned")}
    times = in_turns(calls, rounds=repeats, warmup=1, timer=timed(model.device),
                     within={key: partial(apply, model, config) for key in calls if key[0] == "pruned"})
    first = {name: statistics.median(times[name, 1]) for name in ("full", "pruned")}
    more = {name: statistics.median(b - a for a, b in zip(times[name, 1], times[name, new_tokens])) for name in first}
    return {"seconds_to_first_token": first, "attention": model.config._attn_implementation,
            "tokens_per_second": {name: (new_tokens - 1) / s if s > 0 else None for name, s in more.items()}}


def first_token(model, inputs: dict) -> Callable[[], Any]:
    """A call that brings forth the first new token of a prompt."""
    return generation(model, inputs, 1)


def generation(model, inputs: dict, new_tokens: int) -> Callable[[], Any]:
    """A call that decodes so many new tokens, even past the answer's end."""
    return partial(model.generate, **on_device(inputs, model.device), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                   do_sample=False)


def latency(model, call: Callable[[], Any], configs: Sequence[PruningConfig], n_visual: int, n_text: int, *,
            batch_size: int = 1, rounds: int = 9, warmup: int = 2, timer: Callable[[Callable], float] | None = None) -> dict:
    """Time of `call` under each of `configs` over its time in full, measured, and predicted (`LatencyTable.ratio`).

    call: runs `model` on prompts of n_visual and n_text tokens each, from pictures to the first token or to the last. It
    is timed in turns, in full, under every configuration, and with it the decoder alone at several lengths, from which
    the prediction comes; so the machine's speed strikes out.
    Returns {"n_visual", "n_text", "fixed": share of the full time that is not in the decoder's prefill, "full_ms",
    "configurations": [{"predicted", "measured", "low", "high", "predicted_ms", "measured_ms"}, ...]}; low, high: 10 % and
    90 % quantiles of the rounds; milliseconds: on a GPU only, else None.

    >>> from vispco import testbed
    >>> model, processor = testbed.load("testbed-llava")
    >>> inputs = {k: v for k, v in testbed.batches("test", 1, 1)[0].items() if k != "labels"}
    >>> n_text = inputs["input_ids"].shape[1] - 64
    >>> found = latency(model, first_token(model, inputs), [PruningConfig("fastv", [1] * 4 + [0.1] * 4)], 64, n_text, rounds=1)
    >>> sorted(found["configurations"][0])
    ['high', 'low', 'measured', 'measured_ms', 'predicted', 'predicted_ms']
    """
    dimensions = (adapter := adapter_for(model)(model)).dimensions(adapter.config)
    counts = [config.tokens(n_visual) for config in configs]
    shortest = max(1, n_text + min((c[-1] for c in counts), default=n_visual))
    layers = prefills(model, sorted({shortest, n_visual + n_text, *spread(n_visual + n_text)}), batch_size)
    calls: dict[Any, Callable[[], Any]] = {"full": call, **{("pruned", i): call for i in range(len(configs))}, **layers}
    within = {("pruned", i): partial(apply, model, config) for i, config in enumerate(configs)}
    with frozen(model), torch.no_grad():
        times = timing.side_by_side(calls, baseline="full", rounds=rounds, warmup=warmup, device=model.device,
                                    timer=timer, within=within)
    # In units of the full call: a table of ratios to it, each taken in the same round.
    costs = LatencyTable(dimensions, tuple(layers), tuple(times[n]["ratio"] / dimensions.layers for n in layers))
    full, rows = times["full"]["ms"], []
    for i, count in enumerate(counts):
        predicted = float(costs.ratio(torch.tensor(count), n_visual, n_text, 1.0))
        low, measured, high = (times["pruned", i][key] for key in ("low", "ratio", "high"))
        rows.append({"predicted": predicted, "measured": measured, "low": low, "high": high,
                     "predicted_ms": full and predicted * full, "measured_ms": times["pruned", i]["ms"]})
    return {"n_visual": n_visual, "n_text": n_text, "fixed": max(0.0, 1 - float(costs.full(n_visual, n_text))),
            "full_ms": full, "configurations": rows}


def on_device(inputs: dict, device: torch.device) -> dict:
    """The same inputs, tensors moved."""
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def side_by_side(full: dict, pruned: dict, question: str, expected: str | None = None,
                 measured: dict | None = None) -> str:
    """Two results of `answer` as text, with their `speeds` if they were measured."""
    times = {}
    if measured:
        for name, rate in measured["tokens_per_second"].items():
            times[name] = [f"{1000 * measured['seconds_to_first_token'][name]:.1f} ms",
                           "–" if rate is None else f"{rate:.1f} tokens/s"]
    rows = [[name, a["answer"] or "(nothing)", flops(a["flops"]), percent(a["share"]), *times.get(name, []),
             tokens(a["tokens"])] for name, a in (("full", full), ("pruned", pruned))]
    head = f"question: {question}" + (f"\nexpected: {expected}" if expected else "")
    header = ["model", "answer", "FLOPs", "share", *["first token", "then"] * bool(times), "visual tokens entering each layer"]
    body = table(header, rows)
    legend = "where the visual tokens are, and how long they stay (█ longest, · shortest):"
    how = f"\nattention: {measured['attention']}; medians of runs in turns\n" if measured else ""
    return f"{head}\n\n{body}\n{how}\n{legend}\n{token_grid(pruned['depth'])}"
