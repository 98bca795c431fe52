"""What the search has to beat: searchers at equal cost, grids, rules, smaller pictures, presets."""

from .downsample import evaluate_downsampled as evaluate_downsampled
from .grids import (
    paper_grid as paper_grid,
    published as published,
    single_layer_grid as single_layer_grid,
)
from .presets import Preset as Preset
from .rules import fitprune_schedule as fitprune_schedule, vtw_schedule as vtw_schedule
from .searchers import (
    SEARCHERS as SEARCHERS,
    greedy_layers as greedy_layers,
    nsga2 as nsga2,
    nsga2_frontier as nsga2_frontier,
    random_schedules as random_schedules,
    random_search as random_search,
    tpe as tpe,
)
