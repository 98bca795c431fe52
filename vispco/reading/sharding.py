"""Models that are split over processes: which of them can be pruned, and how they are split.

FSDP2 puts weights together before they are used: each process computes with all of them. With
tensor parallelism, each process computes the attention of its own heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

_ADVICE = "load it whole in each process, or shard it with FSDP2 (fully_shard)"


def heads_group(model: Any) -> Any:
    """The group of processes over which a model's attention heads are split; None: they are not.

    Raises ValueError for a model that is split in a way that pruning does not know.
    """
    name, split = type(model).__name__, list(split_weights(model))
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise ValueError(
            f"DeepSpeed holds the weights of {name}, and pruning is not tested with it; {_ADVICE}"
        )
    config = getattr(model.config, "distributed_config", None)
    others = {
        "pipeline parallelism": (getattr(config, "pp_size", None) or 1) > 1,
        "expert parallelism": (getattr(config, "ep_size", None) or 1) > 1,
        "sequence parallelism": bool(getattr(config, "enable_sequence_parallel", False)),
        # Early releases of transformers do not say which weights are split.
        "tensor parallelism": not split and (getattr(model, "_tp_size", None) or 1) > 1,
    }
    for kind, used in others.items():
        if used:
            raise ValueError(f"{name} is sharded by {kind}, which pruning does not know; {_ADVICE}")
    meshes: list[Any] = list({id(mesh): mesh for mesh in (w.device_mesh for w in split)}.values())
    if not meshes:
        return None
    if meshes[0].ndim == 1:
        return meshes[0].get_group()
    if "tp" not in (meshes[0].mesh_dim_names or ()):
        raise ValueError(
            f"{name} is sharded over a mesh of processes with dimensions "
            f"{meshes[0].mesh_dim_names}: call that of tensor parallelism 'tp'"
        )
    return meshes[0].get_group("tp")


def split_weights(model: nn.Module) -> Iterator[Any]:
    """The weights of which each process uses its own part: those of tensor parallelism."""
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


def all_heads(x: Tensor, dim: int, group: Any) -> Tensor:
    """`x`, which has this process's heads along `dim`, with those of all processes, in order."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, x, group)
    return torch.cat(parts, dim)


def agreed(x: Tensor, group: Any) -> Tensor:
    """The first process's `x`, in all processes of the group: no rounding may tell them apart."""
    x = x.contiguous()
    distributed.broadcast(x, distributed.get_global_rank(group, 0), group)
    return x
