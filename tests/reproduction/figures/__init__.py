"""Figures of the results, as SVG and PNG; matplotlib is imported when the first one is drawn."""

from .base import Drawing as Drawing, render as render
from .frontiers import frontiers
from .insight import convergence, schedules, transfer
from .rivals import cost, depth, percentile
from .winner import winner

#: {claim: drawing}: each takes all results and yields (name of the file, what `render` draws).
FIGURES = {
    "winner": winner,
    "hypervolume": frontiers,
    "percentile": percentile,
    "cost": cost,
    "depth": depth,
    "kernels": schedules,
    "transfer": transfer,
    "convergence": convergence,
}
