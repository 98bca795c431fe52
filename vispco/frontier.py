"""Frontier: the configurations that a search found, one per budget, as a JSON file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from html import escape
from importlib import import_module
from typing import Any, overload

from .budget import check_budget, limited, parse_budget
from .config import PruningConfig
from .utils.console import COST_HEADER, cost_cells, percent, table
from .utils.files import SCHEMA_VERSION, JsonFile, checked_keys

#: What tables show of a point's metrics: by name the heading, and how a number is written.
MEASURED: dict[str, Any] = {
    "held_out_kl": ("held-out KL", "{:.4f}".format),
    "calibration_accuracy": ("accuracy", percent),
    "held_out_accuracy": ("held-out accuracy", percent),
    "calibration_agreement": ("agreement", percent),
    "kl": ("measured KL", "{:.4f}".format),
    "accuracy": ("measured accuracy", percent),
}


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


@dataclass(repr=False)
class Frontier(JsonFile):
    """The points that a search found, by increasing FLOPs: a sequence of `FrontierPoint`.

    meta: how they were found: method, kernel, seed, cost of the search, ...
    Printed, and at the end of a notebook's cell, it is a table.

    >>> config = PruningConfig("fastv", [1, 0.5])
    >>> point = FrontierPoint(config, budget=0.75, flops=1e9, share=0.75, loss=0.1)
    >>> frontier = Frontier([point], {"seed": 0})
    >>> frontier.at(0.8).config.keep_ratios
    (1.0, 0.5)
    >>> len(frontier), frontier[0] is point, [point.share for point in frontier]
    (1, True, [0.75])
    >>> print(frontier)
    budget         FLOPs   share  calibration KL  visual tokens entering each layer
      0.75  1.000 GFLOPs  75.0 %          0.1000                         100 % 50 %
    """

    points: list[FrontierPoint]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        points = self.points
        if isinstance(points, str) or not all(isinstance(p, FrontierPoint) for p in points):
            raise ValueError(
                "a frontier is made of a list of FrontierPoint; Frontier.load reads a file, "
                "vispco.search finds one"
            )
        self.points = sorted(self.points, key=lambda p: p.flops)

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[FrontierPoint]:
        return iter(self.points)

    @overload
    def __getitem__(self, index: int) -> FrontierPoint: ...
    @overload
    def __getitem__(self, index: slice) -> list[FrontierPoint]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, float | str):
            raise ValueError(
                f"frontier[{index!r}] is no position: frontier[0] is the cheapest point; the best "
                f"within a budget is frontier.at({index!r})"
            )
        return self.points[index]

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        lines = ["".join(f"<th>{escape(name)}</th>" for name in self.header())]
        for row in self.rows():
            lines.append("".join(f"<td>{escape(cell)}</td>" for cell in row))
        return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"

    def table(self) -> str:
        """Budget, cost, tokens and quality of each point, as text."""
        return table(self.header(), self.rows()) if self.points else "an empty frontier"

    def header(self) -> list[str]:
        """The headings of `rows`."""
        loss = "task loss" if self.meta.get("objective") == "task" else "KL"
        measured = [MEASURED[name][0] for name in self._shown()] + ["saved"] * bool(self._saved())
        return [*COST_HEADER[:-1], f"calibration {loss}", *measured, COST_HEADER[-1]]

    def rows(self) -> list[list[str]]:
        """The cells of a table of the points, under `header`."""
        found, saved = [], self._saved()
        for i, point in enumerate(self.points):
            *cells, entering = cost_cells(point)
            cells.append(f"{point.loss:.4f}")
            for name in self._shown():
                value = point.metrics.get(name)
                known = isinstance(value, int | float)
                cells.append(MEASURED[name][1](value) if known else "–")
            found.append([*cells, *saved[i : i + 1], entering])
        return found

    def _saved(self) -> list[str]:
        """The time that each point saves, if it was predicted of these points."""
        seconds: Any = self.meta.get("prefill_seconds")
        full = self.meta.get("full_prefill_seconds")
        fits = isinstance(seconds, list) and len(seconds) == len(self.points)
        if not fits or not all(isinstance(s, int | float) for s in (full, *seconds)):
            return []
        return [f"{1000 * (full - s):.3g} ms" for s in seconds]

    def _shown(self) -> list[str]:
        """The metrics that some point has, of those that a table shows."""
        return [name for name in MEASURED if any(name in p.metrics for p in self.points)]

    def to_dataframe(self) -> Any:
        """A `pandas.DataFrame`: a row for each point, with its metrics that are numbers.

        Raises ImportError without pandas.
        """
        try:
            pandas: Any = import_module("pandas")
        except ImportError as error:
            raise ImportError("to_dataframe needs pandas: pip install pandas") from error
        rows = []
        for p in self.points:
            row = {"budget": p.budget, "flops": p.flops, "share": p.share, "loss": p.loss}
            row |= {k: v for k, v in p.metrics.items() if isinstance(v, int | float)}
            about = {"method": p.config.method, "keep_ratios": list(p.config.keep_ratios)}
            # The point's own cost keeps its name; a metric of that name is of other questions.
            rows.append({**row, "flops": p.flops, "share": p.share, **about})
        return pandas.DataFrame(rows)

    def plot(
        self, path: str | os.PathLike | None = None, *, x: str = "share", y: str | None = None
    ) -> Any:
        """Draw it: see `vispco.plot.plot_frontier`.

        path: an `.svg` or `.png` file to write. None: a notebook shows what is returned.
        """
        # Pictures are on a higher floor, and need matplotlib.
        return import_module("vispco.plot.frontiers").plot_frontier(self, path, x=x, y=y)

    def at(self, share: float | str) -> FrontierPoint:
        """The point of least loss among those within `share` of the prunable cost.

        share: 0 to 1, or a text such as "50%".
        Raises ValueError for anything else, or if none is that cheap.
        """
        absolute = isinstance(share, str) and limited(share) == "tokens"
        wanted = 0.0
        if not absolute:
            wanted, absolute = parse_budget(share)
        if absolute:
            raise ValueError(
                f"at() takes a share of the prunable cost, such as 0.5 or '50%', got {share!r}; "
                "a point has its FLOPs as point.flops, and its budget as point.budget"
            )
        affordable = [p for p in self.points if p.share <= wanted + 1e-9]
        if affordable:
            return min(affordable, key=lambda p: p.loss)
        found = "the frontier is empty"
        if self.points:
            found = f"the cheapest has {self.points[0].share:.4g}; search a smaller budget"
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
