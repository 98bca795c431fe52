"""What limits a prefill: where its time goes, by kind of kernel."""

from __future__ import annotations

import contextlib
import re
from functools import partial
from typing import Any

import torch

import vispco

from ..speedup import limits
from . import models
from .parts import Work, schedules

#: What kernels do, by their names.
DOES = {
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|addmm|aten::mm|aten::bmm|linear|splitk",
    "attention": r"flash|fmha|attention|sdpa",
    "sorting": r"sort|topk|scan|cumsum",
    "copying, gathering": r"copy|gather|scatter|index|memcpy|memset|cat|fill",
    "reductions": r"reduce|norm|softmax|mean|sum",
    "elementwise": r"elementwise|vectorized|mul|add|silu|gelu|pow|rsqrt|where",
}


def kind_of(kernel: str) -> str:
    """What a kernel does.

    >>> kind_of("nvjet_tst_128x256_64x4_1x2_h_bz_TNT"), kind_of("something")
    ('matrix products', 'other')
    """
    found = (name for name, pattern in DOES.items() if re.search(pattern, kernel.lower()))
    return next(found, "other")


@torch.no_grad()
def profiled(work: Work) -> list[dict]:
    """Where the time of a prefill goes: shares by kind of kernel, and how busy the device is."""
    model, inputs = work.model, work.prompt()
    configs = schedules(len(model.get_decoder().layers))
    call = partial(model, **inputs, use_cache=True, logits_to_keep=1)
    rows = []
    with models.without_tower(model, inputs):
        for name in ("full", "25%", "features"):
            context: Any = contextlib.nullcontext()
            if name in configs:
                context = vispco.apply(model, configs[name])
            with context:
                # The profiler's own start takes time.
                for _ in range(2):
                    found = limits(call, work.device, top=10_000)
            kinds: dict[str, float] = {}
            for kernel, share in found["shares"].items():
                kinds[kind_of(kernel)] = kinds.get(kind_of(kernel), 0) + share
            largest = {kernel[:120]: x for kernel, x in list(found["shares"].items())[:6]}
            row = {"kinds": kinds, "largest": largest, "busy": found.get("busy")}
            rows.append(work.row(schedule=name, **row))
    return rows
