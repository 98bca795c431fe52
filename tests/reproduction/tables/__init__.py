"""The page's tables, claim by claim."""

from collections.abc import Callable

from .base import Markdown
from .insight import convergence, estimators, kernels, transfer
from .rivals import cost, depth, hypervolume, percentile, winner

TABLES: dict[str, Callable[[dict, Markdown], list[str]]] = {
    "winner": winner,
    "hypervolume": hypervolume,
    "percentile": percentile,
    "cost": cost,
    "depth": depth,
    "kernels": kernels,
    "transfer": transfer,
    "convergence": convergence,
    "estimators": estimators,
}
