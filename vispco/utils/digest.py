"""Digests: hashes that tell whether a model, or data, are the same to the bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor


def key(**parts: Any) -> str:
    """The hash of named JSON-ready parts, whatever their order.

    >>> key(a=1, b=[2]) == key(b=[2], a=1) != key(a=1, b=[3])
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """The digest of named tensors: their names, types, shapes and bytes, in the order given.

    A tensor on the device "meta" has no bytes.

    >>> zeros, minus = torch.zeros(2), -torch.zeros(2)
    >>> of_tensors([("a", zeros)]) == of_tensors([("a", zeros)]) != of_tensors([("a", minus)])
    True
    """
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        if not tensor.is_meta:
            content: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            digest.update(content)
    return digest.hexdigest()


def of_model(model: Any) -> str:
    """The digest of a model: its weights, and its configuration without where it was stored."""
    config = json.dumps(_without_origin(model.config.to_dict()), sort_keys=True, default=str)
    weights = of_tensors(model.state_dict().items())
    return key(weights=weights, config=config, attention=model.config._attn_implementation)


def _without_origin(data: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    origin = ("_name_or_path", "transformers_version")
    return {str(k): _without_origin(v) for k, v in data.items() if k not in origin}


def of_batches(batches: Iterable[Mapping]) -> str:
    """The digest of model inputs."""
    return key(batches=[of_tensors(sorted(_leaves(b), key=itemgetter(0))) for b in batches])


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested inputs, named by their path; anything else becomes part of a name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for k, v in value.items():
            yield from _leaves(v, f"{name}.{k}" if name else str(k))
    elif isinstance(value, list | tuple):
        yield from _leaves(dict(enumerate(value)), name)
    else:
        yield f"{name} {value!r}", torch.empty(0)
