"""Vision, counted on a blank model: tower, projector, and reading the tower's attention."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .blank import Blueprint, Counting, Spent, blank, counting
from .hearing import Hearing
from .structure import find_tower, first


class Vision(NamedTuple):
    """FLOPs of vision, None if they are not known.

    tower, projector: of each. reading: of q k^T of the layer of the tower whose attention methods
    read (`pruning._tower`); 0 if there is a class token, whose one row is not counted.
    tokens: visual tokens that come out; 0 if they are not what the decoder takes.
    """

    tower: int | None = None
    projector: int | None = None
    reading: int | None = None
    tokens: int = 0


def count_vision(blueprint: Blueprint, pixels: Mapping[str, Tensor]) -> Vision:
    """Counted as `get_image_features(**pixels)` runs.

    pixels: of floating-point numbers, only the shapes matter.
    Raises ValueError if the model cannot be built or run.
    """
    given = []
    for name, x in pixels.items():
        numbers = None if x.is_floating_point() else tuple(x.flatten().tolist())
        given.append((name, tuple(x.shape), numbers))
    return _counted(blueprint, tuple(given))


@lru_cache(maxsize=1024)
def _counted(blueprint: Blueprint, given: tuple) -> Vision:
    pixels = {
        name: blank(*shape) if numbers is None else torch.tensor(numbers).view(shape)
        for name, shape, numbers in given
    }
    adapter = blueprint.adapter()
    inner = hasattr(adapter.backbone, "get_image_features")
    owner = adapter.backbone if inner else adapter.model
    with blueprint.explained(), counting() as counter, _Watch(adapter, counter) as watch:
        out = owner.get_image_features(**pixels)
    features = getattr(out, "pooler_output", None)
    made = [x for x in tree_leaves(out if features is None else features) if x is not None]
    width = adapter.model.get_input_embeddings().weight.shape[-1]
    fits = all(isinstance(x, Tensor) and x.shape[-1] == width for x in made)
    return watch.found(counter.total, sum(x.numel() // width for x in made) if fits else 0)


def square_tile(blueprint: Blueprint) -> tuple[Tensor, int] | None:
    """A picture of the tower's own size, without numbers, and how many visual tokens it gives.

    None if the tower takes others, or if it gives other tokens than the decoder's.
    """
    v = getattr(blueprint.config, "vision_config", None)
    size, channels = getattr(v, "image_size", None), first(v, ["num_channels", "in_channels"], 3)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if not height or height != width:
        return None
    # Some models take the pictures of a batch, others those of each sample.
    for pictures in ((1,), (1, 1)):
        tile = torch.empty(*pictures, channels, height, width, device="meta")
        try:
            tokens = count_vision(blueprint, {"pixel_values": tile}).tokens
        except ValueError:
            continue
        if tokens:
            return tile, tokens
    return None


def count_sample(blueprint: Blueprint, inputs: Mapping[str, Any]) -> Vision:
    """Counted as the whole model runs on a processor's output for one sample.

    Raises ValueError if it is of several, or if the model cannot be built or run.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1:
        found = tuple(ids.shape) if isinstance(ids, Tensor) else ids
        expected = "a processor's output for one sample, with input_ids (1, length)"
        raise ValueError(f"inputs must be {expected}, got input_ids {found}")
    given = {name: _prepared(x) for name, x in inputs.items() if name != "labels"}
    adapter = blueprint.adapter()
    model, decoder = adapter.model, adapter.decoder
    # Where the whole backbone is the decoder, its tower is in it, too.
    language = [*adapter.layers] if decoder is model.base_model else [decoder]
    head = model.get_output_embeddings()
    with blueprint.explained(), counting() as counter, _Watch(adapter, counter) as watch:
        rest = [watch.spent_by(module) for module in (*language, head) if module is not None]
        model(**given)
    vision = counter.total - sum(spent.total for spent in rest)
    return watch.found(vision, int(adapter.visual_tokens(given).sum()))


def _prepared(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.float().cpu() if x.is_floating_point() else x.cpu()


class _Watch(ExitStack):
    """Within it, what the tower of a blank model spends is noted.

    The tower is the first module that has the adapter's name for it, or else what the model calls
    its encoder of images. What it holds under a name with "merger" in it belongs to the projector.
    """

    def __init__(self, adapter: Any, counter: Counting):
        super().__init__()
        self.counter, self.reading = counter, 0
        tower = find_tower(adapter.model, adapter.tower)
        parts = [] if tower is None else [tower, *_mergers(tower)]
        self._spent = [self.spent_by(part) for part in parts]
        try:
            read = [] if adapter.class_token(adapter.config) else adapter.vision_layer().modules()
        except (AttributeError, ValueError):
            read = []
        self.callback(Hearing(read, self._read).remove)

    def spent_by(self, module: nn.Module) -> Spent:
        """FLOPs that a module spends."""
        spent = Spent(self.counter, module)
        self.callback(spent.remove)
        return spent

    def _read(self, query: Tensor, key: Tensor, options: dict) -> None:
        self.reading += 2 * query.numel() * key.shape[-2]

    def found(self, total: int, tokens: int) -> Vision:
        """`total` that was spent on vision, in parts; all of it is the tower's if none is found."""
        whole, *mergers = [spent.total for spent in self._spent] or [total]
        return Vision(whole - sum(mergers), total - whole + sum(mergers), self.reading, tokens)


def _mergers(tower: nn.Module) -> list[nn.Module]:
    """The outermost modules whose names have "merger" in them. A list of modules does not run."""
    found: dict[str, nn.Module] = {}
    for path, module in tower.named_modules():
        within = any(path.startswith(f"{outer}.") for outer in found)
        if "merger" in path and not within and not isinstance(module, nn.ModuleList):
            found[path] = module
    return [*found.values()]
