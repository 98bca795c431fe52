"""One schedule, three ways: vispco's deploy mode, full eager attention, masks only; and transformers' bare model.

    python -m benchmarks.against --model small --visual 576 2880 --output against.json

"eager" is what published repositories do, written for this benchmark: the layer before each cut computes its whole
attention matrix, from which the last token's row is read, and the hidden states are gathered.
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
from .side_by_side import arguments, peak_memory, run, side_by_side


@contextlib.contextmanager
def eager_pruning(model: nn.Module, config: vispco.PruningConfig, image: int = shapes.IMAGE):
    """FastV by full eager attention, for prompts alike in all samples (where image tokens stand) without padding."""
    layers, state, hooks, configs = model.get_decoder().layers, {}, [], []
    ratios = [1.0, *config.keep_ratios]
    cuts = [i for i in range(1, len(layers)) if ratios[i + 1] < ratios[i]]

    def start(module, args, kwargs):
        visual = kwargs["input_ids"][0] == image
        state.update(visual=visual, n=int(visual.sum()), places=None)

    def before(i):
        def hook(module, args, kwargs):
            hidden, places = args[0], state["places"]
            if hidden.shape[1] == 1:  # decoding
                return None
            if i in cuts:
                here = state["visual"] if places is None else state["visual"][places]  # (B, N) or (N,)
                scores = state["attention"][:, :, -1].mean(1)  # (B, N)
                keep = whole_tokens(config.keep_ratios[i], state["n"])
                best = scores.masked_fill(~here, -1).topk(keep).indices
                index = (~here).expand_as(scores).scatter(1, best, True).nonzero()[:, 1].view(len(scores), -1)
                hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
                places = state["places"] = index if places is None else places.gather(1, index)
            changed = dict(kwargs)
            if places is not None:
                cos, sin = (x.expand(len(places), -1, -1) for x in kwargs["position_embeddings"])
                index = places[..., None].expand(-1, -1, cos.shape[-1])
                changed |= {"position_embeddings": (cos.gather(1, index), sin.gather(1, index)), "attention_mask": None,
                            "position_ids": None}
            if i + 1 in cuts:  # eager attention has no causal mask of its own
                size = hidden.shape[1]
                changed["attention_mask"] = torch.full((size, size), torch.finfo(hidden.dtype).min, dtype=hidden.dtype,
                                                       device=hidden.device).triu(1)[None, None]
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
            ways = {"bare": contextlib.nullcontext, "deploy": partial(vispco.apply, model, config),
                    "eager": partial(eager_pruning, model, config),
                    "mask": partial(vispco.apply, model, config, mode="search")}
            call = partial(shapes.prefill, model, prompt)
            times = side_by_side(dict.fromkeys(ways, call), baseline="bare", rounds=options.rounds, warmup=options.warmup,
                                 device=options.device, timer=options.timer, within=ways)
            for way, within in ways.items():
                with within():
                    memory, kv_bytes = peak_memory(call, options.device), shapes.kv_bytes(call())
                figures.append({**setting, "schedule": schedule, "way": way, **times[way], "peak_bytes": memory,
                                "kv_bytes": kv_bytes})
                print(f"{setting['n_visual']:>6} visual, batch {setting['batch']}, {schedule:<5} {way:<6} "
                      f"{times[way]['ratio']:.3f} ({times[way]['low']:.3f} to {times[way]['high']:.3f}), "
                      f"peak {memory / 2**20:.1f} MiB, KV cache {kv_bytes / 2**20:.1f} MiB")
    return figures


def main(argv=None) -> int:
    """Run the command; returns the exit code."""
    parser = arguments("benchmarks.against", __doc__, "against.json")
    shapes.add_arguments(parser, "small", [576])
    return run(parser, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
