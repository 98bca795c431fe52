"""Where a loaded model keeps its decoder: read off its modules, whatever its family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

#: Usual names of vision towers.
TOWERS = ("vision_tower", "vision_model", "visual")


def first(config: Any, names: Iterable[str], default: Any = None) -> Any:
    """The first of these attributes of `config` that is there and not None, or `default`."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), default)


def depth(config: Any) -> int | None:
    """Number of decoder layers that a model's configuration names."""
    return first(config.get_text_config(decoder=True), ["num_hidden_layers", "layers"])


def find_decoder(model: Any) -> tuple[Any, Any]:
    """The decoder of a vision-language model, and the list of its layers.

    The layers are the list of as many modules as the configuration names. Vision towers have such
    lists, too. The decoder's is next to the embeddings of the text, or within `get_decoder()`.
    Raises ValueError if there is no such list.
    """
    size = depth(model.config)
    embeddings = model.get_input_embeddings()
    lists = [(owner, each) for owner, each in _lists(model) if len(each) == size]
    beside = [pair for pair in lists if _holds(pair[0], embeddings)]
    decoder = getattr(model, "get_decoder", lambda: None)() or model
    within = [pair for pair in lists if _holds(decoder, pair[1])]
    # Of several, the innermost: an owner of owners comes first.
    found = next((pairs for pairs in (beside, within) if pairs), None)
    if found is None or (found is within and len(within) > 1):
        raise ValueError(
            f"{type(model).__name__} has {len(lists)} lists of {size} layers, and none is known to "
            "be its decoder's: say it in an adapter (`find_decoder`), registered with "
            "vispco.register_adapter()"
        )
    return found[-1]


def _lists(model: nn.Module) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    for owner in model.modules():
        for child in owner.children():
            if isinstance(child, nn.ModuleList):
                yield owner, child


def _holds(owner: nn.Module, module: Any) -> bool:
    return any(each is module for each in owner.modules())


def find_tower(model: Any, name: str = "") -> nn.Module | None:
    """The vision tower: the first module of that name, or of a usual one; None if there is none.

    Or else what the model calls its encoder of images.
    """
    names = [name] if name else TOWERS
    named = (x for path, x in model.named_modules() if path.rpartition(".")[2] in names)
    found = next(named, None)
    if found is None and hasattr(model, "get_encoder"):
        found = model.get_encoder(modality="image")
    return None if found is model else found
