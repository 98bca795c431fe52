"""How long a search takes on a GPU, and its memory: an estimate from FLOPs, not a measurement.

    FLOPs  = Q (F + V) + P F + M sum over budgets B of (T + B (F - T))
    time   = FLOPs / (40 % of the peak in bfloat16)
    memory = weights + b N w;  of a gradient step: weights + b N (L 2 d + w)  with checkpoints,
             weights + b N L w  without
    w      = 8 d + 6 m + 4 (h + g) e    bytes of one layer that its gradient needs, of one token

F, T, V: FLOPs of the language model's pass over a whole prompt, over its text alone, and of the
vision tower. Q, P, M: see `passes.default_search`, at most. b: questions in a batch, of N tokens
each. L, d, m, h, g, e: layers, hidden size, FFN width, heads, key-value
heads, head size. Weights and what is kept are in bfloat16, norms in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from tests.reproduction.markdown import markdown
from vispco import count_flops
from vispco.registry import adapter_for

from . import models
from .parts import TEXT as N_TEXT
from .passes import BATCH, BUDGETS, default_search

#: Peak FLOP/s in bfloat16 without sparsity, and bytes of memory, as their makers state them.
GPUS = {
    "H100 SXM 80 GB": (989e12, 80e9),
    "A100 80 GB": (312e12, 80e9),
    "RTX 4090 24 GB": (165e12, 24e9),
}
#: Of the peak that is reached; of the memory that is used.
REACHED, USED = 0.4, 0.9
#: Models and visual tokens of the table.
ROWS = {
    "qwen2.5-vl-3b": (1200, 4800),
    "qwen2.5-vl-7b": (1200, 4800),
    "qwen2.5-vl-32b": (1200, 4800),
    "qwen2.5-vl-72b": (1200, 4800),
    "llava-1.5-7b": (576, 2880),
    "llava-1.5-13b": (576, 2880),
}


@dataclass(frozen=True)
class Estimate:
    """Of one search: FLOPs in all, and bytes on the GPU.

    memory: of the search. plain, checkpoint: of a gradient step, without and with checkpoints.
    """

    parameters: int
    flops: float
    memory: float
    plain: float
    checkpoint: float
    passes: int


def estimate(name: str, n_visual: int, batch: int = BATCH) -> Estimate:
    """Of a search with the defaults on a model of `models.TEXT`.

    >>> found = estimate("llava-1.5-7b", 576)
    >>> round(found.parameters / 1e9, 1), found.checkpoint < found.plain
    (7.1, True)
    """
    config = models.config(name)
    parameters = sum(p.numel() for p in models.build(name, False, "meta", None).parameters())
    report, dimensions = _counted(config, n_visual)
    layers, d = dimensions.layers, dimensions.hidden
    passes, tokens = default_search(layers, batch=batch), n_visual + N_TEXT
    full, text = report.full, report.text_only
    flops = passes.teacher * (full + report.vision + report.projector)
    flops += passes.profile * full
    flops += passes.measured * sum(text + budget * (full - text) for budget in BUDGETS)
    heads = dimensions.heads + dimensions.kv_heads
    width = 8 * d + 6 * dimensions.ffn + 4 * heads * dimensions.head_dim
    layer, weights = batch * tokens * width, 2 * parameters
    plain, checkpoint = layers * layer, layers * batch * tokens * 2 * d + layer
    memory = (weights + layer, weights + plain, weights + checkpoint)
    return Estimate(parameters, flops, *memory, passes.total())


def _counted(config: Any, n_visual: int) -> tuple[Any, Any]:
    images = None
    if config.model_type != "llava":
        height = max(h for h in range(1, int(n_visual**0.5) + 1) if n_visual % h == 0)
        images = [[1, 2 * height, 2 * (n_visual // height)]]
    report = count_flops(config, None, n_visual, N_TEXT, images=images)
    return report, adapter_for(config).dimensions(config)


def time(seconds: float) -> str:
    """Minutes or hours.

    >>> time(90), time(9000)
    ('2 min', '2.5 h')
    """
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def on(gpu: str, found: Estimate) -> str:
    """The time on one GPU, and how many hold the model and a layer, if more than one."""
    peak, memory = GPUS[gpu]
    number = ceil(found.memory / (USED * memory))
    taken = time(found.flops / (REACHED * peak))
    return taken if number == 1 else f"{taken} ({number} GPUs)"


def table() -> str:
    """The table in Markdown, with its assumptions."""
    rows = []
    for name, sizes in ROWS.items():
        for n_visual in sizes:
            found = estimate(name, n_visual)
            row = [name, n_visual, f"{found.parameters / 1e9:.1f}", f"{found.passes:,}"]
            row += [f"{found.flops / 1e15:,.0f}", f"{2 * found.parameters / 1e9:.0f}"]
            sizes_gb = found.memory, found.checkpoint, found.plain
            row += [f"{size / 1e9:.0f}" for size in sizes_gb]
            rows.append([*row, *(on(gpu, found) for gpu in GPUS)])
    header = ["model", "visual tokens", "parameters (billions)", "forward passes, at most"]
    header += ["PFLOPs", "weights GB", "GB", "GB, gradient, checkpoints", "GB, gradient", *GPUS]
    passes = default_search(32)
    return "\n".join(
        [
            markdown(header, rows),
            "",
            "An estimate, not a measurement: a search with the defaults (start `profile`, FastV, "
            f"{passes.teacher} questions with {N_TEXT} text tokens and short answers, "
            f"{len(BUDGETS)} budgets), in bfloat16, at {REACHED:.0%} of the GPU's peak, in batches "
            f"of {BATCH}. A forward pass is one of one question; most are of the pruned model, and "
            "cost what its budget says. GB: weights and one layer; with `--start gradient`, what a "
            f"gradient step keeps. Of a GPU's memory {USED:.0%} are used. Several GPUs hold a "
            'model\'s layers in turn (`device_map="auto"`), which makes it no faster; in '
            "parentheses, how many are needed.",
        ]
    )
