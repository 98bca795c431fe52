"""PruningConfig: how many visual tokens enter each decoder layer, and which method ranks them."""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .registry import build_method
from .utils.files import SCHEMA_VERSION, JsonFile, checked_keys


def whole_tokens(keep_ratio, n_visual):
    """Tokens kept if `keep_ratio` of `n_visual` original visual tokens are asked for.

    `floor(keep_ratio * n_visual)`, but at least 1 where both are positive. Takes numbers or
    tensors. A small constant absorbs float errors: 0.29 * 100 keeps 29 tokens, not 28.

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
class PruningConfig(JsonFile):
    """Which fraction of the visual tokens enters each decoder layer, and which method ranks them.

    `keep_ratios[i]` is the fraction r_i of the N_v ORIGINAL visual tokens that ENTERS layer i:

        n_i = floor(r_i N_v)   whole tokens, but at least one where r_i > 0

    There is one ratio per decoder layer, in [0, 1]. Ratios never increase: a dropped token never
    comes back.

    method: name of the pruning method that ranks the tokens; or of several, "visionzip+pdrop".
    method_options: keyword arguments of that method.
    model_type, budget, flops, n_visual, versions: where the configuration comes from. `search`
        records them; `apply` refuses a model of another type or number of layers.

    Raises ValueError for ratios that are not such numbers, for an unknown method or option, and
    for malformed records.

    >>> config = PruningConfig("fastv", [1, 1, 0.5, 0.5])
    >>> config.tokens(576)
    [576, 576, 288, 288]
    >>> config.describe()
    'fastv: layer 2 keeps 50.0 % (drops 50.0 %)'
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
        for name, kinds in _RECORDED.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"{name} must be {expected}, got {value!r}")
            if isinstance(value, int | float) and not 0 <= value <= _LARGEST:
                raise ValueError(f"{name} must be finite and not negative, got {value!r}")

    @property
    def num_layers(self) -> int:
        """Number of decoder layers that this configuration is for."""
        return len(self.keep_ratios)

    def tokens(self, n_visual: int) -> list[int]:
        """Whole visual tokens that enter each layer, out of `n_visual`."""
        return [whole_tokens(r, n_visual) for r in self.keep_ratios]

    @property
    def steps(self) -> dict[int, float]:
        """{layer: keep ratio} of the layers before which tokens are dropped."""
        before = (1.0, *self.keep_ratios)
        return {i: r for i, r in enumerate(self.keep_ratios) if r < before[i]}

    def __str__(self) -> str:
        return self.describe()

    def describe(self) -> str:
        """One line: `fastv: layer 2 keeps 50.0 % (drops 50.0 %)`."""
        steps = [
            f"layer {i} keeps {100 * r:.1f} % (drops {100 * (1 - r):.1f} %)"
            for i, r in self.steps.items()
        ]
        return f"{self.method}: " + ("; ".join(steps) or "keeps everything")

    def to_dict(self) -> dict:
        """A JSON-ready dict, with the schema version."""
        fields = dataclasses.asdict(self) | {"keep_ratios": list(self.keep_ratios)}
        return {"schema_version": SCHEMA_VERSION, **fields, "num_layers": self.num_layers}

    @classmethod
    def from_dict(cls, data: Any) -> PruningConfig:
        """The inverse of `to_dict`.

        Raises ValueError for missing or unknown keys, another schema version, or bad values.
        """
        if isinstance(data, dict) and "points" in data:
            raise ValueError(
                "this is a frontier, which holds several configurations: take one of the files "
                "config-<budget>.json beside it, or Frontier.load(path).at(0.5).config"
            )
        required = {"method", "keep_ratios"}
        optional = {f.name for f in dataclasses.fields(cls)} | {"num_layers"}
        what = "a pruning configuration"
        data = checked_keys(data, what, required=required, optional=optional)
        layers = data.pop("num_layers", None)
        config = cls(**data)
        if layers is not None and (type(layers) is not int or layers != config.num_layers):
            found = f"there are {config.num_layers} keep_ratios"
            raise ValueError(f"num_layers says {layers!r}, but {found}")
        return config

    # ---- published notations ------------------------------------------------------------------
    @classmethod
    def from_fastv(
        cls, k: int = 2, drop: float = 0.5, *, num_layers: int | None = None
    ) -> PruningConfig:
        """FastV's (K, R): before layer `k`, the fraction `drop` of the tokens is dropped.

        Source: Chen et al. 2024, arXiv 2403.06764. Raises ValueError unless 0 <= k < num_layers
        and 0 <= drop <= 1.

        >>> PruningConfig.from_fastv(k=2, drop=0.75, num_layers=4).keep_ratios
        (1.0, 1.0, 0.25, 0.25)
        """
        if not _is_fraction(drop):
            percent = isinstance(drop, numbers.Real) and 1 < drop <= 100
            hint = f": did you mean {drop / 100:g}?" if percent else ""
            raise ValueError(f"drop must be a number in [0, 1], got {drop!r}{hint}")
        return cls("fastv", _staircase([k], [1 - drop], num_layers))

    @classmethod
    def from_pdrop(
        cls,
        layers: Sequence[int] = (8, 16, 24),
        ratios: Sequence[float] = (0.5, 0.25, 0.125),
        *,
        num_layers: int | None = None,
    ) -> PruningConfig:
        """PyramidDrop's stages: `ratios[j]` of the original tokens from layer `layers[j]` on.

        Source: arXiv 2410.17247. Raises ValueError unless the layers increase within
        0..num_layers - 1, with one ratio each, and the ratios do not increase.
        """
        return cls("pdrop", _staircase(layers, ratios, num_layers))

    @classmethod
    def from_sparsevlm(
        cls,
        tokens: Sequence[int] = (300, 200, 110),
        layers: Sequence[int] = (2, 6, 15),
        *,
        num_layers: int | None = None,
        n_visual: int = 576,
    ) -> PruningConfig:
        """SparseVLM's token lists: `tokens[j]` of `n_visual` remain AFTER layer `layers[j]`.

        Source: arXiv 2410.04417. Raises ValueError unless the layers increase within
        0..num_layers - 2, with one number of tokens each, and the numbers do not increase.
        """
        if isinstance(tokens, int | str):
            raise ValueError(
                f"tokens must be a number for each of the layers, such as (300, 200, 110), got "
                f"{tokens!r}; the paper's configurations by their average number of tokens are "
                "presets('sparsevlm'): '192', '128' and '64'"
            )
        if not all(isinstance(n, numbers.Real) for n in tokens):
            raise ValueError(f"tokens must be numbers, got {tokens!r}")
        if max(tokens, default=0) > n_visual:
            limit = f"the n_visual={n_visual} that there are"
            raise ValueError(f"tokens must be at most {limit}, got {max(tokens)}")
        ratios = [t / n_visual for t in tokens]
        return cls("sparsevlm", _staircase([i + 1 for i in layers], ratios, num_layers))


def as_config(config: Any) -> PruningConfig:
    """The configuration that a user means: itself, or the path of its file.

    Raises ValueError that says how to get one of what came instead.
    """
    if isinstance(config, PruningConfig):
        return config
    if isinstance(config, str | os.PathLike):
        if method := re.match(r"preset:(\w+)", str(config)):
            raise ValueError(
                f"{str(config)!r} is a name of the command line: in Python, the published "
                f"configurations are vispco.presets({method[1]!r}, num_layers)[name].config"
            )
        return PruningConfig.load(config)
    kind = type(config).__name__
    hint = "make one, such as PruningConfig.from_fastv(k=2, drop=0.5, num_layers=32)"
    if isinstance(config, nn.Module):
        hint = "the model comes first, then the configuration"
    elif hasattr(config, "points"):
        hint = "choose one of the frontier's configurations, such as frontier.at(0.5).config"
    elif isinstance(getattr(config, "config", None), PruningConfig):
        hint = f"pass the .config of this {kind}"
    elif isinstance(config, Mapping | list | tuple) and (inner := _holds_configs(config)):
        hint = f"choose one of these, and pass its {inner}"
    elif isinstance(config, Mapping):
        hint = "PruningConfig.from_dict reads what to_dict made; else name the fields, "
        hint += "PruningConfig(method, keep_ratios)"
    elif isinstance(config, numbers.Real):
        hint = "say from which layer on that share is kept, such as "
        hint += "PruningConfig.from_fastv(k=2, drop=0.5, num_layers=32), or search one for a budget"
    raise ValueError(f"expected a PruningConfig, or the path of its file, got {kind}: {hint}")


def _holds_configs(several: Mapping | Sequence) -> str:
    """How the configuration of its items is got, if these have one: such as of `presets()`."""
    items = [*several.values()] if isinstance(several, Mapping) else [*several]
    held = items and all(isinstance(getattr(x, "config", None), PruningConfig) for x in items)
    return ".config" if held else ""


_RECORDED: dict[str, tuple[type, ...]] = {
    "model_type": (str,),
    "budget": (int, float, str, dict),
    "flops": (int, float),
    "n_visual": (int,),
    "versions": (dict,),
}
#: Sums, products and ratios of a few numbers up to this one are finite floats.
_LARGEST = 1e300


def _checked_ratios(ratios: Any) -> tuple[float, ...]:
    scalar = not hasattr(ratios, "__iter__") or getattr(ratios, "ndim", 1) == 0
    if scalar or isinstance(ratios, str | bytes | Mapping | Set):
        expected = "a sequence of numbers, one per decoder layer"
        raise ValueError(f"keep_ratios must be {expected}, got {ratios!r}")
    values: list[float] = []
    for i, ratio in enumerate(ratios):
        if not _is_fraction(ratio):
            raise ValueError(f"keep_ratios[{i}] must be a number in [0, 1], got {ratio!r}")
        values.append(float(ratio))
    if not values:
        raise ValueError("keep_ratios is empty: give one keep ratio per decoder layer")
    for i, (before, value) in enumerate(zip(values, values[1:], strict=False), start=1):
        if value > before:
            raise ValueError(
                "keep_ratios must not increase (a dropped token never comes back), but "
                f"layer {i} has {value:g} after {before:g}; they are fractions of the "
                "ORIGINAL tokens"
            )
    return tuple(values)


def _is_fraction(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real | torch.Tensor):
        return False
    try:
        return 0 <= float(value) <= 1
    except (OverflowError, RuntimeError, ValueError):
        return False


def _staircase(
    layers: Sequence[int], ratios: Sequence[float], num_layers: int | None
) -> list[float]:
    """1 before `layers[0]`, then `ratios[j]` from layer `layers[j]` on."""
    try:
        layers, ratios = list(layers), list(ratios)
    except TypeError:
        found = f"{layers!r} and {ratios!r}"
        raise ValueError(f"layers and ratios must be lists, one ratio per layer: {found}") from None
    if not isinstance(num_layers, numbers.Integral) or num_layers < 1:
        got = num_layers if isinstance(num_layers, int | None) else type(num_layers).__name__
        raise ValueError(f"num_layers must be the model's number of decoder layers, got {got}")
    if not all(isinstance(layer, numbers.Integral) for layer in layers):
        raise ValueError(f"layers must be whole numbers, got {layers!r}")
    if len(layers) != len(ratios):
        found = f"{len(layers)} layers and {len(ratios)} ratios"
        raise ValueError(f"need one ratio per layer, got {found}")
    if layers != sorted(set(layers)) or not all(0 <= i < num_layers for i in layers):
        raise ValueError(f"layers must increase within 0..{num_layers - 1}, got {layers}")
    schedule = [1.0] * num_layers
    for layer, ratio in zip(layers, ratios, strict=True):
        schedule = [ratio if i >= layer else r for i, r in enumerate(schedule)]
    return schedule
