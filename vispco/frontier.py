"""Frontier: the configurations that a search found, one per budget, as a JSON file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from .budget import check_budget
from .config import PruningConfig
from .utils.files import SCHEMA_VERSION, JsonFile, checked_keys


@dataclass(frozen=True)
class FrontierPoint:
    """One configuration of a frontier.

    budget: as it was asked for.
    flops: mean prefill FLOPs of a calibration sample under `config`.
    share: share of the prunable cost, of the costliest calibration sample; never above the budget.
    loss: the search's objective on the calibration data, by default KL(pruned || full) in nats.
    metrics: whatever was measured later, such as held-out accuracy.
    """

    config: PruningConfig
    budget: Any
    flops: float
    share: float
    loss: float
    metrics: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """A JSON-ready dict."""
        numbers = {name: value for name, value in vars(self).items() if name != "config"}
        return {**numbers, "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, data: Any) -> FrontierPoint:
        """The inverse of `to_dict`. Raises ValueError for anything else."""
        names = [f.name for f in fields(cls)]
        if not isinstance(data, dict) or set(data) != set(names):
            raise ValueError(f"a frontier's point needs exactly {', '.join(names)}")
        for name in ("flops", "share", "loss"):
            value = data[name]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not abs(value) < float("inf"):
                raise ValueError(f"a point's {name} must be a finite number, got {value!r}")
            if value < 0 and name != "loss":
                raise ValueError(f"a point's {name} must not be negative, got {value!r}")
        if not isinstance(data["metrics"], dict):
            raise ValueError(f"a point's metrics must be an object, got {data['metrics']!r}")
        check_budget(data["budget"])
        return cls(**{**data, "config": PruningConfig.from_dict(data["config"])})


@dataclass
class Frontier(JsonFile):
    """The points that a search found, by increasing FLOPs.

    meta: how they were found: method, kernel, seed, cost of the search, ...

    >>> config = PruningConfig("fastv", [1, 0.5])
    >>> point = FrontierPoint(config, budget=0.75, flops=1e9, share=0.75, loss=0.1)
    >>> frontier = Frontier([point], {"seed": 0})
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
        """The point of least loss among those within `share` (0 to 1) of the prunable cost.

        Raises ValueError if none is that cheap.
        """
        affordable = [p for p in self.points if p.share <= share + 1e-9]
        if affordable:
            return min(affordable, key=lambda p: p.loss)
        found = "the frontier is empty"
        if self.points:
            found = f"the cheapest has {self.points[0].share:.4g}"
        raise ValueError(f"no point within {share!r} of the prunable cost: {found}")

    def to_dict(self) -> dict:
        """A JSON-ready dict, with the schema version."""
        points = [point.to_dict() for point in self.points]
        return {"schema_version": SCHEMA_VERSION, "meta": self.meta, "points": points}

    @classmethod
    def from_dict(cls, data: Any) -> Frontier:
        """The inverse of `to_dict`. Raises ValueError for anything else, or another schema."""
        data = checked_keys(data, "a frontier", required={"meta", "points"})
        points, meta = data["points"], data["meta"]
        if not isinstance(points, list) or not isinstance(meta, dict):
            raise ValueError("a frontier needs a list of points and an object meta")
        rivals = meta.get("competitors", [])
        if not isinstance(rivals, list) or not all(isinstance(rival, dict) for rival in rivals):
            raise ValueError("meta['competitors'] must be a list of objects")
        return cls([FrontierPoint.from_dict(point) for point in points], meta)
