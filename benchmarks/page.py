"""Write the tables and the picture of docs/how-much-time-it-saves.md.

    python -m benchmarks.page

Reads what the benchmarks have written, docs/results/benchmarks/*.json. Writes the picture beside
these files, and everything below the page's marker. Of docs/results/gpu/gpu.json, it writes all
tables beside the file, and a short one between the page's other markers.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.reproduction.markdown import markdown
from vispco.plot.figure import COLOURS, MARKERS, percents, render, require_matplotlib
from vispco.utils.files import read_json, write_text

from .gpu import page as gpu_page
from .gpu.records import checked

DOCS = Path(__file__).parent.parent / "docs"
PAGE, FOLDER = "how-much-time-it-saves.md", Path("results", "benchmarks")
MARKER = "<!-- below: written by python -m benchmarks.page -->\n"
GPU = Path("results", "gpu", "gpu.json")
GPU_MARKERS = ("<!-- on a GPU: written by python -m benchmarks.page -->\n", "<!-- until here -->\n")


#: {heading: what stands below it, of a row}
Columns = dict[str, Callable[[dict], Any]]
#: What most tables begin with.
PROMPT: Columns = {
    "layers": lambda r: r["layers"],
    "visual tokens": lambda r: r["n_visual"],
    "batch": lambda r: r["batch"],
}


def _table(columns: Columns, rows: Sequence[dict]) -> str:
    return markdown(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def _spread(row: dict, name: str = "ratio", digits: int = 3) -> str:
    return f"{row[name]:.{digits}f} ({row['low']:.{digits}f} to {row['high']:.{digits}f})"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"


def _met(rows: Sequence[dict], good: Callable[[dict], bool], what: str) -> str:
    met = sum(map(good, rows))
    verdict = "Met" if met == len(rows) else "Missed"
    return f"**Target: {what}. {verdict}**: by {met} of {len(rows)} medians.\n\n"


def _overhead(rows: list[dict]) -> str:
    columns: Columns = {
        **PROMPT,
        "work": lambda r: r["work"],
        "time over the bare model's": lambda r: _spread(r, digits=4),
    }
    return _met(rows, lambda r: r["ratio"] <= 1.02, "at most 1.02") + _table(columns, rows)


def _host(rows: list[dict]) -> str:
    columns: Columns = {
        **PROMPT,
        "schedule": lambda r: r["schedule"],
        "time over the bare model's": _spread,
        "operators over the bare model's": lambda r: f"{r['operators']:.3f}",
    }
    return _table(columns, rows)


def _speedup(rows: list[dict]) -> str:
    pruned = [r for r in rows if r["schedule"] != "full"]
    whole = {(r["n_visual"], r["batch"]): r["kv_bytes"] for r in rows if r["schedule"] == "full"}
    columns: Columns = {
        **PROMPT,
        "schedule": lambda r: r["schedule"],
        "speed-up": lambda r: f"{r['speedup']:.2f}",
        "of the FLOPs'": lambda r: f"{r['flops_ratio']:.2f}",
        "realised": lambda r: _spread(r, "realised"),
        "with the tower": lambda r: (
            _spread(r["with_tower"], "realised") if r["with_tower"] else "–"
        ),
        "decode": lambda r: f"{r['decode_speedup']:.2f}",
        "KV cache": lambda r: f"{r['kv_bytes'] / whole[r['n_visual'], r['batch']]:.2f}",
    }
    target = _met(pruned, lambda r: r["realised"] >= 0.9, "realised at least 0.90")
    return target + _table(columns, pruned)


def _against(rows: list[dict]) -> str:
    columns: Columns = {
        **PROMPT,
        "schedule": lambda r: r["schedule"],
        "way": lambda r: r["way"],
        "time over the bare model's": _spread,
        "peak MiB": lambda r: _mib(r["peak_bytes"]),
        "KV cache MiB": lambda r: _mib(r["kv_bytes"]),
    }
    return _table(columns, rows)


def _search_cost(rows: list[dict]) -> str:
    steps = [r for r in rows if r["call"] == "step"]
    time = "a step at most 3.0x a plain forward pass in time"
    memory = "at most 1.5x the memory of one that keeps its activations"
    columns: Columns = {
        **PROMPT,
        "call": lambda r: r["call"],
        "time over plain": lambda r: _spread(r, digits=2),
        "peak MiB": lambda r: _mib(r["peak_bytes"]),
        "memory over kept": lambda r: f"{r['memory_ratio']:.2f}",
        "operators": lambda r: f"{r['operators']:,}" if "operators" in r else "–",
    }
    return (
        _met(steps, lambda r: r["ratio"] <= 3, time)
        + _met(steps, lambda r: r["memory_ratio"] <= 1.5, memory)
        + _table(columns, rows)
    )


def _frontier_cost(rows: list[dict]) -> str:
    columns: Columns = {
        "model": lambda r: r["model"],
        "questions": lambda r: r["questions"],
        "steps": lambda r: r["steps"],
        "grid": lambda r: r["configurations"],
        "of it timed": lambda r: r["timed"],
        "search over grid, seconds": _spread,
        "search, passes": lambda r: f"{r['passes']['search']:,}",
        "grid, passes": lambda r: f"{r['passes']['grid']:,}",
        "ratio of passes": lambda r: f"{r['passes_ratio']:.3f}",
    }
    return _table(columns, rows)


def _prediction(rows: list[dict]) -> str:
    columns: Columns = {
        "layers": lambda r: r["layers"],
        "visual tokens": lambda r: r["n_visual"],
        "new tokens": lambda r: r["new_tokens"],
        "schedule": lambda r: r["schedule"],
        "fixed": lambda r: f"{r['fixed']:.2f}",
        "predicted": lambda r: f"{r['predicted']:.3f}",
        "measured": lambda r: _spread(r, "measured"),
    }
    return _table(columns, rows)


def _ranking(rows: list[dict]) -> str:
    columns: Columns = {
        "visual tokens": lambda r: r["n_visual"],
        "method": lambda r: f"`{r['method']}`",
        "order": lambda r: "whole" if r["whole"] else f"best {r['keep']:.0%}",
        "time over a prefill's": _spread,
        "peak MiB": lambda r: _mib(r["peak_bytes"]),
    }
    target = _met(rows, lambda r: r["ratio"] <= 1, "at most the time of one prefill")
    memory = _met(rows, lambda r: r["peak_bytes"] <= 2**30, "at most 1 GiB")
    return target + memory + _table(columns, rows)


def _serving(rows: list[dict]) -> str:
    columns: Columns = {
        "requests at a time": lambda r: r["concurrency"],
        "layers": lambda r: r["layers"],
        "hidden size": lambda r: r["hidden"],
        "visual tokens": lambda r: r["n_visual"],
        "kept": lambda r: f"{100 * r['keep']:.0f} %, {r['method']}",
        "prompt": lambda r: f"{r['prompt_tokens']['pruned']} for {r['prompt_tokens']['full']}",
        "new tokens": lambda r: r["new_tokens"],
        "throughput over the full model's": lambda r: _spread(r, "throughput", 2),
    }
    servers = f"vLLM {rows[0]['vllm']}, with as many threads as its servers take by themselves."
    return f"{servers}\n\n{_table(columns, rows)}"


#: {benchmark: (heading, its table)}, in the page's order.
TABLES: dict[str, tuple[str, Callable[[list[dict]], str]]] = {
    "prediction": ("Predicted and measured", _prediction),
    "speedup": ("Realised speed-up", _speedup),
    "overhead": ("What `vispco.apply` itself costs", _overhead),
    "host": ("What pruning asks of the host", _host),
    "against": ("Against other ways to prune", _against),
    "search_cost": ("What a step of the search costs", _search_cost),
    "frontier_cost": ("What a frontier costs", _frontier_cost),
    "ranking": ("What ranking costs", _ranking),
    "serving": ("Served by vLLM", _serving),
}


def load(folder: Path) -> list[tuple[str, dict]]:
    """(benchmark, what it wrote) of each file, in the page's order.

    Raises ValueError for a folder or file without figures.
    """

    def result(data) -> dict:
        if not isinstance(data, dict) or not data.get("figures"):
            raise ValueError("this is not what a benchmark wrote: it has no figures")
        return data

    found = [
        (path.stem.split("-")[0], read_json(path, result)) for path in sorted(folder.glob("*.json"))
    ]
    if not found or {name for name, _ in found} - TABLES.keys():
        raise ValueError(
            f"{folder}: expected files named {', '.join(TABLES)}, "
            "or one of these, a hyphen and more"
        )
    return sorted(found, key=lambda pair: list(TABLES).index(pair[0]))


def on_a_gpu(data: dict) -> str:
    """The short table: a row for each prompt whose time to first token is known."""
    parts = {name: part.get("figures", ()) for name, part in data["parts"].items()}
    columns: Columns = {
        "model": lambda r: r["full"]["model"],
        "visual tokens": lambda r: f"{r['full']['n_visual']:,}",
        "batch": lambda r: r["full"]["batch"],
        "full prefill, ms": lambda r: f"{r['full']['ms']:.0f}",
        "GPU busy, at least": lambda r: f"{r['busy']:.0%}" if "busy" in r else "–",
        **{f"{share} %": lambda r, name=f"{share}%": _faster(r[name]) for share in (50, 25, 10)},
        "DivPrune, 25 %": lambda r: _faster(r["features"]),
        "tower, ms": lambda r: f"{r['full']['tower_ms']:.0f}",
        "25 %, with the tower": lambda r: _faster(r["25%"]["with_tower"]),
    }
    rows = []
    for name, figures in parts.items():
        if figures and name.startswith("first-token"):
            rows.append({row["schedule"]: row for row in figures})
            for row in parts.get(name.replace("first-token", "profile"), ()):
                if row["schedule"] == "full":
                    rows[-1]["busy"] = row["busy"]
    return _table(columns, rows)


def _faster(row: dict) -> str:
    return f"{row['speedup']:.2f} ({row['flops_ratio']:.2f})"


def _made_by(result: dict) -> str:
    machine, versions = result["machine"], result["versions"]
    where = machine["name"]
    if machine["device"] != "cuda":
        where = f"CPU ({where}), {machine['threads']} thread(s)"
    return (
        f"`{result['command']}`: seed {result['seed']}, {result['rounds']} rounds, "
        f"{result['dtype']}, {result['attention']}, {result['clock']}; {where}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}."
    )


def tables(results: Sequence[tuple[str, dict]]) -> str:
    """Everything below the marker."""

    def parts() -> Iterator[str]:
        for name, (title, table) in TABLES.items():
            own = [result for other, result in results if other == name]
            if own:
                yield f"## {title}"
            for result in own:
                yield _made_by(result)
                yield table(result["figures"])

    return "\n" + "\n\n".join(parts()) + "\n"


def picture(rows: Sequence[dict]) -> bytes:
    """Predicted against measured share of the full model's time, as SVG.

    There is a panel for each length of the answer.
    """

    def prompt(row: dict) -> tuple:
        return row["model"], row["layers"], row["n_visual"], row["batch"]

    answers = sorted({r["new_tokens"] for r in rows})
    prompts = list(dict.fromkeys(map(prompt, rows)))

    top = 1.05 * max(1.0, *(r["high"] for r in rows))
    models = ", ".join(dict.fromkeys(f"{row['model']} ({row['layers']} layers)" for row in rows))

    def draw(figure) -> None:
        figure.suptitle(f"model: {models}", x=0.012, ha="left", fontsize=11)
        panels = figure.subplots(1, len(answers), squeeze=False, sharex=True, sharey=True)[0]
        for axes, tokens in zip(panels, answers, strict=True):
            axes.plot([0, 1.05], [0, 1.05], color="#8a8a8a", linewidth=1, label="as predicted")
            for i, key in enumerate(prompts):
                mine = [r for r in rows if r["new_tokens"] == tokens and prompt(r) == key]
                mine.sort(key=lambda r: r["predicted"])
                below = [r["measured"] - r["low"] for r in mine]
                above = [r["high"] - r["measured"] for r in mine]
                axes.errorbar(
                    [r["predicted"] for r in mine],
                    [r["measured"] for r in mine],
                    [below, above],
                    color=COLOURS[i % len(COLOURS)],
                    linewidth=1,
                    marker=MARKERS[i % len(MARKERS)],
                    capsize=2,
                    label=f"{key[2]} visual tokens",
                )
            whole = f"a whole answer of {tokens} tokens"
            axes.set_title("to the first token" if tokens == 1 else whole)
            axes.set(xlabel="predicted time over the full model's", xlim=(0, 1.05), ylim=(0, top))
            percents(axes.xaxis), percents(axes.yaxis)
        panels[0].set_ylabel("measured time over the full model's")
        panels[0].legend(loc="upper left")

    return render(draw, 4.2 * len(answers), 4.1, "svg")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the documentation")
    try:
        docs = parser.parse_args(argv).docs
        require_matplotlib()
        results, text = load(docs / FOLDER), (docs / PAGE).read_text(encoding="utf-8")
        gpu = read_json(docs / GPU, checked)
        begin, end = GPU_MARKERS
        found = re.fullmatch(f"(.*{begin}).*({end}.*{MARKER}).*", text, re.DOTALL)
        if not found:
            expected = ", ".join(marker.strip() for marker in (*GPU_MARKERS, MARKER))
            raise ValueError(f"{docs / PAGE}: expected the lines {expected}")
        write_text((docs / GPU).with_suffix(".md"), gpu_page.page(gpu))
        predictions = [result for name, result in results if name == "prediction"]
        if rows := [row for result in predictions for row in result["figures"]]:
            write_text(docs / FOLDER / "prediction.svg", picture(rows))
        above, between = found.groups()
        write_text(docs / PAGE, f"{above}\n{on_a_gpu(gpu)}\n\n{between}{tables(results)}")
        return 0
    except SystemExit as stop:
        return stop.code or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}".splitlines()[0], file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
