"""The model that `--model` names, and its processor."""

from __future__ import annotations

import argparse
import os
import re
import ssl
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch

from .. import testbed
from ..registry import adapter_for, did_you_mean
from ..testbed import language, smollm
from .pretrained import check_weights, read_config, read_processor, said

#: Seconds that the hub has to answer.
_PATIENCE = 5.0


def find_model(options: argparse.Namespace) -> Callable[[], tuple[Any, Any]]:
    """Read all of the model but its weights, and refuse what cannot be pruned.

    Commands call it before they write anything. Returns a function that loads the weights; it
    returns (model in eval mode, processor). The model is one of the testbed, of a local folder, or
    by name. Weights are read from safetensors only, and no code is run that comes with them unless
    `--trust-remote-code` is given. Both raise ValueError that names the model.
    """
    name = options.model
    if is_testbed(name):
        if name == smollm.NAME:
            language.find()
        return lambda: _load_testbed(options)
    check_name(name)
    if options.device == "auto" and find_spec("accelerate") is None:
        raise ValueError(
            "--device auto spreads a model over all devices, which needs accelerate: pip install "
            "accelerate; or take one device, such as --device cuda"
        )
    local = os.path.isdir(name) or not _reachable(name)
    common = {"trust_remote_code": options.trust_remote_code, "local_files_only": local}
    config = read_config(name, common)
    check_weights(name, config, common)
    processor = read_processor(name, common)
    return lambda: (_load(options, common), processor)


def _reachable(name: str) -> bool:
    """Whether the Hugging Face hub answers, so that files that are not in the cache can be had.

    Raises ValueError if it does not and the model is not in the cache: transformers would ask again
    and again, for a minute.
    """
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[bool] = []

    def ask() -> None:
        try:
            url = hf_hub_url(name, "config.json")
            urlopen(Request(url, method="HEAD"), timeout=_PATIENCE).close()
        except HTTPError:
            # An answer, such as that the model is gated.
            pass
        except OSError as error:
            # Certificates of its own: transformers may know them.
            if not isinstance(getattr(error, "reason", error), ssl.SSLError):
                return
        answers.append(True)

    # A name server that says nothing has a patience of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE + 1)
    if answers or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return bool(answers)
    raise ValueError(
        f"{name} is no folder here and not in the cache, and {constants.ENDPOINT} does not answer: "
        "check the network, or give the folder of a model that was downloaded"
    )


def _load_testbed(options: argparse.Namespace) -> tuple[Any, Any]:
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    model, processor = testbed.load(options.model, dtype)
    return model.to(_best() if options.device == "auto" else options.device or _best()), processor


def _load(options: argparse.Namespace, common: dict[str, Any]) -> Any:
    from transformers import AutoModelForImageTextToText

    name = options.model
    spread = {"device_map": "auto"} if options.device == "auto" else {}
    how = {"use_safetensors": True, "output_loading_info": True, "dtype": options.dtype}
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(name, **how, **spread, **common)
        model, found = loaded
        # transformers would fill in missing weights with random numbers.
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"its files lack {len(missing)} of its weights, such as {missing[0]}")
    except Exception as error:  # anything may be wrong with a folder, or with the network
        what = f"no image-text-to-text model could be loaded: {said(error)}"
        raise ValueError(f"{name}: {what}") from error
    adapter_for(model)
    return (model if spread else model.to(options.device or _best())).eval()


def _best() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def is_testbed(name: str) -> bool:
    """Whether the model ships with vispco."""
    return name == "testbed" or name in testbed.MODELS


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is a folder, or looks like OWNER/MODEL."""
    path = Path(name)
    found = re.fullmatch(r"(?:https?://[^/]+/)?([\w-][\w.-]*/[\w.-]+)/*", name)
    if found and found[1] != name and not path.is_dir() and not name.startswith((".", "/")):
        raise ValueError(f"{name}: give the name of a model alone, --model {found[1]}")
    if not path.is_dir() and (
        name.startswith((".", "~", "/")) or path.exists() or name.count("/") > 1
    ):
        what = "this is a file: give its folder" if path.is_file() else "there is no such folder"
        raise ValueError(f"{name}: {what}; expected a model as save_pretrained writes it")
    if not Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        folders = [p.name for p in Path.cwd().iterdir() if (p / "config.json").is_file()]
        hint = did_you_mean(name, [*testbed.MODELS, *folders])
        raise ValueError(
            f"unknown model {name!r}: {hint}expected testbed, {', '.join(testbed.MODELS)}, a local "
            "folder with a Hugging Face model, or its name OWNER/MODEL"
        )
