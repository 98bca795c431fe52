"""The harness of the benchmarks: timing, memory, operators, and the command.

Calls are timed side by side by `vispco.latency.timing`.
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
from torch.utils._python_dispatch import TorchDispatchMode

from vispco.latency.timing import side_by_side as side_by_side, timed
from vispco.utils.files import write_json
from vispco.utils.version import versions


def peak_memory(call: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Most bytes that tensors allocated by `call` held at once, on top of what was there before.

    GPU: `torch.cuda.max_memory_allocated`. CPU: the same count, from the profiler's record of every
    allocation.
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
        events = [
            e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"
        ]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def operators(call: Callable[[], Any]) -> int:
    """How many of PyTorch's operators `call` runs. Their number decides a small model's time.

    >>> operators(lambda: torch.ones(2) + 1)
    2
    """
    with _Count() as counted:
        call()
    return counted.count


class _Count(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += 1
        return operator(*args, **(kwargs or {}))


def machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What ran a benchmark: kind of processor, threads or GPU."""
    if torch.device(device).type == "cuda":
        return {"device": "cuda", "name": torch.cuda.get_device_name(device)}
    return {"device": "cpu", "name": platform.machine(), "threads": torch.get_num_threads()}


def arguments(name: str, description: str, output: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share. name: of the module."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and prompts")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="of the model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the CPU's time, not the wall clock's: with one thread, "
        "on a machine that others use too",
    )
    parser.add_argument("--output", type=Path, default=Path(output), help="JSON file to write")
    return parser


def turns(options: argparse.Namespace) -> dict[str, Any]:
    """How a benchmark times its calls: the options of `side_by_side` that all benchmarks share."""
    return {
        "rounds": options.rounds,
        "warmup": options.warmup,
        "device": options.device,
        "timer": options.timer,
    }


def run(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Any],
    argv: Sequence[str] | None = None,
) -> int:
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
        if options.cpu_time and (options.threads > 1 or options.device != "cpu"):
            raise ValueError(
                "--cpu-time is the time of one thread on a CPU: leave out --threads and --device"
            )
        options.timer = timed(options.device, time.process_time if options.cpu_time else None)
        if not options.output.absolute().parent.is_dir():
            raise ValueError(f"--output: there is no folder {options.output.parent}")
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        with (
            torch.no_grad()
            if not getattr(options, "gradients", False)
            else contextlib.nullcontext()
        ):
            figures = measure(options)
        result = {
            "command": shlex.join([*parser.prog.split(), *given]),
            "seed": options.seed,
            "versions": versions(),
            "machine": machine(options.device),
            "dtype": options.dtype,
            "attention": getattr(options, "attention", "sdpa"),
            "rounds": options.rounds,
            "clock": "CPU time" if options.cpu_time else "wall",
            "figures": figures,
        }
        write_json(options.output, result)
        print(f"written to {options.output}")
        return 0
    except SystemExit as stop:
        return stop.code or 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}".splitlines()[0], file=sys.stderr)
        return 2
