"""A thousand times in one process: no growth of memory, hooks, objects, files or threads."""

import gc
import os
import resource
import threading
from pathlib import Path

import pytest
import torch

import vispco
from tiny import IMAGE, batch, tiny_llava, without_labels
from vispco import PruningConfig
from vispco.pruning._hooks import Eagerly, _applied

STATM = Path("/proc/self/statm")
PROMPT = without_labels(batch(images=(1,), text=(5,), before=(2,)))
QUESTIONS = batch(images=(1, 1), text=(5, 6), before=(2, 1))


@pytest.fixture
def model():
    return tiny_llava(layers=2)


def memory():
    """Bytes of this process that are in memory."""
    return int(STATM.read_text().split()[1]) * resource.getpagesize()


def things(model):
    """What may not grow by a single one.

    Hooks and attributes of modules, files, threads, what vispco keeps count of.
    """
    modules = list(model.modules())
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules
    )
    files = len(os.listdir("/proc/self/fd")) if STATM.exists() else 0
    return (
        hooks,
        sum(len(vars(m)) for m in modules),
        files,
        threading.active_count(),
        len(_applied),
        Eagerly._count,
    )


def runs(model, once, times):
    """Run `once(i)` many times.

    Returns (things, objects, memory) twice: after a tenth of the runs, and at the end.
    """
    seen = []
    for i in range(times):
        once(i)
        if i + 1 in (max(5, times // 10), times):
            gc.collect()
            seen.append((things(model), len(gc.get_objects()), memory() if STATM.exists() else 0))
    return seen


def check(model, once, times):
    """Nothing countable grows.

    Objects grow by less than one for ten runs, memory by less than a hidden state or a cache a run.
    """
    (before, objects, held), (after, more, now) = runs(model, once, times)
    assert after == before
    assert more - objects < max(10, times / 10), f"{more - objects} more objects after {times} runs"
    assert now - held < max(times * 4096, 2**22), (
        f"{(now - held) / 2**20:.1f} MiB more after {times} runs"
    )


CONFIGS = [
    PruningConfig("random", [0.5, 0.5]),
    PruningConfig("fastv", [1, 0.3]),
    PruningConfig("visionzip", [0.5, 0.25]),
    PruningConfig("strided", [1, 1]),
]


def apply_and_generate(model):
    """One cycle: a configuration, and generation of two tokens.

    Now and then one that fails, or a handle left to the garbage collector.
    """

    def once(i):
        config = CONFIGS[i % 4]
        with vispco.apply(model, config, mode="search" if i % 5 == 4 else "deploy") as handle:
            if i % 5 == 4:
                with torch.no_grad():
                    model(**PROMPT)
            else:
                model.generate(
                    **PROMPT, max_new_tokens=2, do_sample=False, suppress_tokens=[IMAGE, 2]
                )
            handle.kept()
            if i % 7 == 6:
                with pytest.raises(ValueError):
                    vispco.apply(model, config)
                with pytest.raises((AttributeError, TypeError)):
                    model(input_ids="no ids")

    return once


def search(model):
    """One search: half of the FLOPs, one step."""

    def once(i):
        found = vispco.search(
            model,
            [QUESTIONS],
            "random",
            budgets=[0.5],
            refinement=0,
            seed=i,
            start=vispco.Gradient(steps=1),
        )
        assert len(found.points) == 1

    return once


CYCLES = {"apply and generate": apply_and_generate, "search": search}


@pytest.mark.parametrize("cycle", CYCLES)
def test_many_runs_leave_nothing_behind(model, cycle):
    check(model, CYCLES[cycle](model), 120 if cycle != "search" else 20)


@pytest.mark.slow
@pytest.mark.parametrize("cycle", CYCLES)
def test_a_thousand_runs_leave_nothing_behind(model, cycle):
    check(model, CYCLES[cycle](model), 1000)


@pytest.mark.parametrize("leak", ["hook", "attribute", "objects", "memory", "file"])
def test_a_leak_is_seen(model, leak, tmp_path):
    """The check itself: it fails where a run leaves something behind."""
    kept = []

    def once(i):
        if leak == "hook":
            model.register_forward_hook(lambda *args: None)
        elif leak == "attribute":
            setattr(model, f"note{i}", None)
        elif leak == "objects":
            kept.append([[]])
        elif leak == "memory":
            kept.append(torch.ones(2**14))
        else:
            kept.append((tmp_path / str(i)).open("w"))

    try:
        with pytest.raises(AssertionError):
            check(model, once, 150)
    finally:
        for file in kept if leak == "file" else ():
            file.close()


def test_models_that_come_and_go_while_pruned_leave_nothing_behind(model):
    """Without `.remove()`: the model, its handle and the compiler's stance go together."""

    def once(i):
        other = tiny_llava(layers=2)
        vispco.apply(other, CONFIGS[i % 4])
        with torch.no_grad():
            other(**PROMPT)
        del other
        gc.collect()

    check(model, once, 10)
