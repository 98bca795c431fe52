"""All of a model but its weights: configuration and processor, read or refused in one line.

name: a folder, or OWNER/MODEL. common: what transformers is told of every file of the model,
`trust_remote_code` and `local_files_only`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from ..data.collate import check_kind
from ..data.stills import load_processor
from ..registry import adapter_for
from ..utils.files import brief

#: What a folder may hold in place of a model that can be loaded: files, and how to call them.
_OTHERS = {
    "adapter_config.json": "a PEFT adapter: merge it into its model (merge_and_unload), save that",
    "*.gguf": "GGUF weights",
    "*.onnx": "ONNX weights",
    "onnx/*.onnx": "ONNX weights",
    "pytorch_model*.bin": "pickled weights, which may run code when they are read",
    "*.pth": "pickled weights, which may run code when they are read",
}
_EXPECTED = "expected a model as save_pretrained writes it, with config.json and *.safetensors"
_LOADER = "AutoModelForImageTextToText"
# Of each line, a processor needs one file.
_READERS = {
    "processor_config.json or preprocessor_config.json": ["*processor_config.json"],
    "tokenizer.json": ["tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json"],
}


def read_config(name: str, common: dict[str, Any]) -> Any:
    """The configuration of a model that can be pruned and loaded.

    Raises ValueError that names the model and says what speaks against it.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{name}: there is no config.json{_instead(folder)}; {_EXPECTED}")
    try:
        config = AutoConfig.from_pretrained(name, **common)
    except Exception as error:  # anything may be wrong with a folder, or with the network
        raise ValueError(f"{name}: {_unread(name, common, error)}") from error
    try:
        adapter_for(config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    own = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and _LOADER not in own:
        raise ValueError(
            f"{name}: the code that comes with it offers no {_LOADER}: load the model in Python, "
            "and give it to vispco.apply or vispco.search"
        )
    return config


def _unread(name: str, common: dict[str, Any], error: Exception) -> str:
    """Why no configuration could be read."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig, __version__

    kind, own_code, local = None, False, common["local_files_only"]
    # No file, no JSON, or JSON that is no object.
    with contextlib.suppress(Exception):
        found: Any = PreTrainedConfig.get_config_dict(name, local_files_only=local)[0]
        kind, own_code = found["model_type"], "auto_map" in found
    if not isinstance(kind, str) or kind in CONFIG_MAPPING:
        return f"its config.json cannot be read: {said(error)}"
    if own_code and not common["trust_remote_code"]:
        return (
            f"transformers {__version__} does not know {kind!r} models, and this one brings Python "
            "code of its own; with --trust-remote-code it may be loaded, if you trust that code"
        )
    return (
        f"transformers {__version__} does not know {kind!r} models: a newer release may "
        "(pip install --upgrade transformers)"
    )


def read_processor(name: str, common: dict[str, Any]) -> Any:
    """The model's processor. Raises ValueError that names the model and says what is missing."""
    try:
        processor = load_processor(name, **common)
        check_kind(processor, "image")
    except Exception as error:
        folder, missing = Path(name), []
        if folder.is_dir():
            missing = [what for what, files in _READERS.items() if not _any(folder, files)]
        why = said(error)
        if missing:
            why = f"the folder has no {' and no '.join(missing)}; processor.save_pretrained"
            why += "(folder) writes them"
        raise ValueError(f"{name}: no processor could be loaded: {why}") from error
    return processor


def check_weights(name: str, config: Any, common: dict[str, Any]) -> None:
    """Refuse a folder without safetensors, and sizes that the weights on disk cannot have.

    transformers would make the weights that are missing, however much memory that takes.
    """
    from transformers import AutoModelForImageTextToText

    folder = Path(name)
    # A name: transformers knows.
    if not folder.is_dir():
        return
    files = [*folder.glob("*.safetensors")]
    if not files:
        raise ValueError(f"{name}: there are no *.safetensors{_instead(folder)}; {_EXPECTED}")
    stored = sum(path.stat().st_size for path in files)
    try:
        trust = common["trust_remote_code"]
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust)
    except Exception as error:
        what = f"no model could be made of its config.json: {said(error)}"
        raise ValueError(f"{name}: {what}") from error
    weights = sum(weight.numel() for weight in model.parameters())
    # A weight has 2 bits when quantized, else 8 or more; tied embeddings are counted twice.
    per_byte = 4 if hasattr(config, "quantization_config") else 1.3
    if weights > stored * per_byte:
        raise ValueError(
            f"{name}: its config.json describes {weights:,} weights, which its {stored:,} bytes of "
            "safetensors cannot hold"
        )


def said(error: Exception) -> str:
    """What transformers said, on one line, and the option that may help."""
    hint = "; with --trust-remote-code it may" if "trust_remote_code" in str(error) else ""
    return f"{brief(error)}{hint}"


def _instead(folder: Path) -> str:
    """What the folder holds in place of a model that can be loaded, if that is known."""
    for pattern, what in _OTHERS.items():
        for path in sorted(folder.glob(pattern))[:1]:
            return f", but {path.relative_to(folder).as_posix()}: {what}"
    return ""


def _any(folder: Path, patterns: list[str]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))
