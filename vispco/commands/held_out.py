"""What a search's configurations do on its questions, and on others that were kept aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..calibration import prepare, run_teacher, shapes
from ..evaluate import Record, evaluate
from ..frontier import Frontier
from ..latency.table import LatencyTable, default_lengths
from ..utils.console import budget_text, percent, standard_error
from .progress import track

#: With fewer questions, a search fits the questions rather than the model.
FEW = 64
#: How far below the full model's accuracy a recommended configuration may be.
WITHIN = 0.01
#: A held-out KL above so many times the calibration's is a sign of it.
_TIMES = 2.0


def split(batches: Sequence[Mapping]) -> tuple[Sequence[Mapping], Sequence[Mapping]]:
    """The batches to search on, and a tenth of them, at least one, kept aside; of 5 or more.

    >>> [len(part) for part in split([{}] * 64)], [len(part) for part in split([{}] * 4)]
    ([58, 6], [4, 0])
    """
    aside = max(1, round(len(batches) / 10)) if len(batches) >= 5 else 0
    return batches[: len(batches) - aside], batches[len(batches) - aside :]


def measured(
    model: Any,
    frontier: Frontier,
    searched: Sequence[Mapping],
    aside: Sequence[Mapping],
    quiet: bool = False,
) -> Frontier:
    """The frontier with what its points do on both parts, and the time that they save, as metrics.

    searched: the batches of the search. aside: other batches, or none. The time is predicted from
    the decoder's, of a prompt of mean length, on this machine.
    """
    prepared = [run_teacher(model, prepare(model, part)) for part in (searched, aside) if part]
    configs = [None, *(point.config for point in frontier.points)]
    records = [
        [evaluate(model, part, config) for part in prepared]
        for config in track(configs, "measure", quiet)
    ]
    visual, text = shapes(prepared[0])
    lengths = default_lengths(int((visual + text).max()), 4)
    table = LatencyTable.measure(model, lengths, repeats=3)
    n_visual, n_text = (part.double().mean().round() for part in (visual, text))
    pairs = zip(frontier.points, records[1:], strict=True)
    points = [replace(point, metrics=_quality(found)) for point, found in pairs]
    counts = [torch.tensor(point.config.tokens(int(n_visual))) for point in points]
    full = {f"full_{name}": value for name, value in _quality(records[0]).items()}
    full |= {"held_out": records[0][1].n if aside else 0}
    full |= {"full_prefill_seconds": float(table.full(n_visual, n_text))}
    full |= {"prefill_seconds": [float(table(each, n_visual, n_text)) for each in counts]}
    best, right = None, _pooled(records[0])
    # Where nothing is right, nothing can get worse.
    if right:
        best = recommended([_pooled(found) for found in records[1:]], right)
    full |= {"recommended_budget": None if best is None else points[best].budget}
    return replace(frontier, points=points, meta={**frontier.meta, **full})


def _quality(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy and agreement by part; KL of what was held out."""
    found: dict[str, Any] = {}
    for name, record in zip(("calibration", "held_out"), records, strict=False):
        found |= {f"{name}_accuracy": record.accuracy, f"{name}_agreement": record.agreement}
    if len(records) > 1:
        found["held_out_kl"] = records[1].kl
    return found


def _pooled(records: Sequence[Record]) -> float:
    """Accuracy on the questions of several records together."""
    return sum(record.accuracy * record.n for record in records) / sum(r.n for r in records)


def recommended(accuracies: Sequence[float], full: float) -> int | None:
    """Which of these, cheapest first, is the first within a point of the full model's accuracy.

    >>> recommended([0.5, 0.9, 0.91], 0.905), recommended([0.5], 0.9)
    (1, None)
    """
    return next((i for i, found in enumerate(accuracies) if found >= full - WITHIN - 1e-9), None)


def verdict_of(frontier: Frontier) -> str:
    """What a search's frontier recommends, in a sentence."""
    meta = frontier.meta
    n, held = meta["samples"], meta["held_out"]
    right = n * meta["full_calibration_accuracy"] + held * meta.get("full_held_out_accuracy", 0.0)
    best = meta["recommended_budget"]
    return verdict(None if best is None else budget_text(best), right / (n + held), n + held)


def verdict(best: str | None, full: float, n: int) -> str:
    """What to deploy, in a sentence. best: its budget. full: accuracy on `n` questions."""
    error = 100 * standard_error(full, n)
    many = f"{n:,} question{'s' * (n != 1)}"
    about = f"the full model's {percent(full)} on {many} (standard error {error:.1f} points)"
    if not full:
        return (
            f"recommended: none by accuracy, as the full model answers none of {many} right, word "
            "for word; choose by the KL and the agreement with the full model"
        )
    if best is None:
        return f"recommended: none; no budget comes within 1 point of {about}: try larger ones"
    return f"recommended: budget {best}, the cheapest within 1 point of {about}"


def notes(frontier: Frontier) -> list[str]:
    """What a user should know before trusting the configurations."""
    meta, found = frontier.meta, []
    if meta["samples"] < FEW:
        found.append(
            f"{meta['samples']} question{'s are' if meta['samples'] != 1 else ' is'} few: the "
            f"configurations may fit these and no others; give {FEW} or more"
        )
    worse = [
        budget_text(point.budget)
        for point in frontier.points
        if meta.get("objective") == "kl"
        and point.metrics.get("held_out_kl", 0.0) > max(_TIMES * point.loss, point.loss + 0.02)
    ]
    if worse:
        found.append(
            f"the held-out KL is more than twice the calibration's at {', '.join(worse)}: more "
            "questions would help (--limit)"
        )
    return found
