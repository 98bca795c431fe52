"""`write_report`: frontier, table, schedules, kept tokens and the course of a search on one HTML page.

The page needs no network and no script. Everything that came from data passes through `html.escape`; what did not is
written here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..config import PruningConfig
from ..utils.console import budget_text, flops, percent, tokens
from ..utils.files import write_text
from ..frontier import Frontier
from .convergence import plot_convergence
from .figure import require_matplotlib
from .frontiers import plot_frontier
from .svg import drawn

_STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem }
table { border-collapse: collapse; font-size: .9rem } .wide { overflow-x: auto }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td, dd { overflow-wrap: anywhere } pre { background: #f4f4f4; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere }
svg { width: 100%; height: auto } .note { color: #555 }"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Overlay:
    """A calibration question, and how to draw the tokens that are kept of its picture: `draw(path)` writes an SVG."""

    title: str
    draw: Callable[[Path], None]


def write_report(path: str | os.PathLike, frontier: Frontier, steps: Sequence[Mapping] = (), command: str = "",
                 overlays: Sequence[Overlay] = (), note: str = "") -> None:
    """Write the page, atomically. Without matplotlib it has no pictures, and says so.

    steps: the search's log, a mapping a step. command: what was typed. note: why there are no overlays, if so.
    Raises OSError if the page cannot be written.

    >>> import tempfile
    >>> from vispco import FrontierPoint, PruningConfig
    >>> frontier = Frontier([FrontierPoint(PruningConfig("fastv", [1, .5]), 0.75, 1e9, 0.75, 0.1)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(f"{folder}/report.html", frontier, command="vispco search")
    """
    try:
        require_matplotlib()
        missing = ""
    except ImportError as error:
        missing = str(error)
    parts = [_frontier(frontier, missing), _section("Configurations", _table(frontier)),
             _overlays(overlays, note, missing), _convergence(steps, missing),
             _section("How it was made", _made(frontier.meta, command))]
    title = _text(f"vispco: {frontier.meta.get('method', 'a search')} on {frontier.meta.get('model', 'a model')}")
    write_text(path, f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
                     f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
                     f'<meta name="viewport" content="width=device-width">\n<title>{title}</title>\n'
                     f"<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
                     + "\n".join(parts) + "\n</body>\n</html>\n")


def _text(text: object) -> str:
    """As HTML that shows it: no tags, no quotes that end an attribute, no control characters."""
    return escape("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in str(text)))


def _section(title: str, *parts: str) -> str:
    return f"<h2>{_text(title)}</h2>\n" + "\n".join(parts)


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _picture(draw: Callable[[Path], None], prefix: str, description: str, missing: str) -> str:
    """The drawing, or the reason why there is none."""
    if missing:
        return _note(f"No picture: {missing}")
    try:
        return f"<figure>{drawn(draw, prefix, description)}</figure>"
    except (ValueError, OSError) as error:
        return _note(f"No picture: {error}")


def _frontier(frontier: Frontier, missing: str) -> str:
    about = ("Left: how far each configuration is from the full model, against what it costs, on the calibration questions "
             "themselves (vispco evaluate measures it on others). Right: the visual tokens that enter each layer.")
    return _section("Frontier and schedules", _picture(lambda path: plot_frontier(frontier, path), "frontier",
                                                       "frontier and schedules", missing), _note(about))


def _table(frontier: Frontier) -> str:
    name = "task loss" if frontier.meta.get("objective") == "task" else "KL"
    measured = sorted({k for p in frontier.points for k, v in p.metrics.items() if isinstance(v, float)})
    header = ["budget", "FLOPs", "share", "visual tokens entering each layer", name, *measured]
    rows = [[budget_text(p.budget), flops(p.flops), percent(p.share), _entering(p.config),
             f"{p.loss:.4f}", *(_decimals(p.metrics.get(m)) for m in measured)] for p in frontier.points]
    return _rows(header, rows, numbers={1, 2, *range(4, len(header))})


def _decimals(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "" if value is None else str(value)


def _entering(config: PruningConfig) -> str:
    """Counts, or shares where the configuration does not say of how many."""
    return tokens(config.tokens(config.n_visual)) if config.n_visual else " ".join(percent(r, 0) for r in config.keep_ratios)


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f'<td class="n">{_text(c)}</td>' if i in numbers else f"<td>{_text(c)}</td>"
                                      for i, c in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def _overlays(overlays: Sequence[Overlay], note: str, missing: str) -> str:
    parts = [f"<h3>{_text(o.title)}</h3>\n" + _picture(o.draw, f"tokens-{i}", f"kept tokens: {o.title}", missing)
             for i, o in enumerate(overlays)]
    return _section("Kept tokens", *(parts or [_note(note or "None were drawn.")]))


def _convergence(steps: Sequence[Mapping], missing: str) -> str:
    steps, tried = [s for s in steps if "step" in s], {str(s["budget"]): s for s in steps if "schedule" in s}
    refined = [_note("Refinement: schedules measured on all calibration data, and the best loss after them."),
               _rows(["budget", "schedules", "loss"],
                     [[budget_text(s["budget"]), s["schedule"], f"{s['best']:.4g}"] for s in tried.values()], {1, 2})] if tried else []
    if not steps:
        return _section("Convergence", _note("No gradient step was made: none was asked for, or every budget pays for all tokens."),
                        *refined)
    last = {str(s["budget"]): s for s in steps}
    columns = [c for c in ("loss", "violation", "multiplier", "penalty", "gradient") if all(c in s for s in last.values())]
    rows = [[budget_text(s["budget"]), s["step"] + 1, *(f"{s[c]:.4g}" for c in columns)] for s in last.values()]
    return _section("Convergence", _note("The augmented Lagrangian, step by step; below, its last step for each budget."),
                    _picture(lambda path: plot_convergence(steps, path), "steps", "convergence of the search", missing),
                    _rows(["budget", "steps", *columns], rows, set(range(1, 2 + len(columns)))),
                    *refined)


def _made(meta: Mapping[str, Any], command: str) -> str:
    rows = [[name, value if isinstance(value, str) else ", ".join(f"{k} {v}" for k, v in value.items())
             if isinstance(value, Mapping) else json.dumps(value)]
            for name, value in meta.items() if name != "competitors"]
    typed = f"<pre>{_text(command)}</pre>\n" if command else ""
    return typed + _rows(["setting", "value"], rows)
