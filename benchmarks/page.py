"""Write the tables and the picture of docs/how-much-time-it-saves.md from what the benchmarks have written.

    python -m benchmarks.page

Reads docs/results/benchmarks/*.json; writes the picture beside them, and everything below the page's marker.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vispco.utils.files import read_json, write_text
from vispco.plot.figure import COLOURS, MARKERS, percents, render, require_matplotlib
from tests.reproduction.report import markdown

DOCS = Path(__file__).parent.parent / "docs"
PAGE, FOLDER = "how-much-time-it-saves.md", Path("results", "benchmarks")
MARKER = "<!-- below: written by python -m benchmarks.page -->\n"


def _spread(row: dict, name: str = "ratio", digits: int = 3) -> str:
    return f"{row[name]:.{digits}f} ({row['low']:.{digits}f} to {row['high']:.{digits}f})"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"


def _met(rows: Sequence[dict], good: Callable[[dict], bool], what: str) -> str:
    met = sum(map(good, rows))
    return f"**Target: {what}. {'Met' if met == len(rows) else 'Missed'}**: by {met} of {len(rows)} medians.\n\n"


def _overhead(rows: list[dict]) -> str:
    return _met(rows, lambda r: r["ratio"] <= 1.02, "at most 1.02") + markdown(
        ["layers", "visual tokens", "batch", "work", "time over the bare model's"],
        [[r["layers"], r["n_visual"], r["batch"], r["work"], _spread(r, digits=4)] for r in rows])


def _speedup(rows: list[dict]) -> str:
    pruned = [r for r in rows if r["schedule"] != "full"]
    whole = {(r["n_visual"], r["batch"]): r["kv_bytes"] for r in rows if r["schedule"] == "full"}
    return _met(pruned, lambda r: r["realised"] >= 0.9, "realised at least 0.90") + markdown(
        ["layers", "visual tokens", "batch", "schedule", "speed-up", "of the FLOPs'", "realised", "with the tower", "decode",
         "KV cache"],
        [[r["layers"], r["n_visual"], r["batch"], r["schedule"], f"{r['speedup']:.2f}", f"{r['flops_ratio']:.2f}",
          _spread(r, "realised"), _spread(r["with_tower"], "realised") if r["with_tower"] else "–",
          f"{r['decode_speedup']:.2f}", f"{r['kv_bytes'] / whole[r['n_visual'], r['batch']]:.2f}"] for r in pruned])


def _against(rows: list[dict]) -> str:
    return markdown(["layers", "visual tokens", "batch", "schedule", "way", "time over the bare model's", "peak MiB", "KV cache MiB"],
                    [[r["layers"], r["n_visual"], r["batch"], r["schedule"], r["way"], _spread(r), _mib(r["peak_bytes"]),
                      _mib(r["kv_bytes"])] for r in rows])


def _search_cost(rows: list[dict]) -> str:
    steps = [r for r in rows if r["call"] == "step"]
    return (_met(steps, lambda r: r["ratio"] <= 3, "a step at most 3.0x a plain forward pass in time")
            + _met(steps, lambda r: r["memory_ratio"] <= 1.5, "at most 1.5x the memory of one that keeps its activations")
            + markdown(["layers", "visual tokens", "batch", "call", "time over plain", "peak MiB", "memory over kept", "operators"],
                       [[r["layers"], r["n_visual"], r["batch"], r["call"], _spread(r, digits=2), _mib(r["peak_bytes"]),
                         f"{r['memory_ratio']:.2f}", f"{r['operators']:,}" if "operators" in r else "–"] for r in rows]))


def _frontier_cost(rows: list[dict]) -> str:
    return markdown(["model", "questions", "steps", "grid", "of it timed", "search over grid, seconds", "search, passes", "grid, passes",
                     "ratio of passes"],
                    [[r["model"], r["questions"], r["steps"], r["configurations"], r["timed"], _spread(r), f"{r['passes']['search']:,}",
                      f"{r['passes']['grid']:,}", f"{r['passes_ratio']:.3f}"] for r in rows])


def _prediction(rows: list[dict]) -> str:
    return markdown(["layers", "visual tokens", "new tokens", "schedule", "fixed", "predicted", "measured"],
                    [[r["layers"], r["n_visual"], r["new_tokens"], r["schedule"], f"{r['fixed']:.2f}", f"{r['predicted']:.3f}",
                      _spread(r, "measured")] for r in rows])


#: {benchmark: (heading, its table)}, in the page's order.
TABLES: dict[str, tuple[str, Callable[[list[dict]], str]]] = {
    "prediction": ("Predicted and measured", _prediction), "speedup": ("Realised speed-up", _speedup),
    "overhead": ("What `vispco.apply` itself costs", _overhead), "against": ("Against other ways to prune", _against),
    "search_cost": ("What a step of the search costs", _search_cost),
    "frontier_cost": ("What a frontier costs", _frontier_cost)}


def load(folder: Path) -> list[tuple[str, dict]]:
    """(benchmark, what it wrote) of each file, in the page's order. Raises ValueError for a folder or file without figures."""
    def result(data) -> dict:
        if not isinstance(data, dict) or not data.get("figures"):
            raise ValueError("this is not what a benchmark wrote: it has no figures")
        return data

    found = [(path.stem.split("-")[0], read_json(path, result)) for path in sorted(folder.glob("*.json"))]
    if not found or {name for name, _ in found} - TABLES.keys():
        raise ValueError(f"{folder}: expected files named {', '.join(TABLES)}, or one of these, a hyphen and more")
    return sorted(found, key=lambda pair: list(TABLES).index(pair[0]))


def tables(results: Sequence[tuple[str, dict]]) -> str:
    """Everything below the marker."""
    def parts() -> Iterator[str]:
        for name, (title, table) in TABLES.items():
            own = [result for other, result in results if other == name]
            if own:
                yield f"## {title}"
            for result in own:
                machine, versions = result["machine"], result["versions"]
                where = machine["name"] if machine["device"] == "cuda" else f"CPU ({machine['name']}), {machine['threads']} thread(s)"
                yield (f"`{result['command']}`: seed {result['seed']}, {result['rounds']} rounds, {result['dtype']}, "
                       f"{result['attention']}, {result['clock']}; {where}; torch {versions['torch']}, "
                       f"transformers {versions['transformers']}.")
                yield table(result["figures"])

    return "\n" + "\n\n".join(parts()) + "\n"


def picture(rows: Sequence[dict]) -> bytes:
    """Predicted against measured share of the full model's time, a panel for each length of the answer, as SVG."""
    answers = sorted({r["new_tokens"] for r in rows})
    prompts = list(dict.fromkeys((r["model"], r["layers"], r["n_visual"], r["batch"]) for r in rows))

    def draw(figure) -> None:
        panels = figure.subplots(1, len(answers), squeeze=False, sharex=True, sharey=True)[0]
        for axes, tokens in zip(panels, answers):
            axes.plot([0, 1.05], [0, 1.05], color="#8a8a8a", linewidth=1, label="as predicted")
            for i, key in enumerate(prompts):
                mine = sorted((r for r in rows if r["new_tokens"] == tokens
                               and (r["model"], r["layers"], r["n_visual"], r["batch"]) == key), key=lambda r: r["predicted"])
                middle = [r["measured"] for r in mine]
                bars = [[r["measured"] - r["low"] for r in mine], [r["high"] - r["measured"] for r in mine]]
                axes.errorbar([r["predicted"] for r in mine], middle, bars, color=COLOURS[i % len(COLOURS)], linewidth=1,
                              marker=MARKERS[i % len(MARKERS)], capsize=2, label=f"{key[0]}, {key[2]} visual tokens")
            axes.set_title("to the first token" if tokens == 1 else f"a whole answer of {tokens} tokens")
            axes.set(xlabel="predicted time over the full model's", xlim=(0, 1.05), ylim=(0, None))
            percents(axes.xaxis), percents(axes.yaxis)
        panels[0].set_ylabel("measured time over the full model's")
        panels[0].legend(loc="upper left")

    return render(draw, 4.2 * len(answers), 3.8, "svg")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the documentation")
    try:
        docs = parser.parse_args(argv).docs
        require_matplotlib()
        results, text = load(docs / FOLDER), (docs / PAGE).read_text(encoding="utf-8")
        above, marker, _ = text.partition(MARKER)
        if not marker:
            raise ValueError(f"{docs / PAGE}: expected the line {MARKER.strip()}")
        if rows := [row for name, result in results if name == "prediction" for row in result["figures"]]:
            write_text(docs / FOLDER / "prediction.svg", picture(rows))
        write_text(docs / PAGE, above + marker + tables(results))
        return 0
    except SystemExit as stop:
        return stop.code or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}".splitlines()[0], file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
