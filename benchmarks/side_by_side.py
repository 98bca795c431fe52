"""The harness: several callables timed in one run, in turns, and what they allocate.

A machine's speed drifts, so what is compared is measured side by side: in each round every callable runs once, in an
order that rotates, and its ratio to the baseline OF THE SAME ROUND is what counts. Seconds are reported on a GPU only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vispco.files import write_json
from vispco.version import versions


def side_by_side(calls: dict[str, Callable[[], Any]], *, baseline: str, rounds: int = 9, warmup: int = 2,
                 device: str | torch.device = "cpu", timer: Callable[[Callable], float] | None = None,
                 within: dict[str, Callable[[], contextlib.AbstractContextManager]] | None = None) -> dict[str, dict]:
    """Time `calls` in turns: {name: {"ratio", "low", "high", "ms"}}.

    ratio: median over the rounds of the call's time over the baseline's (> 1: slower); low, high: their 10 % and 90 %
    quantiles. ms: median milliseconds on a GPU, None on a CPU. timer: seconds of one call; default `timed(device)`.
    within: by name, makes the context in which each of its calls runs; entering and leaving it is not timed.
    Raises ValueError for an unknown baseline, or fewer than one round.

    >>> import time
    >>> side_by_side({"a": lambda: None, "b": lambda: time.sleep(0.001)}, baseline="a", rounds=3)["b"]["ratio"] > 1
    True
    """
    if baseline not in calls:
        raise ValueError(f"the baseline {baseline!r} is not among {', '.join(calls)}")
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
    timer, within = timer or timed(device), within or {}
    names, seconds = list(calls), {name: [] for name in calls}
    for turn in range(-warmup, rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            with within.get(name, contextlib.nullcontext)():
                taken = timer(calls[name])
            if turn >= 0:
                seconds[name].append(taken)
    times = torch.tensor([seconds[name] for name in names], dtype=torch.float64)  # (calls, rounds)
    ratios = times / times[names.index(baseline)]
    low, middle, high = ratios.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), dim=1).tolist()
    on_gpu = torch.device(device).type == "cuda"
    return {name: {"ratio": middle[i], "low": low[i], "high": high[i],
                   "ms": 1000 * times[i].quantile(0.5).item() if on_gpu else None} for i, name in enumerate(names)}


def timed(device: str | torch.device) -> Callable[[Callable], float]:
    """A timer of one call, in seconds: CUDA events on a GPU, the wall clock elsewhere."""
    def by_clock(call: Callable) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def by_events(call: Callable) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000

    return by_events if torch.device(device).type == "cuda" else by_clock


def peak_memory(call: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Most bytes that tensors allocated by `call` held at once, on top of what was there before.

    GPU: `torch.cuda.max_memory_allocated`. CPU: the same count, from the profiler's record of every allocation.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        trace.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What ran a benchmark: kind of processor, threads or GPU."""
    if torch.device(device).type == "cuda":
        return {"device": "cuda", "name": torch.cuda.get_device_name(device)}
    return {"device": "cpu", "name": platform.machine(), "threads": torch.get_num_threads()}


def arguments(name: str, description: str, output: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share. name: of the module."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and prompts")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, default=Path(output), help="JSON file to write")
    return parser


def run(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], Any],
        argv: Sequence[str] | None = None) -> int:
    """A benchmark's command: `measure(options)`, and its figures as JSON with what produced them.

    Returns the exit code: 0, or 2 with one line on stderr for what a user can get wrong.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        options = parser.parse_args(given)
        if options.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {options.threads}")
        if options.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("--device cuda, but torch finds no GPU: use --device cpu")
        if not options.output.absolute().parent.is_dir():
            raise ValueError(f"--output: there is no folder {options.output.parent}")
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        with torch.no_grad() if not getattr(options, "gradients", False) else contextlib.nullcontext():
            figures = measure(options)
        write_json(options.output, {
            "command": shlex.join([*parser.prog.split(), *given]), "seed": options.seed, "versions": versions(),
            "machine": machine(options.device), "dtype": options.dtype, "attention": getattr(options, "attention", "sdpa"),
            "rounds": options.rounds, "figures": figures})
        print(f"written to {options.output}")
        return 0
    except SystemExit as stop:
        return stop.code or 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}".splitlines()[0], file=sys.stderr)
        return 2
