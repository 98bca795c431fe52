"""`write_report`: a search on one HTML page: frontier, profile, kept tokens, course, settings.

The page needs no network and no script. All that came from data passes through `html.escape`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from ..frontier import Frontier
from ..profiling import Profile
from ..utils.console import budget_text, flops, percent
from ..utils.files import write_text
from .convergence import ALL, PANELS, plot_convergence
from .figure import require_matplotlib
from .frontiers import plot_frontier
from .profile import findings, losses_table, plot_profile
from .read import ranker
from .svg import drawn

_STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 68rem;
       margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem }
table { border-collapse: collapse; font-size: .9rem } .wide { overflow-x: auto }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd }
th, td { text-align: left; vertical-align: top } th { vertical-align: bottom }
.n { text-align: right; font-variant-numeric: tabular-nums } td.n { white-space: nowrap }
td, dd, pre { overflow-wrap: anywhere } .best { background: #eef6ee } p.best { padding: .8rem }
@media (max-width: 40rem) { body { margin: .5rem auto; padding: 0 .6rem } h1 { font-size: 1.5rem }
       table { font-size: .8rem } th, td { padding: .2rem .3rem }
       .picture { overflow-x: auto } .picture svg { width: 52rem } .small svg { width: 34rem } }
pre { background: #f4f4f4; padding: .8rem; white-space: pre-wrap }
svg { width: 100%; height: auto } figure { margin: 0 }
.note { color: #555 } .small { max-width: 46rem }"""
_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
_LEGEND = (
    "Left: how far each configuration is from the full model, against what it costs, on the "
    "calibration questions themselves (vispco evaluate measures it on others). "
    "Right: the visual tokens that enter each layer."
)
_PROFILE = (
    "The loss in nats, if all visual tokens enter the layers before k and a share of them, those "
    "that the method ranks first, the others. The stairs are the configurations: what counts is "
    "the colour where they step down. On the questions that the profile was measured on."
)
_COLUMNS = (
    "Accuracy and agreement: on the calibration questions; agreement: with the full model's "
    "answers; held out: on questions that the search did not see. FLOPs: of the language model's "
    "prefill. Time saved: of one prefill on the machine of the search{full}, predicted from the "
    "decoder's times alone. Budget and share: of the compute that pruning can save. KL: in nats."
)
#: The columns that decide, in this order; the others follow.
_DECISIVE = ("budget", "accuracy", "held-out accuracy", "agreement", "FLOPs saved", "time saved")
_NO_STEPS = "Nothing was searched step by step."
_STEPS = "The gradient, step by step; below, its last step for each budget."
_REFINED = "Refinement: schedules measured on all calibration data, and the best loss after them."


@dataclass(frozen=True)
class Overlay:
    """A calibration question. `draw(path)` writes an SVG of the tokens kept of its picture.

    answers: {who: answer}, such as of the full and of the pruned model.
    """

    title: str
    draw: Callable[[Path], None]
    answers: Mapping[str, str] = field(default_factory=dict)


def write_report(
    path: str | os.PathLike,
    frontier: Frontier,
    steps: Sequence[Mapping] = (),
    command: str = "",
    overlays: Sequence[Overlay] = (),
    note: str = "",
    profile: Profile | None = None,
    summary: Sequence[str] = (),
) -> None:
    """Write the page, atomically. Without matplotlib it has no pictures, and says so.

    steps: the search's log, a mapping a step. command: what was typed. note: why there are no
    overlays, if so. profile: what the search has measured of the model. summary: sentences that
    answer which budget to take.
    Raises OSError if the page cannot be written.

    >>> import tempfile
    >>> from vispco import FrontierPoint, PruningConfig
    >>> frontier = Frontier([FrontierPoint(PruningConfig("fastv", [1, .5]), 0.75, 1e9, 0.75, 0.1)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(f"{folder}/report.html", frontier, command="vispco search")
    """
    meta = frontier.meta
    curve = _picture(partial(plot_frontier, frontier), "frontier", "frontier and schedules")
    kept = [
        f"<h3>{_text(overlay.title)}</h3>\n{_answers(overlay.answers)}"
        + _picture(overlay.draw, f"tokens-{i}", f"kept tokens: {overlay.title}")
        for i, overlay in enumerate(overlays)
    ]
    sections = {
        "Which budget": [*map(_best, summary), _configurations(frontier), _columns(meta)],
        "Frontier and schedules": [curve, _note(_LEGEND)],
        **_profile(profile, frontier),
        "Kept tokens": kept or [_note(note or "None were drawn.")],
        "Convergence": _gradient(steps) + _refinement(steps) or [_note(_NO_STEPS)],
        "How it was made": [*[f"<pre>{_text(command)}</pre>"] * bool(command), _settings(meta)],
    }
    title = _text(
        f"vispco: {ranker(meta.get('method', 'a search'))} on {meta.get('model', 'a model')}"
    )
    body = "\n".join("\n".join([f"<h2>{name}</h2>", *parts]) for name, parts in sections.items())
    write_text(path, _PAGE.format(title=title, style=_STYLE, body=body))


def _text(text: object) -> str:
    """As HTML that shows it: no tags, no quotes that end an attribute, no control characters."""
    return escape("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in str(text)))


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _best(text: str) -> str:
    return f'<p class="best">{_text(text)}</p>'


def _answers(answers: Mapping[str, str]) -> str:
    """A table of who answered what."""
    return _table(["model", "answer"], [*answers.items()]) if answers else ""


def _picture(draw: Callable[[Path], Any], prefix: str, description: str) -> str:
    """The drawing, or the reason why there is none."""
    try:
        require_matplotlib()
        return f'<figure class="picture">{drawn(draw, prefix, description)}</figure>'
    except (ValueError, OSError, ImportError) as error:
        return _note(f"No picture: {error}")


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence],
    numbers: Collection[int] = (),
    best: int | None = None,
) -> str:
    """An HTML table. numbers: the columns that hold numbers, which go to the right.

    best: the row that stands out.
    """
    kinds = [' class="n"' if i in numbers else "" for i in range(len(header))]
    cells = zip(kinds, header, strict=True)
    lines = ["<tr>" + "".join(f"<th{kind}>{_text(cell)}</th>" for kind, cell in cells) + "</tr>"]
    for i, row in enumerate(rows):
        cells = zip(kinds, row, strict=True)
        line = "".join(f"<td{kind}>{_text(cell)}</td>" for kind, cell in cells)
        mark = ' class="best"' if i == best else ""
        lines.append(f"<tr{mark}>{line}</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table>\n{body}\n</table></div>'


def _configurations(frontier: Frontier) -> str:
    """The frontier's table: the columns that decide first, the recommended budget in colour."""
    meta = frontier.meta
    full = meta.get("full_flops")
    header, rows = frontier.header(), frontier.rows()
    header = ["time saved" if name == "saved" else name for name in header]
    if isinstance(full, int | float) and full > 0:
        header.append("FLOPs saved")
        for point, row in zip(frontier.points, rows, strict=True):
            row.append(percent(1 - point.flops / full))
    decisive = [name for name in _DECISIVE if name in header]
    order = [header.index(name) for name in decisive]
    order += [i for i, name in enumerate(header) if name not in decisive]
    budgets = [point.budget for point in frontier.points]
    best = meta.get("recommended_budget")
    return _table(
        [header[i] for i in order],
        [[row[i] for i in order] for row in rows],
        numbers=range(1, len(header)),
        best=budgets.index(best) if best in budgets else None,
    )


def _columns(meta: Mapping[str, Any]) -> str:
    """What the columns of that table mean."""
    full = meta.get("full_prefill_seconds")
    seconds = f", in all {_value('seconds', full)}" if isinstance(full, int | float) else ""
    return _note(_COLUMNS.format(full=seconds))


def _profile(profile: Profile | None, frontier: Frontier) -> dict[str, list[str]]:
    """The section about the model: picture, words and numbers; no section without a profile."""
    if profile is None:
        return {}
    said = findings(profile)
    configs = [replace(point.config, budget=point.budget) for point in frontier.points]
    draw = partial(plot_profile, profile, configs=configs)
    picture = _picture(draw, "profile", f"loss by layer and share of the tokens kept. {said[0]}")
    words = "".join(f"<li>{_text(sentence)}</li>" for sentence in said)
    header, rows = losses_table(profile)
    numbers = _table(header, rows, range(len(header)))
    parts = [f'<div class="small">{picture}</div>', _note(_PROFILE), f"<ul>{words}</ul>", numbers]
    return {"What your model does with its image": parts}


def _gradient(steps: Sequence[Mapping]) -> list[str]:
    """The course of the gradient, and its last step for each budget."""
    steps = [s for s in steps if "step" in s]
    if not steps:
        return []
    last = list({str(s.get("budget", ALL)): s for s in steps}.values())
    columns = [name for name in PANELS if all(name in s for s in last)]
    rows = []
    for s in last:
        numbers = [f"{s[name]:.4g}" for name in columns]
        rows.append([budget_text(s.get("budget", ALL)), s["step"] + 1, *numbers])
    header = ["budget", "steps", *columns]
    picture = _picture(partial(plot_convergence, steps), "steps", "convergence of the search")
    return [_note(_STEPS), picture, _table(header, rows, range(1, len(header)))]


def _refinement(steps: Sequence[Mapping]) -> list[str]:
    last = {str(s["budget"]): s for s in steps if "schedule" in s}
    rows = [
        [budget_text(s["budget"]), s["schedule"], f"{s['best']:.4g}"]
        for _, s in sorted(last.items())
    ]
    header = ["budget", "schedules", "loss, nats"]
    return [_note(_REFINED), _table(header, rows, {1, 2})] if rows else []


def _settings(meta: Mapping[str, Any]) -> str:
    rows = [[name, _value(name, v)] for name, v in meta.items() if name != "competitors"]
    return _table(["setting", "value"], rows)


def _value(name: str, value: Any) -> str:
    """A setting with its unit, which its name tells."""
    if value is None or isinstance(value, str):
        return value or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list) and name.endswith("seconds"):
        return ", ".join(_value(name, each) for each in value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and name.endswith("flops"):
        return flops(value)
    if number and name.endswith("seconds"):
        return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.3g} ms"
    if number and name.endswith(("accuracy", "agreement")):
        return percent(value)
    if number and float(value).is_integer():
        return f"{value:,.0f}"
    return json.dumps(value)
