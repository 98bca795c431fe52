"""Realised speed-up: how much of a cut in FLOPs becomes a cut in time to first token.

    python -m benchmarks.speedup --model small --visual 576 2880 --output speedup.json
    python -m benchmarks.speedup --model llava-1.5-7b --device cuda --dtype bfloat16 \\
        --visual 576 2880 --batch 1 8 --trace

realised = (time full / time pruned) / (FLOPs full / FLOPs pruned): 1 is ideal. Pruning in the
language model does not make the vision tower cheaper. The tower is timed in the same rounds;
the figures are given without it, and with it.
"""

from __future__ import annotations

import contextlib
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

import vispco

from . import shapes
from .side_by_side import arguments, peak_memory, run, side_by_side, turns


def realised(
    times: dict[str, dict],
    name: str,
    flops: tuple[int, int],
    tower: tuple[float, int] = (0.0, 0),
) -> dict:
    """Speed-up, FLOPs ratio and their quotient with its spread, from ratios to the full prefill.

    flops: of the full and the pruned model.
    tower: its time in units of the full prefill, and its FLOPs.

    >>> times = {"half": {"ratio": 0.625, "low": 0.5, "high": 0.8}}
    >>> realised(times, "half", (100, 50))
    {'speedup': 1.6, 'flops_ratio': 2.0, 'realised': 0.8, 'low': 0.625, 'high': 1.0}
    """
    seconds, more = tower
    ratio = (flops[0] + more) / (flops[1] + more)
    speedup, low, high = (
        (1 + seconds) / (times[name][key] + seconds) for key in ("ratio", "high", "low")
    )
    return {
        "speedup": speedup,
        "flops_ratio": ratio,
        "realised": speedup / ratio,
        "low": low / ratio,
        "high": high / ratio,
    }


def limits(call, device: str, top: int = 8) -> dict:
    """Where the time of a call goes.

    shares: each operator's own time (on a GPU, its kernels') over that of all, the `top` largest.
    busy, on a GPU: the part of the time from its first kernel to its last in which it worked. Below
        1, it waits for the host.
    """
    cuda = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as trace:
        call()
        if cuda:
            torch.cuda.synchronize(device)
    time = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = [e for e in trace.key_averages() if not cuda or e.device_type.name == "CUDA"]
    events.sort(key=lambda e: -getattr(e, time))
    total = sum(getattr(e, time) for e in events)
    summary = {"shares": {e.key: getattr(e, time) / total for e in events[:top]}}
    if cuda:
        spans = [e.time_range for e in trace.events() if e.device_type.name == "CUDA"]
        summary["busy"] = total / (max(s.end for s in spans) - min(s.start for s in spans))
    return summary


@contextlib.contextmanager
def settled(within, model, cache, first):
    """`within` for decoding, after the first step, which is not like the others."""
    with within():
        shapes.decode(model, cache, 1, first)
        yield


def measure(options) -> list[dict]:
    """Figures of each schedule and prompt."""
    figures = []
    for model, prompt, setting in shapes.settings(options):
        configs = shapes.schedules(setting["layers"], options.method)
        applied = {"full": contextlib.nullcontext}
        applied |= {name: partial(vispco.apply, model, config) for name, config in configs.items()}
        first, backbone = prompt.inputs["input_ids"][:, -1:], model.model
        calls = dict.fromkeys(["full", *configs], partial(shapes.prefill, model, prompt))
        if prompt.pictures is not None and not options.no_tower:
            calls["tower"] = partial(backbone.get_image_features, **prompt.pictures)
        times = side_by_side(calls, baseline="full", within=applied, **turns(options))

        caches, memory, traces = {}, {}, {}
        for name in ["full", *configs]:
            with applied[name]():
                memory[name] = peak_memory(calls[name], options.device)
                if options.trace:
                    traces[name] = limits(calls[name], options.device)
                caches[name] = calls[name]()

        steps, within = {}, {}
        for name, cache in caches.items():
            steps[name] = partial(shapes.decode, model, cache, options.steps, first)
            within[name] = partial(settled, applied[name], model, cache, first)
        decoding = side_by_side(steps, baseline="full", within=within, **turns(options))

        whole = vispco.count_flops(model, None, prompt.n_visual, prompt.n_text)
        for name in ["full", *configs]:
            config = configs.get(name)
            report = vispco.count_flops(model, config, prompt.n_visual, prompt.n_text)
            flops = whole.total * setting["batch"], report.total * setting["batch"]
            decode = decoding[name]
            row = {
                **setting,
                "schedule": name,
                "method": options.method,
                "ttft_ms": times[name]["ms"],
                "flops": flops[1],
                **realised(times, name, flops),
                "with_tower": None,
                "decode_ms": decode["ms"] and decode["ms"] / options.steps,
                "decode_speedup": 1 / decode["ratio"],
                "decode_low": 1 / decode["high"],
                "decode_high": 1 / decode["low"],
                "kv_bytes": shapes.kv_bytes(caches[name]),
                "peak_bytes": memory[name],
                "limits": traces.get(name),
            }
            if "tower" in times:
                tower = times["tower"]["ratio"], (whole.vision + whole.projector) * setting["batch"]
                row["with_tower"] = realised(times, name, flops, tower)
            figures.append(row)
            cache = row["kv_bytes"] / shapes.kv_bytes(caches["full"])
            print(
                f"{row['n_visual']:>6} visual, batch {row['batch']}, {name:<6} "
                f"{row['speedup']:.3f}x of {row['flops_ratio']:.3f}x: realised "
                f"{row['realised']:.3f} ({row['low']:.3f} to {row['high']:.3f}), "
                f"decode {row['decode_speedup']:.3f}x, KV cache {cache:.3f}"
                + (f", TTFT {row['ttft_ms']:.1f} ms" if row["ttft_ms"] else "")
            )
    return figures


def main(argv=None) -> int:
    """Run the command; returns the exit code."""
    parser = arguments("benchmarks.speedup", __doc__, "speedup.json")
    shapes.add_arguments(parser, "small", [576])
    parser.add_argument("--method", default="fastv", help="that ranks the tokens")
    parser.add_argument("--steps", type=int, default=8, help="tokens decoded in one timed call")
    parser.add_argument("--no-tower", action="store_true", help="leave the vision tower out")
    parser.add_argument(
        "--trace", action="store_true", help="profile each schedule: what limits it"
    )
    return run(parser, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
