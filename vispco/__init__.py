"""vispco: visual token pruning configuration optimisation.

Find how many visual tokens each layer of a vision-language model needs, for a range of compute
budgets, and deploy the result:

    frontier = vispco.search(model, batches, method="fastv", budgets=[0.2, 0.5, 0.8])
    with vispco.apply(model, frontier.at(0.5).config):
        model.generate(**inputs)
"""

# First, because it says so if transformers is too old.
from .utils.version import __version__ as __version__  # isort: skip

from . import methods as methods, models as models, pareto as pareto
from .baselines import (
    Preset as Preset,
    evaluate_downsampled as evaluate_downsampled,
    fitprune_schedule as fitprune_schedule,
    vtw_schedule as vtw_schedule,
)
from .baselines.presets import presets as presets
from .config import PruningConfig as PruningConfig
from .evaluate import Record as Record, evaluate as evaluate
from .flops import count_flops as count_flops
from .frontier import Frontier as Frontier, FrontierPoint as FrontierPoint
from .kernels import Kernel as Kernel
from .latency.table import LatencyTable as LatencyTable
from .methods import Method as Method
from .models import Adapter as Adapter
from .profiling import Profile as Profile, profile as profile
from .pruning import apply as apply
from .pruning.context import Context as Context
from .registry import (
    list_adapters as list_adapters,
    list_kernels as list_kernels,
    list_methods as list_methods,
    register_adapter as register_adapter,
    register_kernel as register_kernel,
    register_method as register_method,
)
from .search import (
    BeforeLLM as BeforeLLM,
    Gradient as Gradient,
    Profiled as Profiled,
    ProfiledFrontier as ProfiledFrontier,
    Ramp as Ramp,
    SearchOptions as SearchOptions,
    Shared as Shared,
    SharedFrontier as SharedFrontier,
    search as search,
)


def __dir__() -> list[str]:
    """The interface, without the modules that it is made of."""
    modules = {"data", "kernels", "methods", "models", "pareto", "plot", "testbed"}
    public = {name: value for name, value in globals().items() if not name.startswith("_")}
    shown = (name for name, value in public.items() if name in modules or not _is_module(value))
    return [*sorted(shown), "__version__"]


def _is_module(value: object) -> bool:
    return isinstance(value, type(methods))
