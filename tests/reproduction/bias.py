"""Where FastV's kept tokens lie, with rotary positions in its scores and without.

    python -m tests.reproduction.bias --output docs/results/bias.json

One drop before one layer. FastV keeps a quarter of the tokens; the others keep as many as its FLOPs
allow. Of every row and column of the picture's grid: the share of all kept tokens that lie there,
over all held-out questions. Written are the file, and beside it a picture of each testbed, as SVG
and PNG.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

from vispco import testbed
from vispco.calibration import PreparedBatch, prepare, run_teacher, shapes
from vispco.config import PruningConfig
from vispco.evaluate import Record, costs, evaluate, grade, record
from vispco.pruning import apply
from vispco.registry import adapter_for
from vispco.utils.files import write_text

from . import command
from .figures.base import BLUE, GREY, RED, percents, render
from .markdown import markdown
from .video import affordable

#: {testbed: the layers before which tokens are dropped}
LAYERS = {
    "testbed-smollm": (2, 4, 8, 16),
    "testbed-qwen": (1, 2, 4, 8),
    "testbed-llava": (1, 2, 3, 4),
}
SHARE = 1 / 4
FASTV, UNROTATED, FEATHER, RANDOM = (
    "fastv",
    "fastv without rotary positions",
    "FEATHER: also an even grid",
    "random tokens",
)
#: {name: method and options}; the first one's FLOPs are those of all.
VARIANTS: dict[str, tuple[str, dict]] = {
    FASTV: ("fastv", {}),
    UNROTATED: ("fastv", {"rotary": False}),
    FEATHER: ("fastv", {"rotary": False, "stride": 3}),
    RANDOM: ("random", {}),
}


def measure(questions: int, layers: Mapping[str, Sequence[int]] = LAYERS) -> dict:
    """All rows, JSON-ready. layers: of each testbed, those before which tokens are dropped."""
    rows = []
    for name, own in layers.items():
        model, _ = testbed.load(name)
        batches = testbed.batches("test", questions, 32, model=name)
        prepared = run_teacher(model, prepare(model, batches, keep_features=True))
        full = evaluate(model, prepared)
        tokens, size = int(shapes(prepared)[0][0]), len(adapter_for(model)(model).layers)
        for layer in own:
            keep, most = int(SHARE * tokens), None
            for variant, (method, options) in VARIANTS.items():
                if most is not None:
                    keep = affordable(model, prepared, method, layer, most, options)
                ratios = [1.0] * layer + [keep / tokens] * (size - layer)
                config = PruningConfig(method, ratios, options)
                found, counts = places(model, prepared, config)
                most = found.flops if most is None else most
                row = {"testbed": name, "layer": layer, "variant": variant, "tokens": keep}
                row |= {"full": full.accuracy, "flops": found.flops / full.flops}
                row |= {"accuracy": found.accuracy, "rows": _shares(counts.sum(1))}
                rows.append({**row, "columns": _shares(counts.sum(0))})
                print(f"{name}, layer {layer}, {variant}: {found.accuracy}", file=sys.stderr)
    return {"questions": questions, "share": SHARE, "rows": rows}


@torch.no_grad()
def places(
    model, prepared: Sequence[PreparedBatch], config: PruningConfig
) -> tuple[Record, Tensor]:
    """What `evaluate` measures, and how many kept tokens lie in each cell, (rows, columns) long.

    config: has one drop. Cells of different pictures and frames count together.
    """
    adapter, (layer,) = adapter_for(model)(model), config.steps
    kept, grades, side = [], [], torch.zeros(2, dtype=torch.long)
    with apply(model, config) as pruner:
        for batch in prepared:
            grades.append(grade(batch, pruner.run(batch)))
            inputs = dict(batch.inputs)
            visual = adapter.visual_tokens(inputs)
            grid = adapter.grid(inputs, visual)
            side = torch.maximum(side, 1 + grid[visual][:, 1:].amax(0))
            kept.append(grid[pruner.kept()[layer] & visual][:, 1:])
    cells = torch.cat(kept)
    counts = torch.zeros(*side.tolist(), dtype=torch.long)
    counts.index_put_(tuple(cells.T), torch.ones(len(cells), dtype=torch.long), accumulate=True)
    return record(grades, *costs(adapter, list(prepared), config)), counts


def _shares(counts: Tensor) -> list[float]:
    return [round(x, 4) for x in (counts.double() / counts.sum()).tolist()]


def table(result: Mapping) -> str:
    """Markdown: a line a testbed and layer; accuracy, and in brackets what lies at the bottom."""
    lines = []
    for name, layer in dict.fromkeys((row["testbed"], row["layer"]) for row in result["rows"]):
        line = [name, layer]
        for variant in VARIANTS:
            key = name, layer, variant
            (row,) = (r for r in result["rows"] if (r["testbed"], r["layer"], r["variant"]) == key)
            bottom = sum(row["rows"][-len(row["rows"]) // 4 :])
            line.append(f"{100 * row['accuracy']:.1f} ({100 * bottom:.0f})")
        lines.append(line)
    return markdown(["accuracy, % (in the lowest quarter, %)", "before layer", *VARIANTS], lines)


def pictures(result: Mapping) -> dict[str, Callable]:
    """{testbed: what draws its picture}."""
    names = dict.fromkeys(row["testbed"] for row in result["rows"])
    return {name: partial(_draw, name=name, result=result) for name in names}


def _draw(new: Callable, name: str, result: Mapping):
    """Rows of the picture above, columns below; one panel a layer."""
    rows = [row for row in result["rows"] if row["testbed"] == name]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure, panels = new(2, len(layers), width=2.4, height=1.9, sharey=True)
    for axes, (kind, layer) in zip(panels.flat, product(("rows", "columns"), layers), strict=True):
        own = {row["variant"]: row[kind] for row in rows if row["layer"] == layer}
        for variant, colour, marker in ((FASTV, RED, "o"), (UNROTATED, BLUE, "s")):
            look = {"color": colour, "marker": marker, "markersize": 4, "label": variant}
            axes.plot(range(1, len(own[variant]) + 1), own[variant], **look)
        axes.axhline(1 / len(own[FASTV]), color=GREY, linestyle="--", label="even")
        percents(axes.yaxis)
        axes.set_xlabel("row, from the top" if kind == "rows" else "column, from the left")
        axes.set_title(f"before layer {layer}" if kind == "rows" else "")
    # The panels share their axis.
    panels[0, 0].set_ylim(bottom=0)
    figure.supylabel("share of the kept tokens", fontsize=9)
    title = f"{name}: where the tokens lie that FastV keeps ({result['questions']} questions)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 with one line on stderr."""
    parser = command.parser("bias", __doc__)
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)

    def drawn(result: dict) -> str:
        for name, draw in pictures(result).items():
            for kind in ("svg", "png"):
                path = options.output.with_name(f"{options.output.stem}-{name}.{kind}")
                write_text(path, render(draw, kind))
        return table(result)

    return command.tabled(options, lambda: measure(options.questions), drawn)


if __name__ == "__main__":
    sys.exit(main())
