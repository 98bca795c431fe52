"""What is measured, part by part, on one model."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers as tf

import vispco
from vispco.flops import CostModel
from vispco.latency.timing import in_turns, timed
from vispco.registry import adapter_for, build_method

from .. import shapes
from ..side_by_side import peak_memory, side_by_side
from ..speedup import realised
from . import models

#: Text tokens of a prompt.
TEXT = 64


@dataclass(frozen=True)
class Part:
    """One measurement: its kind (of `KINDS`), model, visual tokens and batch size.

    >>> Part("decode", "llava-1.5-7b", 576, 8).name
    'decode llava-1.5-7b 576x8'
    """

    kind: str
    model: str
    n_visual: int
    batch: int

    @property
    def name(self) -> str:
        """How it is called in the JSON and on the command line."""
        return f"{self.kind} {self.model} {self.n_visual}x{self.batch}"


@dataclass(frozen=True)
class Work:
    """A part, the model it is measured on, and how long it may take in seconds."""

    part: Part
    model: Any
    seconds: float
    rounds: int

    @property
    def device(self) -> Any:
        """Where the model is."""
        return self.model.device

    def prompt(self) -> dict[str, Any]:
        """The inputs of the part's batch."""
        return models.prompt(self.model, self.part.n_visual, TEXT, self.part.batch)

    def rounds_of(self, seconds: float) -> int:
        """How many rounds of so many seconds, at least 2, fit in a third of the part's time."""
        return max(2, min(self.rounds, int(self.seconds / 3 / seconds)))

    def row(self, **figures: Any) -> dict[str, Any]:
        """A row of figures, with what it is of."""
        part = self.part
        about = {"model": part.model, "n_visual": part.n_visual, "batch": part.batch}
        return {**about, "n_text": TEXT, "layers": len(self.model.get_decoder().layers), **figures}


def schedules(layers: int) -> dict[str, vispco.PruningConfig]:
    """FastV from layer 2 at 50, 25 and 10 %, three steps, keep all, and two before layer 0."""
    found = dict(shapes.schedules(layers))
    found["keep all"] = vispco.PruningConfig("fastv", [1.0] * layers)
    found["layer 0"] = vispco.PruningConfig("pdrop", [0.25] * layers)
    found["features"] = vispco.PruningConfig("divprune", [0.25] * layers)
    return found


@torch.no_grad()
def first_token(work: Work) -> list[dict]:
    """Time to first token of each schedule against the full model's, its FLOPs, and memory."""
    model, part, inputs = work.model, work.part, work.prompt()
    configs = schedules(len(model.get_decoder().layers))
    applied: dict[str, Any] = {"full": contextlib.nullcontext}
    applied |= {name: partial(vispco.apply, model, config) for name, config in configs.items()}
    call = partial(model, **inputs, use_cache=True, logits_to_keep=1)
    memory, kept, out = {}, {}, []
    with models.without_tower(model, inputs) as tower:
        # It also warms up what is timed below.
        for name, within in applied.items():
            with within():
                memory[name] = peak_memory(lambda: out.append(call()), work.device)
                kept[name] = shapes.kv_bytes(out.pop().past_key_values)
        calls: dict[str, Callable] = {**dict.fromkeys(applied, call), "tower": tower}
        # Most schedules take half of the full model's time or less.
        once = timed(work.device)(tower) + timed(work.device)(call) * (1 + len(configs) / 2)
        how = {"rounds": work.rounds_of(once), "warmup": 0, "device": work.device}
        times = side_by_side(calls, baseline="full", within=applied, **how)
    grid = inputs.get("image_grid_thw")
    images = None if grid is None else grid[:1].tolist()
    whole = vispco.count_flops(model.config, None, part.n_visual, TEXT, images=images)
    seen = (whole.vision or 0) + (whole.projector or 0)
    dimensions = adapter_for(model)(model).dimensions(model.config)
    rows = []
    for name in applied:
        flops = whole.total
        if config := configs.get(name):
            cost = CostModel(dimensions, build_method(config.method, config.method_options))
            flops = int(cost(torch.tensor(config.tokens(part.n_visual)), part.n_visual, TEXT))
        both = whole.total * part.batch, flops * part.batch
        row = work.row(schedule=name, rounds=how["rounds"], ms=times[name]["ms"], flops=both[1])
        row |= realised(times, name, both)
        tower_too = times["tower"]["ratio"], seen * part.batch
        row["with_tower"] = realised(times, name, both, tower_too)
        row |= {"tower_ms": times["tower"]["ms"], "tower_ratio": times["tower"]["ratio"]}
        row |= {"peak_bytes": memory[name], "kv_bytes": kept[name]}
        rows.append({**row, "weight_bytes": sum(p.nbytes for p in model.parameters())})
    return rows


class Clock(tf.LogitsProcessor):
    """Notes when `generate` has the logits of each token; it changes none."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def __call__(self, input_ids, scores):
        """The scores as they are."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())
        return scores

    def seconds(self) -> float:
        """Median seconds of a step, without the first two."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))[2:]
        if self.cuda:
            torch.cuda.synchronize()
            steps = [a.elapsed_time(b) / 1000 for a, b in pairs]
        else:
            steps = [b - a for a, b in pairs]
        return median(steps)


def generated(work: Work, inputs: dict, tokens: int, **options: Any) -> float:
    """Seconds of one step of decoding, of a greedy answer of so many tokens."""
    clock = Clock(work.device)
    how = {"max_new_tokens": tokens, "do_sample": False, **options}
    work.model.generate(**inputs, **how, logits_processor=[clock])
    if len(clock.marks) != tokens:
        raise RuntimeError(f"{len(clock.marks)} steps were timed, of {tokens} tokens")
    return clock.seconds()


def _speeds(work: Work, ms: float | None) -> dict[str, Any]:
    """Of a step that takes so many milliseconds; None on a CPU."""
    return {"ms": ms, "tokens_per_second": ms and 1000 * work.part.batch / ms}


@torch.no_grad()
def decode(work: Work, tokens: int = 24) -> list[dict]:
    """Decoding as it comes, with a dynamic KV cache: the full model, and after pruning."""
    model, inputs = work.model, work.prompt()
    configs = schedules(len(model.get_decoder().layers))
    within = {n: partial(vispco.apply, model, configs[n]) for n in ("keep all", "25%", "10%")}
    calls = dict.fromkeys(["full", *within], partial(generated, work, inputs, tokens))
    # A call says itself how long a step took.
    how: dict[str, Any] = {"within": within, "warmup": 0, "timer": lambda call: call()}
    with models.without_tower(model, inputs):
        # Not counted: the first call of each way is slower.
        in_turns(calls, rounds=1, **how)
        rounds = work.rounds_of(len(calls) * timed(work.device)(calls["full"]))
        times = side_by_side(calls, baseline="full", device=work.device, rounds=rounds, **how)
    more = {"rounds": rounds, "tokens": tokens}
    return [
        work.row(way=name, **row | _speeds(work, row["ms"]), **more) for name, row in times.items()
    ]


@torch.no_grad()
def compiled(work: Work, tokens: int = 32, rounds: int = 3) -> list[dict]:
    """Decoding by `generate` in a static KV cache: as it comes, and compiled; full and pruned."""
    from torch._dynamo.utils import counters

    model, inputs = work.model, work.prompt()
    configs = schedules(len(model.get_decoder().layers))
    options: dict[str, Any] = {}
    if work.device.type != "cuda":
        # A GPU's decoding is compiled without being told.
        options["compile_config"] = tf.CompileConfig(backend="eager", mode=None, dynamic=False)
        options["compile_config"]._compile_all_devices = True
    rows, baseline = [], None
    pruned: Any = partial(vispco.apply, model, configs["25%"])
    ways: dict[str, Any] = {"full": contextlib.nullcontext, "25%": pruned}
    for name, within in ways.items():
        # One `apply` for all, for each compiles its own code.
        with models.without_tower(model, inputs), within():
            for how in ("eager", "compiled"):
                given = options if how == "compiled" else {"disable_compile": True}
                given = {**given, "cache_implementation": "static"}
                before, started = counters["stats"]["unique_graphs"], time.perf_counter()
                generated(work, inputs, tokens, **given)
                first = time.perf_counter() - started
                graphs = counters["stats"]["unique_graphs"] - before
                steps = [generated(work, inputs, tokens, **given) for _ in range(rounds)]
                middle = median(steps)
                baseline = baseline or middle
                again = counters["stats"]["unique_graphs"] - before - graphs
                more = {"ratio": middle / baseline, "graphs": graphs, "graphs_later": again}
                on_gpu = work.device.type == "cuda"
                more |= {"first_seconds": first if on_gpu else None, "tokens": tokens}
                more |= _speeds(work, 1000 * middle if on_gpu else None)
                rows.append(work.row(way=f"{name}, {how}", **more))
    torch._dynamo.reset()
    return rows


def emptied(device: torch.device) -> None:
    """Let go of memory that nothing uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
