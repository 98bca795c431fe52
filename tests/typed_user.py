"""What a user writes, for mypy alone.

`assert_type` fails where a public name has lost its type to Any.
"""

# mypy: disallow-untyped-calls, disallow-untyped-decorators
# mypy: disallow-subclassing-any, disallow-untyped-defs

from torch import Tensor, nn
from typing_extensions import assert_type

import vispco


@vispco.register_method("key_norm")
class KeyNorm(vispco.Method):
    """A method of the user's own."""

    def score(self, ctx: vispco.Context) -> Tensor:
        """The largest key norm first."""
        keys = assert_type(ctx.keys(), Tensor)
        return assert_type(keys.square().sum(-1).mean(1)[ctx.visual], Tensor)


def use(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """From a search to tokens kept, through files."""
    assert_type(vispco.register_method("again", KeyNorm), type[KeyNorm])
    frontier = assert_type(
        vispco.search(model, batches, method="key_norm", budgets=[0.2, 0.5]), vispco.Frontier
    )
    frontier.save("frontier.json")
    point = assert_type(vispco.Frontier.load("frontier.json").at(0.5), vispco.FrontierPoint)
    config = assert_type(vispco.PruningConfig.load("config.json"), vispco.PruningConfig)
    with vispco.apply(model, point.config) as pruner:
        assert_type(pruner.kept(), dict[int, Tensor])
    pruner.remove()
    assert_type(vispco.evaluate(model, batches, config).accuracy, float)
    assert_type(vispco.count_flops(model, config, 576, 32).total, int)
    shared = vispco.search(model, batches, budgets=(), start=vispco.Shared())
    assert isinstance(shared, vispco.SharedFrontier)
    assert_type(shared.frontier([0.3]), vispco.Frontier)
    assert_type(vispco.presets("fastv", 32), dict[str, vispco.Preset])
    assert_type(vispco.LatencyTable.load("table.json").seconds, tuple[float, ...])
    assert_type(vispco.pareto.hypervolume([(1, 2)], (3, 3)), float)
    assert_type(vispco.list_methods(), list[str])
