"""Frontier: the configurations a search found, one per budget, as a JSON file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from .budget import check_budget
from .config import PruningConfig
from .utils.files import SCHEMA_VERSION, checked_keys, read_json, write_json


@dataclass(frozen=True)
class FrontierPoint:
    """One configuration. budget: as asked for. flops: mean prefill FLOPs of a calibration sample under `config`.
    share: prunable share of the costliest calibration sample (never above the budget). loss: KL(pruned || full)
    on the calibration data, or whatever the search's objective was. metrics: whatever was measured later (held-out accuracy, ...)."""

    config: PruningConfig
    budget: Any
    flops: float
    share: float
    loss: float
    metrics: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """JSON-ready."""
        return {**{k: getattr(self, k) for k in ("budget", "flops", "share", "loss", "metrics")},
                "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, data: Any) -> FrontierPoint:
        """The inverse of `to_dict`."""
        if not isinstance(data, dict) or set(data) != {"config", "budget", "flops", "share", "loss", "metrics"}:
            raise ValueError("a frontier's point needs exactly config, budget, flops, share, loss, metrics")
        for name in ("flops", "share", "loss"):
            value = data[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
                raise ValueError(f"a point's {name} must be a finite number, got {value!r}")
            if value < 0 and name != "loss":
                raise ValueError(f"a point's {name} must not be negative, got {value!r}")
        if not isinstance(data["metrics"], dict):
            raise ValueError(f"a point's metrics must be an object, got {data['metrics']!r}")
        check_budget(data["budget"])
        return cls(**{**data, "config": PruningConfig.from_dict(data["config"])})


@dataclass
class Frontier:
    """Points by increasing cost, and how they were found (`meta`: method, kernel, seed, cost of the search, ...).

    >>> frontier = Frontier([FrontierPoint(PruningConfig("fastv", [1, .5]), 0.75, 1e9, 0.75, 0.1)], {"seed": 0})
    >>> frontier.at(0.8).config.keep_ratios
    (1.0, 0.5)
    """

    points: list[FrontierPoint]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.points = sorted(self.points, key=lambda p: p.flops)

    def __len__(self) -> int:
        return len(self.points)

    def at(self, share: float) -> FrontierPoint:
        """The point of least KL among those within `share` of the prunable cost.

        Raises ValueError if none is that cheap.
        """
        affordable = [p for p in self.points if p.share <= share + 1e-9]
        if not affordable:
            cheapest = f"the cheapest has {self.points[0].share:.4g}" if self.points else "the frontier is empty"
            raise ValueError(f"no point within {share!r} of the prunable cost: {cheapest}")
        return min(affordable, key=lambda p: p.loss)

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON, atomically."""
        write_json(path, {"schema_version": SCHEMA_VERSION, "meta": self.meta,
                          "points": [p.to_dict() for p in self.points]})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Frontier:
        """Read what `save` wrote. Raises ValueError (FileNotFoundError) that names the file and the fault."""
        return read_json(path, cls._from_dict)

    @classmethod
    def _from_dict(cls, data: Any) -> Frontier:
        data = checked_keys(data, "a frontier", required={"meta", "points"})
        if not isinstance(data["points"], list) or not isinstance(data["meta"], dict):
            raise ValueError("a frontier needs a list of points and an object meta")
        rivals = data["meta"].get("competitors", [])
        if not isinstance(rivals, list) or not all(isinstance(rival, dict) for rival in rivals):
            raise ValueError("meta['competitors'] must be a list of objects")
        return cls([FrontierPoint.from_dict(p) for p in data["points"]], data["meta"])
