"""One schedule, three ways to prune, timed against transformers' bare model.

    python -m benchmarks.against --model small --visual 576 2880 --output against.json

The ways are vispco's deploy mode, masks only (its search mode), and full eager attention.
"eager" is what published repositories do, written anew for this benchmark. The layer before each
cut computes its whole attention matrix. The last token's row ranks the visual tokens, and the
hidden states of the best are gathered.
"""

from __future__ import annotations

import contextlib
import copy
from functools import partial

import torch
from torch import nn

import vispco
from vispco.config import whole_tokens

from . import shapes
from .side_by_side import arguments, peak_memory, run, side_by_side, turns


@contextlib.contextmanager
def eager_pruning(model: nn.Module, config: vispco.PruningConfig, image: int = shapes.IMAGE):
    """FastV by full eager attention.

    Prompts have no padding, and their image tokens stand at the same places in all samples.
    """
    layers, state, hooks, configs = model.get_decoder().layers, {}, [], []
    ratios = [1.0, *config.keep_ratios]
    cuts = [i for i in range(1, len(layers)) if ratios[i + 1] < ratios[i]]

    def start(module, args, kwargs):
        visual = kwargs["input_ids"][0] == image
        state.update(visual=visual, n=int(visual.sum()), places=None)

    def before(i):
        def hook(module, args, kwargs):
            hidden, places = args[0], state["places"]
            decoding = hidden.shape[1] == 1
            if decoding:
                return None
            if i in cuts:
                # (B, N), or (N,) at the first cut
                here = state["visual"] if places is None else state["visual"][places]
                scores = state["attention"][:, :, -1].mean(1)  # (B, N)
                keep = whole_tokens(config.keep_ratios[i], state["n"])
                best = scores.masked_fill(~here, -1).topk(keep).indices
                stays = (~here).expand_as(scores).scatter(1, best, True)
                index = stays.nonzero()[:, 1].view(len(scores), -1)
                hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
                places = state["places"] = index if places is None else places.gather(1, index)
            changed = dict(kwargs)
            if places is not None:
                cos, sin = (x.expand(len(places), -1, -1) for x in kwargs["position_embeddings"])
                index = places[..., None].expand(-1, -1, cos.shape[-1])
                changed |= {
                    "position_embeddings": (cos.gather(1, index), sin.gather(1, index)),
                    "attention_mask": None,
                    "position_ids": None,
                }
            # Eager attention has no causal mask of its own.
            if i + 1 in cuts:
                size = hidden.shape[1]
                forbidden = hidden.new_full((size, size), torch.finfo(hidden.dtype).min)
                changed["attention_mask"] = forbidden.triu(1)[None, None]
            return (hidden, *args[1:]), changed

        return hook

    def captured(module, args, output):
        state["attention"] = output[1]

    try:
        hooks.append(model.model.register_forward_pre_hook(start, with_kwargs=True))
        for i, layer in enumerate(layers):
            hooks.append(layer.register_forward_pre_hook(before(i), with_kwargs=True))
            if i + 1 in cuts:
                configs.append((layer.self_attn, layer.self_attn.config))
                layer.self_attn.config = copy.copy(layer.self_attn.config)
                layer.self_attn.config._attn_implementation = "eager"
                hooks.append(layer.self_attn.register_forward_hook(captured))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, own in configs:
            module.config = own


def measure(options) -> list[dict]:
    """Time to first token over the bare model's, and memory, of each way."""
    figures = []
    for model, prompt, setting in shapes.settings(options):
        for schedule, config in shapes.schedules(setting["layers"]).items():
            ways = {
                "bare": contextlib.nullcontext,
                "deploy": partial(vispco.apply, model, config),
                "eager": partial(eager_pruning, model, config),
                "mask": partial(vispco.apply, model, config, mode="search"),
            }
            call = partial(shapes.prefill, model, prompt)
            calls = dict.fromkeys(ways, call)
            times = side_by_side(calls, baseline="bare", within=ways, **turns(options))
            for way, within in ways.items():
                with within():
                    memory, kv_bytes = peak_memory(call, options.device), shapes.kv_bytes(call())
                row = {**setting, "schedule": schedule, "way": way, **times[way]}
                figures.append({**row, "peak_bytes": memory, "kv_bytes": kv_bytes})
                print(
                    f"{row['n_visual']:>6} visual, batch {row['batch']}, {schedule:<5} {way:<6} "
                    f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f}), "
                    f"peak {memory / 2**20:.1f} MiB, KV cache {kv_bytes / 2**20:.1f} MiB"
                )
    return figures


def main(argv=None) -> int:
    """Run the command; returns the exit code."""
    parser = arguments("benchmarks.against", __doc__, "against.json")
    shapes.add_arguments(parser, "small", [576])
    return run(parser, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
