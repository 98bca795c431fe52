"""The claims, in the order in which their pieces run: what one measures, the next finds in the
cache.
"""

from . import (
    convergence,
    cost,
    depth,
    estimators,
    hypervolume,
    kernels,
    percentile,
    transfer,
    winner,
)

CLAIMS = {
    "winner": winner,
    "percentile": percentile,
    "hypervolume": hypervolume,
    "cost": cost,
    "depth": depth,
    "kernels": kernels,
    "transfer": transfer,
    "convergence": convergence,
    "estimators": estimators,
}
