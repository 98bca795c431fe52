"""The figures of gpu.json as a page of Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.reproduction.markdown import markdown
from vispco.utils.files import write_text

from . import planned

GIB = 2**30
Row = Mapping[str, Any]


def _ms(row: Row, name: str = "ms", digits: int = 1) -> str:
    return "–" if row[name] is None else f"{row[name]:.{digits}f}"


def _spread(row: Row, name: str = "realised") -> str:
    return f"{row[name]:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def _largest(shares: Mapping[str, float], most: int) -> str:
    ordered = sorted(shares.items(), key=lambda pair: -pair[1])[:most]
    return ", ".join(f"{name} {share:.0%}" for name, share in ordered)


def kernel(name: str) -> str:
    """A kernel's own name, without namespaces and the arguments of its template.

    >>> kernel("void at::native::(anonymous namespace)::CatArrayBatchedCopy<unsigned int, 4>(int)")
    '`CatArrayBatchedCopy`'
    """
    own = name.partition("<")[0].removeprefix("void ")
    return f"`{own.replace('(anonymous namespace)::', '').removeprefix('at::native::')}`"


def _prompt(*more: tuple[str, Callable[[Row], Any]]) -> dict[str, Callable[[Row], Any]]:
    """The columns that name a prompt, and more."""
    return {
        "model": lambda r: r["model"],
        "visual tokens": lambda r: r["n_visual"],
        "batch": lambda r: r["batch"],
        **dict(more),
    }


def _first_token(rows: list[Row]) -> str:
    return _table(
        rows,
        ("schedule", lambda r: r["schedule"]),
        ("ms", _ms),
        ("speed-up", lambda r: f"{r['speedup']:.2f}"),
        ("of the FLOPs'", lambda r: f"{r['flops_ratio']:.2f}"),
        ("realised", _spread),
        ("tower ms", lambda r: _ms(r, "tower_ms")),
        ("speed-up with tower", lambda r: f"{r['with_tower']['speedup']:.2f}"),
        ("peak GiB above the weights", lambda r: f"{r['peak_bytes'] / GIB:.2f}"),
        ("KV cache GiB", lambda r: f"{r['kv_bytes'] / GIB:.3f}"),
        ("weights GiB", lambda r: f"{r['weight_bytes'] / GIB:.1f}"),
    )


def _steps(rows: list[Row], *more: tuple[str, Callable[[Row], Any]]) -> str:
    return _table(
        rows,
        ("decoding", lambda r: r["way"]),
        ("ms a step", lambda r: _ms(r, digits=2)),
        ("tokens/s", lambda r: _ms(r, "tokens_per_second")),
        *more,
    )


def _decode(rows: list[Row]) -> str:
    measured = "time over the full model's", lambda r: _spread(r, "ratio") if "low" in r else "–"
    table = _steps(rows, measured)
    if all("low" in row for row in rows):
        return table
    # Its ratios were to a first call, which is slower.
    return f"{table}\n\nWithout a ratio: an earlier version took the faster one of two rounds."


def _compiled(rows: list[Row]) -> str:
    return _steps(
        rows,
        ("time over the first row's", lambda r: f"{r['ratio']:.3f}"),
        ("first call s", lambda r: _ms(r, "first_seconds")),
        ("graphs compiled", lambda r: r["graphs"]),
        ("later", lambda r: r["graphs_later"]),
    )


def _search(rows: list[Row]) -> str:
    steps = [row for row in rows if row["call"] != "frontier" and "failed" not in row]
    calls = _table(
        steps,
        ("call", lambda r: r["call"]),
        ("ms", _ms),
        ("time over a plain pass", lambda r: _spread(r, "ratio")),
        ("peak GiB above the weights", lambda r: f"{r['peak_bytes'] / GIB:.2f}"),
    )
    failed = [
        f"\n\n{r['call']} of {r['model']} at {r['n_visual']}: {r['failed']}."
        for r in rows
        if "failed" in r
    ]
    whole = _table(
        [row for row in rows if row["call"] == "frontier"],
        ("budgets", lambda r: ", ".join(f"{budget:.0%}" for budget in r["budgets"])),
        ("questions", lambda r: r["passes"]["teacher"]),
        ("passes of the profile", lambda r: r["passes"]["profile"]),
        ("passes a budget", lambda r: r["passes"]["measured"]),
        ("plain passes of a batch in all", lambda r: f"{r['plain_passes']:,.0f}"),
        ("minutes", lambda r: "–" if r["seconds"] is None else f"{r['seconds'] / 60:.1f}"),
    )
    note = "A whole search, extrapolated: at most so many passes, at what one takes above."
    return f"{calls}{''.join(failed)}\n\n{note}\n\n{whole}"


def _profile(rows: list[Row]) -> str:
    return _table(
        rows,
        ("schedule", lambda r: r["schedule"]),
        ("device busy", lambda r: "–" if r["busy"] is None else f"{r['busy']:.0%}"),
        ("time by kind", lambda r: _largest(r["kinds"], 6)),
        ("largest", lambda r: _largest(_kernels(r["largest"]), 4)),
    )


def _kernels(shares: Mapping[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, share in shares.items():
        found[kernel(name)] = found.get(kernel(name), 0) + share
    return found


def _table(rows: Sequence[Row], *more: tuple[str, Callable[[Row], Any]]) -> str:
    columns = _prompt(*more)
    return markdown(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


#: {kind of part: (heading, what it says, its table)}, in the page's order.
SECTIONS: dict[str, tuple[str, str, Callable[[list[Row]], str]]] = {
    "first-token": (
        "Time to first token",
        "The language model alone, on ready-made features, and with its vision tower. 50%, 25%, "
        "10%: FastV from layer 2; steps: FastV in three steps; layer 0: PDrop, 25 %; features: "
        "DivPrune before the language model, 25 %. Realised: speed-up over that of the FLOPs.",
        _first_token,
    ),
    "decode": ("Decoding, as it comes", "A dynamic KV cache, greedy.", _decode),
    "compiled": ("Decoding, compiled", "A static KV cache; `generate` compiles it.", _compiled),
    "search": ("The search", "FastV, a batch of questions with one answer token each.", _search),
    "profile": (
        "What limits a prefill",
        "Shares of the device's time. Device busy: its part of the time from its first kernel to "
        "its last, under the profiler, which slows the host: far below 100 %, the GPU waits for "
        "the host.",
        _profile,
    ),
}


def page(data: Mapping[str, Any]) -> str:
    """The page of what gpu.json holds."""
    made, parts = data["made_by"], data["parts"]
    device, versions = made["machine"], made["versions"]
    shapes = "tiny shapes: a rehearsal, no figure means anything" if made["tiny"] else "true shapes"
    told = ", ".join(f"{name} {number}" for name, number in versions.items())
    codes = sorted({part["code"] for part in parts.values()})
    lines = [
        "# Pruning on a GPU",
        f"`python -m benchmarks.gpu`: {device['name']} ({device['device']}), {made['dtype']}, "
        f"sdpa, {shapes}, random weights, seed {made['seed']}; {told}; code {', '.join(codes)}.",
    ]
    for kind, (title, says, table) in SECTIONS.items():
        own = [part for name, part in parts.items() if name.split()[0] == kind]
        rows = [row for part in own for row in part.get("figures", ())]
        if rows:
            lines += [f"## {title}", says, table(rows)]
    without = [f"- {name}: {part['failed']}" for name, part in parts.items() if "failed" in part]
    names = [part.name for part in planned.parts(made["tiny"])]
    without += [f"- {name}: not yet" for name in names if name not in parts]
    if without:
        lines += ["## What was not measured", "\n".join(without)]
    return "\n\n".join(lines) + "\n"


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Write the page, atomically."""
    write_text(path, page(data))
