"""What a search costs on a model: one step, the passes of each budget, and a whole search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

import vispco
from vispco.calibration import frozen, run_teacher
from vispco.latency.timing import timed
from vispco.schedule import ramp
from vispco.search import SearchOptions
from vispco.solvers.problem import Problem

from .. import search_cost
from ..side_by_side import peak_memory, side_by_side
from .parts import Work, emptied
from .passes import BUDGETS, default_search


def search(work: Work) -> list[dict]:
    """A step of the search against a plain pass, and the time of a whole search with its defaults.

    The search of five budgets is extrapolated: passes and steps of each kind, times what one takes
    here.
    """
    model, inputs = work.model, work.prompt()
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -1] = inputs["input_ids"][:, -1]
    problem = Problem(model, [{**inputs, "labels": labels}], "fastv", "monotone", SearchOptions())
    (batch,) = problem.prepared
    step = partial(
        search_cost.search_step, model, problem.adapter, problem.scorer, problem.kernel, batch
    )
    calls: dict[str, Callable] = {
        "plain": partial(search_cost.plain, model, batch),
        "tower": partial(search_cost.plain, model, replace(batch, features=None)),
        "step": step,
        "checkpoint": partial(step, checkpoint=True),
    }
    for budget in BUDGETS:
        limit = problem.limit(budget)
        config = vispco.PruningConfig("fastv", limit.harden(ramp(limit)))
        calls[f"{budget:.0%}"] = partial(_measured, model, batch, config)
    failed: dict[str, str] = {}
    with frozen(model):
        run_teacher(model, [batch])
        memory: dict[str, int] = {}
        for name, call in list(calls.items()):
            try:
                memory[name] = peak_memory(call, work.device)
            except torch.OutOfMemoryError:
                # A step may fit with checkpoints alone, and a search goes without any.
                if name not in ("step", "checkpoint"):
                    raise
                failed[name] = "out of memory"
                del calls[name]
            emptied(work.device)
        rounds = work.rounds_of(sum(map(timed(work.device), calls.values())))
        times = side_by_side(calls, baseline="plain", rounds=rounds, warmup=0, device=work.device)
    rows = [
        work.row(call=name, rounds=rounds, **times[name], peak_bytes=memory[name]) for name in calls
    ]
    rows += [work.row(call=name, failed=why) for name, why in failed.items()]
    return [*rows, work.row(call="frontier", **_frontier(work, times))]


def _measured(model: Any, batch: Any, config: vispco.PruningConfig) -> None:
    with torch.no_grad(), vispco.apply(model, config) as pruner:
        pruner.run(batch)


def _frontier(work: Work, times: dict[str, dict]) -> dict[str, Any]:
    """A whole search in units of the plain pass of a batch, and in seconds on a GPU."""
    part = work.part
    passes = default_search(len(work.model.get_decoder().layers), batch=part.batch)
    ratio = {name: row["ratio"] for name, row in times.items()}
    total = (ratio["tower"] * passes.teacher + passes.profile) / part.batch
    total += sum(ratio[f"{budget:.0%}"] for budget in BUDGETS) * passes.measured / part.batch
    plain = times["plain"]["ms"]
    found = {"budgets": list(BUDGETS), "passes": asdict(passes), "plain_passes": total}
    return {**found, "seconds": plain and plain / 1000 * total}
