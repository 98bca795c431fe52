"""Calls timed in one run, in turns.

A machine's speed drifts, so what is compared is measured side by side: in each round every call runs once, in an order
that rotates, and its ratio to the baseline OF THE SAME ROUND is what counts. Seconds are reported on a GPU only.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)
Within = Callable[[], contextlib.AbstractContextManager]


def in_turns(calls: Mapping[Name, Callable[[], Any]], *, rounds: int = 9, warmup: int = 2,
             timer: Callable[[Callable], float] | None = None,
             within: Mapping[Name, Within] | None = None) -> dict[Name, list[float]]:
    """Seconds of each call in each round: {name: [seconds]}; `warmup` more rounds before are not counted.

    timer: seconds of one call; default: `timed("cpu")`. within: by name, makes the context in which each of its calls
    runs; entering and leaving it is not timed. Raises ValueError for fewer than one round.

    >>> {name: len(seconds) for name, seconds in in_turns({"a": list, "b": dict}, rounds=3).items()}
    {'a': 3, 'b': 3}
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
    timer, within = timer or timed("cpu"), within or {}
    names = list(calls)
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            with within.get(name, contextlib.nullcontext)():
                taken = timer(calls[name])
            if turn >= 0:
                seconds[name].append(taken)
    return seconds


def side_by_side(calls: Mapping[Name, Callable[[], Any]], *, baseline: Name, rounds: int = 9, warmup: int = 2,
                 device: str | torch.device = "cpu", timer: Callable[[Callable], float] | None = None,
                 within: Mapping[Name, Within] | None = None) -> dict[Name, dict]:
    """Time `calls` in turns: {name: {"ratio", "low", "high", "ms"}}.

    ratio: median over the rounds of the call's time over the baseline's (> 1: slower); low, high: their 10 % and 90 %
    quantiles. ms: median milliseconds on a GPU, None on a CPU. The rest as `in_turns`; timer: default `timed(device)`.
    Raises ValueError for an unknown baseline, or fewer than one round.

    >>> side_by_side({"a": lambda: None, "b": lambda: time.sleep(0.001)}, baseline="a", rounds=3)["b"]["ratio"] > 1
    True
    """
    if baseline not in calls:
        raise ValueError(f"the baseline {baseline!r} is not among {', '.join(map(str, calls))}")
    seconds = in_turns(calls, rounds=rounds, warmup=warmup, timer=timer or timed(device), within=within)
    times = torch.tensor(list(seconds.values()), dtype=torch.float64)  # (calls, rounds)
    ratios = times / times[list(seconds).index(baseline)]
    low, middle, high = ratios.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), dim=1).tolist()
    on_gpu = torch.device(device).type == "cuda"
    return {name: {"ratio": middle[i], "low": low[i], "high": high[i],
                   "ms": 1000 * times[i].quantile(0.5).item() if on_gpu else None} for i, name in enumerate(seconds)}


def timed(device: str | torch.device, clock: Callable[[], float] | None = None) -> Callable[[Callable], float]:
    """A timer of one call, in seconds: CUDA events on a GPU; elsewhere, or if one is given, a clock."""
    kind, tick = torch.device(device).type, clock or time.perf_counter

    def wait() -> None:
        for other in range(torch.accelerator.device_count() if kind != "cpu" else 0):  # the model may be spread over several
            torch.accelerator.synchronize(other)

    def by_clock(call: Callable) -> float:
        wait()
        start = tick()
        call()
        wait()
        return tick() - start

    def by_events(call: Callable) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000

    return by_events if kind == "cuda" and clock is None and torch.cuda.device_count() == 1 else by_clock
