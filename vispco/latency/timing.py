"""Calls that are timed in one run, in turns.

A machine's speed drifts, so calls to compare are measured side by side. In each round every call
runs once, in an order that rotates, and is compared with the baseline OF THE SAME ROUND. Seconds
are reported on a GPU only.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)
Timer = Callable[[Callable], float]
Within = Callable[[], contextlib.AbstractContextManager]


def in_turns(
    calls: Mapping[Name, Callable[[], Any]],
    *,
    rounds: int = 9,
    warmup: int = 2,
    timer: Timer | None = None,
    within: Mapping[Name, Within] | None = None,
) -> dict[Name, list[float]]:
    """Seconds of each call in each round: {name: [seconds]}.

    warmup: number of rounds before these, which are not counted.
    timer: gives the seconds of one call; by default `timed("cpu")`.
    within: by name, makes the context in which each of its calls runs. Entering and leaving it is
        not timed.
    Raises ValueError for fewer than one round, or a negative warmup.

    >>> seconds = in_turns({"a": list, "b": dict}, rounds=3)
    >>> {name: len(times) for name, times in seconds.items()}
    {'a': 3, 'b': 3}
    """
    if rounds < 1 or warmup < 0:
        found = f"{rounds} and {warmup}"
        raise ValueError(f"rounds must be at least 1 and warmup at least 0, got {found}")
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


def side_by_side(
    calls: Mapping[Name, Callable[[], Any]],
    *,
    baseline: Name,
    device: str | torch.device = "cpu",
    timer: Timer | None = None,
    **options: Any,
) -> dict[Name, dict]:
    """Time `calls` in turns, against one of them: {name: {"ratio", "low", "high", "ms"}}.

    ratio: the median over the rounds of the call's time over the baseline's (> 1: slower).
    low, high: the 10 % and the 90 % quantile of that ratio.
    ms: median milliseconds on a GPU, None on a CPU.

    timer: gives the seconds of one call; by default `timed(device)`.
    options: rounds, warmup and within of `in_turns`.
    Raises ValueError for an unknown baseline, fewer than one round, or a negative warmup.

    >>> calls = {"a": lambda: None, "b": lambda: time.sleep(0.001)}
    >>> side_by_side(calls, baseline="a", rounds=3)["b"]["ratio"] > 1
    True
    """
    if baseline not in calls:
        known = ", ".join(map(str, calls))
        raise ValueError(f"the baseline {baseline!r} is not among {known}")
    seconds = in_turns(calls, timer=timer or timed(device), **options)
    on_gpu = torch.device(device).type == "cuda"
    # (calls, rounds)
    times = torch.tensor(list(seconds.values()), dtype=torch.float64)
    ratios = times / times[list(seconds).index(baseline)]
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    found = {}
    for name, own, ratio in zip(seconds, times, ratios, strict=True):
        low, middle, high = ratio.quantile(quantiles).tolist()
        ms = 1000 * own.quantile(0.5).item() if on_gpu else None
        found[name] = {"ratio": middle, "low": low, "high": high, "ms": ms}
    return found


def timed(device: str | torch.device, clock: Callable[[], float] | None = None) -> Timer:
    """A timer of one call, in seconds: CUDA events on one GPU, elsewhere a clock.

    clock: gives the time in seconds. If it is given, it is used on a GPU too.
    """
    kind, tick = torch.device(device).type, clock or time.perf_counter

    def wait() -> None:
        # A model may be spread over several devices.
        for other in range(torch.accelerator.device_count() if kind != "cpu" else 0):
            torch.accelerator.synchronize(other)

    def by_clock(call: Callable) -> float:
        wait()
        start = tick()
        call()
        wait()
        return tick() - start

    def by_events(call: Callable) -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000

    one_gpu = kind == "cuda" and torch.cuda.device_count() == 1
    return by_events if one_gpu and clock is None else by_clock
