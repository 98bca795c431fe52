"""PruningConfig: THE one meaning of `keep_ratio`, validated, frozen, JSON in and out."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch

from .utils.files import SCHEMA_VERSION, checked_keys, read_json, write_json
from .registry import build_method


def whole_tokens(keep_ratio, n_visual):
    """Tokens kept when `keep_ratio` of `n_visual` original visual tokens are asked for.

    `floor(r * n)`, but at least one token unless `r` is 0 (or there are none). Works on numbers and tensors.
    The small constant absorbs float error: 0.29 * 100 keeps 29 tokens, not 28.

    >>> whole_tokens(0.29, 100), whole_tokens(0.001, 100), whole_tokens(0.0, 100)
    (29, 1, 0)
    """
    if isinstance(keep_ratio, torch.Tensor) or isinstance(n_visual, torch.Tensor):
        ratio = torch.as_tensor(keep_ratio, dtype=torch.float64)
        n = torch.as_tensor(n_visual, device=ratio.device)
        kept = torch.floor(ratio * n + 1e-6).long()
        return torch.where((ratio > 0) & (n > 0), kept.clamp(min=1), kept)
    kept = math.floor(keep_ratio * n_visual + 1e-6)
    return max(1, kept) if keep_ratio > 0 and n_visual > 0 else kept


@dataclass(frozen=True)
class PruningConfig:
    """Which fraction of the visual tokens enters each decoder layer, and who chooses them.

    `keep_ratios[i]` is the fraction of the ORIGINAL visual tokens that ENTERS layer `i`: one per decoder
    layer, in [0, 1], non-increasing (a dropped token never comes back).

    method: name of a registered pruning method, which ranks the tokens.
    method_options: keyword arguments of that method.
    model_type, budget, flops, n_visual, versions: provenance, filled in by `vispco.search`; `apply` refuses a model of
        another type or number of layers.

    Raises ValueError on anything else than that.

    >>> cfg = PruningConfig("fastv", [1, 1, 0.5, 0.5])
    >>> cfg.tokens(576)
    [576, 576, 288, 288]
    """

    method: str
    keep_ratios: Sequence[float]
    method_options: Mapping[str, Any] = field(default_factory=dict)
    model_type: str | None = None
    budget: Any = None
    flops: float | None = None
    n_visual: int | None = None
    versions: Mapping[str, str] | None = None

    def __post_init__(self):
        object.__setattr__(self, "keep_ratios", _checked_ratios(self.keep_ratios))
        if not isinstance(self.method_options, Mapping):
            raise ValueError(f"method_options must be a mapping, got {self.method_options!r}")
        object.__setattr__(self, "method_options", dict(self.method_options))
        build_method(self.method, self.method_options)
        for name, kinds in _PROVENANCE.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise ValueError(f"{name} must be {' or '.join(k.__name__ for k in kinds)}, got {value!r}")
            if isinstance(value, (int, float)) and not 0 <= value <= _LARGEST:
                raise ValueError(f"{name} must be finite and not negative, got {value!r}")

    @property
    def num_layers(self) -> int:
        """Number of decoder layers this configuration is for."""
        return len(self.keep_ratios)

    def tokens(self, n_visual: int) -> list[int]:
        """Whole visual tokens entering each layer, out of `n_visual`."""
        return [whole_tokens(r, n_visual) for r in self.keep_ratios]

    @property
    def steps(self) -> dict[int, float]:
        """{layer: keep ratio} of the layers before which tokens are dropped."""
        before = (1.0, *self.keep_ratios)
        return {i: r for i, r in enumerate(self.keep_ratios) if r < before[i]}

    def describe(self) -> str:
        """One line: `fastv: layer 2 keeps 50.0 % (drops 50.0 %)`."""
        steps = [f"layer {i} keeps {r:.1%} (drops {1 - r:.1%})".replace("%", " %") for i, r in self.steps.items()]
        return f"{self.method}: " + ("; ".join(steps) or "keeps everything")

    # ---- files ------------------------------------------------------------------------------------------
    def to_dict(self) -> dict:
        """A JSON-ready dict, with the schema version."""
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self), "num_layers": self.num_layers,
                "keep_ratios": list(self.keep_ratios)}

    @classmethod
    def from_dict(cls, data: Any) -> PruningConfig:
        """The inverse of `to_dict`. Raises ValueError on missing or unknown keys, or another schema."""
        names = {f.name for f in dataclasses.fields(cls)}
        data = checked_keys(data, "a pruning configuration", required={"method", "keep_ratios"},
                            optional=names | {"num_layers"})
        layers = data.pop("num_layers", None)
        config = cls(**data)
        if layers is not None and (type(layers) is not int or layers != config.num_layers):
            raise ValueError(f"num_layers says {layers!r}, but there are {config.num_layers} keep_ratios")
        return config

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON, atomically: the file is whole or not there."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> PruningConfig:
        """Read what `save` wrote. Raises ValueError (FileNotFoundError) that names the file and the fault."""
        return read_json(path, cls.from_dict)

    # ---- published notations ----------------------------------------------------------------------------
    @classmethod
    def from_fastv(cls, k: int = 2, drop: float = 0.5, *, num_layers: int) -> PruningConfig:
        """FastV's (K, R): before layer `k`, drop the fraction `drop` (Chen et al. 2024, arXiv 2403.06764).

        >>> PruningConfig.from_fastv(k=2, drop=0.75, num_layers=4).keep_ratios
        (1.0, 1.0, 0.25, 0.25)
        """
        return cls("fastv", _staircase([k], [1 - drop], num_layers))

    @classmethod
    def from_pdrop(cls, layers: Sequence[int] = (8, 16, 24), ratios: Sequence[float] = (0.5, 0.25, 0.125),
                   *, num_layers: int) -> PruningConfig:
        """PyramidDrop's stages: from layer `layers[j]` on, `ratios[j]` of the original tokens (arXiv 2410.17247)."""
        return cls("pdrop", _staircase(layers, ratios, num_layers))

    @classmethod
    def from_sparsevlm(cls, tokens: Sequence[int] = (300, 200, 110), layers: Sequence[int] = (2, 6, 15),
                       *, num_layers: int, n_visual: int = 576) -> PruningConfig:
        """SparseVLM's token lists: AFTER layer `layers[j]`, `tokens[j]` of `n_visual` remain (arXiv 2410.04417)."""
        if max(tokens, default=0) > n_visual:
            raise ValueError(f"tokens must be at most the n_visual={n_visual} that there are, got {max(tokens)}")
        return cls("sparsevlm", _staircase([i + 1 for i in layers], [t / n_visual for t in tokens], num_layers))


_PROVENANCE = {"model_type": (str,), "budget": (int, float, str, dict), "flops": (int, float), "n_visual": (int,),
               "versions": (dict,)}
_LARGEST = 1e300  # so that sums, products and ratios of a few such numbers are floats


def _checked_ratios(ratios: Any) -> tuple[float, ...]:
    if (isinstance(ratios, (str, bytes, Mapping, Set)) or not hasattr(ratios, "__iter__")
            or getattr(ratios, "ndim", 1) == 0):
        raise ValueError(f"keep_ratios must be a sequence of numbers, one per decoder layer, got {ratios!r}")
    ratios = list(ratios)
    if not ratios:
        raise ValueError("keep_ratios is empty: give one keep ratio per decoder layer")
    for i, r in enumerate(ratios):
        if isinstance(r, bool) or not isinstance(r, (numbers.Real, torch.Tensor)) or not _is_share(r):
            raise ValueError(f"keep_ratios[{i}] must be a number in [0, 1], got {r!r}")
    values = tuple(float(r) for r in ratios)
    for i in range(1, len(values)):
        if values[i] > values[i - 1]:
            raise ValueError(f"keep_ratios must not increase (a dropped token never comes back), but layer {i} has "
                             f"{values[i]:g} after {values[i - 1]:g}; they are fractions of the ORIGINAL tokens")
    return values


def _is_share(r: Any) -> bool:
    try:
        return 0 <= float(r) <= 1
    except (OverflowError, RuntimeError, ValueError):
        return False


def _staircase(layers: Sequence[int], ratios: Sequence[float], num_layers: int) -> list[float]:
    """1 up to `layers[0]`, then `ratios[j]` from layer `layers[j]` on."""
    layers, ratios = list(layers), list(ratios)
    if len(layers) != len(ratios):
        raise ValueError(f"need one ratio per layer, got {len(layers)} layers and {len(ratios)} ratios")
    if layers != sorted(set(layers)) or not all(0 <= i < num_layers for i in layers):
        raise ValueError(f"layers must increase within 0..{num_layers - 1}, got {layers}")
    return [next((r for at, r in zip(reversed(layers), reversed(ratios)) if i >= at), 1.0) for i in range(num_layers)]
