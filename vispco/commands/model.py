"""The model that `--model` names, and its processor."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

import torch

from .. import testbed
from ..registry import adapter_for
from ..utils.files import brief


def load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """(model in eval mode, processor): of the testbed, of a local folder, or by name.

    Weights are read from safetensors only, and no code is run that comes with them unless
    `--trust-remote-code` is given. Raises ValueError that names the model.
    """
    name = options.model
    best = "cuda" if torch.cuda.is_available() else "cpu"
    place = options.device or best
    if is_testbed(name):
        model, processor = testbed.load(name)
        if options.dtype != "auto":
            model = model.to(getattr(torch, options.dtype))
        return model.to(best if place == "auto" else place), processor
    check_name(name)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    local = os.path.isdir(name)
    common = {"trust_remote_code": options.trust_remote_code, "local_files_only": local}
    spread = {"device_map": "auto"} if place == "auto" else {}
    how = {"use_safetensors": True, "output_loading_info": True, "dtype": options.dtype}
    try:
        _check_size(name, common)
        processor = AutoProcessor.from_pretrained(name, **common)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(name, **how, **spread, **common)
        model, found = loaded
        # transformers would fill in missing weights with random numbers.
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"its files lack {len(missing)} of its weights, such as {missing[0]}")
    except Exception as error:  # anything may be wrong with a folder, or with the network
        hint = "; with --trust-remote-code it may" if "trust_remote_code" in str(error) else ""
        what = f"no image-text-to-text model could be loaded{hint}: {brief(error)}"
        raise ValueError(f"{name}: {what}") from error
    adapter_for(model)
    return (model if spread else model.to(place)).eval(), processor


def _check_size(folder: str, common: dict[str, Any]) -> None:
    """Refuse sizes that the weights on disk cannot have.

    transformers would make the weights that are missing, however much memory that takes.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    stored = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    # A name, or nothing to load: transformers knows.
    if not stored:
        return
    config = AutoConfig.from_pretrained(folder, **common)
    trust = common["trust_remote_code"]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust)
    weights = sum(weight.numel() for weight in model.parameters())
    # A weight has 2 bits when quantized, else 8 or more; tied embeddings are counted twice.
    per_byte = 4 if hasattr(config, "quantization_config") else 1.3
    if weights > stored * per_byte:
        raise ValueError(
            f"its config.json describes {weights:,} weights, which its {stored:,} bytes of "
            "safetensors cannot hold"
        )


def is_testbed(name: str) -> bool:
    """Whether the model ships with vispco."""
    return name == "testbed" or name in testbed.MODELS


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is a folder, or looks like OWNER/MODEL."""
    if not Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ValueError(
            f"unknown model {name!r}: expected testbed, {', '.join(testbed.MODELS)}, a local "
            "folder with a Hugging Face model, or its name OWNER/MODEL"
        )
