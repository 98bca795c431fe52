"""Models that are split over processes: which of them can be pruned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, distributed, nn

_ADVICE = "load it whole in each process, or shard it with FSDP2 (fully_shard)"


def check_sharding(model: Any) -> None:
    """Raise ValueError for a model whose processes would not keep the same tokens.

    With tensor parallelism, each process has the attention of its own heads, and would rank by it.
    """
    if _has_parts(model):
        raise ValueError(
            f"{type(model).__name__} is sharded by tensor parallelism: each process sees the "
            f"attention of its own heads, and would keep other tokens than the others; {_ADVICE}"
        )
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise ValueError(
            f"DeepSpeed holds the weights of {type(model).__name__}, and pruning is not tested "
            f"with it; {_ADVICE}"
        )


def _has_parts(model: nn.Module) -> bool:
    """Whether weights are split over processes, and not put together again before they are used."""
    return any(True for _ in split_weights(model)) or (getattr(model, "_tp_size", None) or 1) > 1


def split_weights(model: nn.Module) -> Iterator[Tensor]:
    """The weights of which each process uses its own part: those of tensor parallelism.

    FSDP2 splits weights, too, but each process uses them whole.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    whole = {
        id(weight)
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for weight in module.parameters()
    }
    for weight in model.parameters():
        if not isinstance(weight, DTensor):
            continue
        # A mesh of two dimensions is one of both kinds.
        shared = id(weight) in whole and weight.device_mesh.ndim == 1
        if not shared and any(place.is_shard() for place in weight.placements):
            yield weight
