"""Tower and projector, counted on a blank model as they make features of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .blank import Blueprint, Counting, Spent, blank, counting


class Vision(NamedTuple):
    """FLOPs of tower and projector.

    tokens: number of visual tokens that come out; 0 if they are not what the decoder takes.
    """

    tower: int
    projector: int
    tokens: int


def count_vision(blueprint: Blueprint, tower: str, pixels: Mapping[str, Tensor]) -> Vision:
    """Counted as `get_image_features(**pixels)` runs.

    tower: name of the tower's module, see `TowerSpent`. pixels: of those that are floating-point
    numbers, only the shapes matter.
    Raises ValueError if the model cannot be built or run.
    """
    given = []
    for name, x in pixels.items():
        numbers = None if x.is_floating_point() else tuple(x.flatten().tolist())
        given.append((name, tuple(x.shape), numbers))
    return _counted(blueprint, tower, tuple(given))


@lru_cache(maxsize=1024)
def _counted(blueprint: Blueprint, tower: str, given: tuple) -> Vision:
    pixels = {
        name: blank(*shape) if numbers is None else torch.tensor(numbers).view(shape)
        for name, shape, numbers in given
    }
    model = blueprint.model()
    owner = model.base_model if hasattr(model.base_model, "get_image_features") else model
    with blueprint.explained(), counting() as counter, TowerSpent(model, tower, counter) as spent:
        out = owner.get_image_features(**pixels)
    features = getattr(out, "pooler_output", None)
    made = [x for x in tree_leaves(out if features is None else features) if x is not None]
    width = model.get_input_embeddings().weight.shape[-1]
    fits = all(isinstance(x, Tensor) and x.shape[-1] == width for x in made)
    tokens = sum(x.numel() // width for x in made) if fits else 0
    own = spent.total(counter.total)
    return Vision(own, counter.total - own, tokens)


class TowerSpent(ExitStack):
    """Within it, what a model's tower spends is noted.

    The tower is the first module of this name, or else what the model calls its encoder of images.
    What it holds under a name with "merger" in it belongs to the projector.
    """

    def __init__(self, model: Any, name: str, counter: Counting):
        super().__init__()
        tower = _tower(model, name)
        parts = [] if tower is None else [tower, *_mergers(tower)]
        self._spent = [Spent(counter, part) for part in parts]
        for spent in self._spent:
            self.callback(spent.remove)

    def total(self, everything: int) -> int:
        """FLOPs of the tower, of all that was spent on vision; all of it if no tower is found."""
        if not self._spent:
            return everything
        whole, *mergers = (spent.total for spent in self._spent)
        return whole - sum(mergers)


def _tower(model: Any, name: str) -> nn.Module | None:
    named = (x for path, x in model.named_modules() if path.rpartition(".")[2] == name)
    found = next(named, None)
    return model.get_encoder(modality="image") if found is None else found


def _mergers(tower: nn.Module) -> list[nn.Module]:
    """The outermost modules whose names have "merger" in them. A list of modules does not run."""
    found: dict[str, nn.Module] = {}
    for path, module in tower.named_modules():
        within = any(path.startswith(f"{outer}.") for outer in found)
        if "merger" in path and not within and not isinstance(module, nn.ModuleList):
            found[path] = module
    return [*found.values()]
