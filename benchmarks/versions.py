"""Two checkouts of vispco side by side: time and memory of a pruned prefill and of decoding.

    git worktree add ../before v0.1.0
    python -m benchmarks.versions --before ../before --model small --visual 576 --cpu-time

A process of each checkout builds the same model. They take turns, round by round: the ratios are
this checkout over the other one, with the 10th and 90th percentile of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import vispco

from . import shapes
from .side_by_side import arguments, peak_memory, run, timed

HERE = Path(__file__).parent.parent


class Worker:
    """A process that has one checkout's vispco, the model and the prompts, and waits for calls."""

    def __init__(self, checkout: Path, options: argparse.Namespace):
        given = {k: v for k, v in vars(options).items() if isinstance(v, (str, int, list)) or not v}
        # The package is the checkout's, this module is ours.
        start = (
            f"import sys; sys.path.insert(0, {str(checkout.resolve())!r}); import vispco; "
            f"sys.path[0] = {str(HERE)!r}; from benchmarks.versions import serve; "
            "serve(sys.argv[1])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version = self.ask("version")

    def ask(self, what: str) -> Any:
        """The answer to one question."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def serve(given: str) -> None:
    """What a worker does: answers each line of stdin by one of stdout."""
    options = argparse.Namespace(**json.loads(given))
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    timer = timed(options.device, time.process_time if options.cpu_time else None)
    model, prompt, setting = next(shapes.settings(options))
    config = shapes.schedules(setting["layers"], options.method)["50%"]
    first = prompt.inputs["input_ids"][:, -1:]

    def prefill(pruned: bool = True):
        with vispco.apply(model, config) if pruned else contextlib.nullcontext():
            return shapes.prefill(model, prompt)

    def decode() -> float:
        with vispco.apply(model, config):
            cache = shapes.prefill(model, prompt)
            shapes.decode(model, cache, 1, first)
            return timer(lambda: shapes.decode(model, cache, options.steps, first))

    answers = {
        "version": lambda: str(Path(vispco.__file__).parent),
        "full": lambda: timer(lambda: prefill(False)),
        "prefill": lambda: timer(prefill),
        "decode": decode,
        "memory": lambda: peak_memory(prefill, options.device),
    }
    with torch.no_grad():
        for line in sys.stdin:
            print(json.dumps(answers[line.strip()]()), flush=True)


def measure(options: argparse.Namespace) -> list[dict]:
    """Ratios of this checkout to the one before, for each part of the work."""
    workers = [Worker(HERE, options), Worker(options.before, options)]
    places = [worker.version for worker in workers]
    if places[0] == places[1]:
        raise ValueError(
            f"--before {options.before} has no vispco of its own: both are {places[0]}"
        )
    figures = []
    try:
        for what in ("full", "prefill", "decode"):
            for _ in range(options.warmup):
                [worker.ask(what) for worker in workers]
            ratios = []
            for turn in range(options.rounds):
                # Who is first changes: a machine gets warmer.
                order = workers if turn % 2 else workers[::-1]
                seconds = {id(worker): worker.ask(what) for worker in order}
                ratios.append(seconds[id(workers[0])] / seconds[id(workers[1])])
            low, ratio, high = torch.tensor(ratios).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
            figures.append({"what": what, "ratio": ratio, "low": low, "high": high})
        here, before = (worker.ask("memory") for worker in workers)
        figures.append({"what": "memory", "ratio": here / before, "bytes": [here, before]})
    finally:
        for worker in workers:
            worker.close()
    for row in figures:
        spread = f"  [{row['low']:.3f}, {row['high']:.3f}]" if "low" in row else ""
        print(f"{row['what']:>8} {row['ratio']:.3f}{spread}")
    return figures


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    found = arguments("benchmarks.versions", __doc__ or "", "versions.json")
    shapes.add_arguments(found, "small", [576])
    found.add_argument("--before", type=Path, required=True, help="folder of the other checkout")
    found.add_argument("--method", default="fastv", choices=vispco.list_methods())
    found.add_argument("--steps", type=int, default=8, help="tokens to decode")
    return found


if __name__ == "__main__":
    sys.exit(run(parser(), measure))
