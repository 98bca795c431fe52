"""`vispco.apply`: hooks in, hooks out."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PruningConfig, as_config
from ..registry import adapter_for, build_method
from .dropping import Dropping
from .masking import Masking
from .pruner import Pruner

#: The pruner of each mode.
MODES = {"deploy": Dropping, "search": Masking}


def apply(
    model: nn.Module,
    config: PruningConfig | str | os.PathLike,
    *,
    mode: str = "deploy",
    visual_mask: Tensor | None = None,
) -> Pruner:
    """Prune `model`'s visual tokens as `config` says.

    The model is pruned until the `with` block ends or `.remove()` is called. The handle that is
    returned says what it does when it is printed.

    model: any vision-language model whose decoder holds visual tokens, compiled or not. Inside, it
        runs as plain PyTorch. It may be wrapped by PEFT or DistributedDataParallel, or be the
        model of a pipeline of transformers.
    config: the configuration, or the path of its JSON file.
    mode: "deploy" (tokens physically dropped, KV cache shorter) or "search" (tokens masked; the
        same logits at the kept positions).
    visual_mask: (B, S) bool, which tokens of the prompt are visual, where the model is called with
        `inputs_embeds` and they cannot be told. For another prompt, set it on the handle.
    Raises ValueError if the configuration does not fit the model, or the model is pruned already;
    and for anything that is no configuration, such as a frontier, with what to pass instead.

    >>> import vispco
    >>> from vispco.testbed import load, batches
    >>> model, processor = load("testbed-llava")
    >>> layers = model.config.text_config.num_hidden_layers
    >>> config = vispco.PruningConfig.from_fastv(k=2, drop=0.5, num_layers=layers)
    >>> with vispco.apply(model, config):
    ...     logits = model(**batches("test", n=8, batch_size=8)[0]).logits
    >>> handle = vispco.apply(model, config)
    >>> handle
    LlavaForConditionalGeneration is pruned: fastv: layer 2 keeps 50.0 % (drops 50.0 %)
    >>> handle.remove(); handle
    LlavaForConditionalGeneration is not pruned now; a `with` block on this handle prunes it again
    """
    if mode not in MODES:
        raise ValueError(f"mode must be 'deploy' or 'search', got {mode!r}")
    if visual_mask is not None and not isinstance(visual_mask, Tensor):
        kind = type(visual_mask).__name__
        raise ValueError(f"visual_mask must be a tensor of bool, a row for each prompt, got {kind}")
    model, config = unwrapped(model), as_config(config)
    adapter = adapter_for(model)(model)
    check_fits(config, adapter)
    method = build_method(config.method, config.method_options)
    ratios = torch.tensor(config.keep_ratios, dtype=torch.float64)
    pruner = MODES[mode](adapter, method, ratios)
    pruner.visual_mask, pruner.says = visual_mask, config.describe()
    return pruner.install()


def unwrapped(model: Any) -> Any:
    """The model inside a pipeline, or what `torch.compile`, PEFT or DistributedDataParallel made.

    Raises ValueError for a DataParallel model, whose copies would share one pruner, for the
    wrappers of FSDP1 and DeepSpeed, and for what is no model, such as its name or configuration.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "a DataParallel model runs copies of itself in threads, and cannot be pruned: prune "
            "its .module on one device, or run one process per device"
        )
    # torch.compile
    if hasattr(model, "_orig_mod"):
        return unwrapped(model._orig_mod)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    kind = type(model)
    if kind.__name__ == "FullyShardedDataParallel" or kind.__module__.startswith("deepspeed."):
        raise ValueError(
            f"a {kind.__name__} model cannot be pruned: load it whole in each process, or "
            "shard it with FSDP2 (torch.distributed.fsdp.fully_shard)"
        )
    if kind.__module__.startswith("peft.") and hasattr(model, "get_base_model"):
        return unwrapped(model.get_base_model())
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        # A pipeline of transformers.
        return unwrapped(model.model)
    if not isinstance(model, nn.Module):
        if isinstance(model, PruningConfig):
            raise ValueError("expected a model, got a PruningConfig: the model comes first")
        # Says what is no model at all.
        adapter_for(model)
        raise ValueError(
            f"expected a model with its weights, got a {kind.__name__}: load the model"
        )
    return model


def check_fits(config: PruningConfig, adapter: Any) -> None:
    """Raise ValueError unless `config` can be applied to the adapter's model."""
    layers, model_type = len(adapter.layers), adapter.config.model_type
    if config.num_layers != layers:
        raise ValueError(
            f"the configuration has {config.num_layers} keep_ratios, but "
            f"{type(adapter.model).__name__} has {layers} decoder layers; search one for this "
            "model, or give one ratio per layer"
        )
    if config.model_type is not None and config.model_type != model_type:
        raise ValueError(
            f"the configuration was made for model type {config.model_type!r}, this is "
            f"{model_type!r}; search one for this model, or set model_type to None to apply it all "
            "the same"
        )
    first = adapter.first_layer(build_method(config.method, config.method_options))
    if min(config.keep_ratios[:first], default=1.0) < 1:
        raise ValueError(
            f"method {config.method!r} reads the attention of the layer before, so it cannot prune "
            f"before layer {first}: set keep_ratios[:{first}] to 1.0, or use a method that needs "
            "no attention"
        )
