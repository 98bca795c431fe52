"""The plug-in for vLLM: a server of any of `MODELS` prunes what it sees.

    VISPCO_CONFIG=config.json vllm serve llava-hf/llava-1.5-7b-hf

Without that variable vLLM is as it was.
"""

from __future__ import annotations

import os
from typing import Any

from ...config import PruningConfig
from ...reading.structure import depth
from ..serving import OneDrop

#: The environment variable that names the configuration's file.
VARIABLE = "VISPCO_CONFIG"
#: Architectures that are pruned, by vLLM's name, and their classes in `.models`.
MODELS = {
    "LlavaForConditionalGeneration": "Llava",
    "Qwen2_5_VLForConditionalGeneration": "Qwen25VL",
    "Qwen3VLForConditionalGeneration": "Qwen3VL",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3VLMoe",
}


def register() -> None:
    """What vLLM calls in each of its processes, by the entry point `vllm.general_plugins`.

    Raises ValueError for a configuration that cannot be served, FileNotFoundError if there is none.
    """
    if not os.environ.get(VARIABLE):
        return
    configured()
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .checks import CHECKS, Refused

    for name in ModelRegistry.get_supported_archs():
        MODELS_CONFIG_MAP[name] = CHECKS.get(name, Refused)
    for name, cls in MODELS.items():
        ModelRegistry.register_model(name, f"{__name__}.models:{cls}")


def configured() -> tuple[PruningConfig, OneDrop]:
    """The configuration that `VARIABLE` names, and its one drop.

    Raises ValueError if it cannot be served, FileNotFoundError if there is no such file.
    """
    path = os.environ[VARIABLE]
    config = PruningConfig.load(path)
    try:
        return config, OneDrop.of(config)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}={path}: {error}") from error


def check_model(config: PruningConfig, model: Any) -> None:
    """Raise ValueError unless `config` is for the model of this configuration of transformers."""
    layers = depth(model)
    if config.num_layers != layers:
        raise ValueError(
            f"{VARIABLE}: the configuration has {config.num_layers} keep_ratios, but the model has "
            f"{layers} decoder layers: search one for this model, or give one ratio per layer"
        )
    if config.model_type not in (None, model.model_type):
        raise ValueError(
            f"{VARIABLE}: the configuration was made for model type {config.model_type!r}, this is "
            f"{model.model_type!r}: search one for this model, or set model_type to null to serve "
            "it all the same"
        )
