"""The profile as a record: what it says of a model, and what it predicts of a schedule."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..pruning.forward import check_objective
from ..registry import build_method
from ..utils.console import percent, table
from ..utils.files import SCHEMA_VERSION, JsonFile, checked_keys

#: Losses below this many nats are as good as 0.
FREE = 0.01


@dataclass(frozen=True, repr=False)
class Profile(JsonFile):
    """The losses of keeping `n` visual tokens from layer `k` on, and all of them before.

    methods: {name: options} of what ranks the tokens. model_type, layers: of the model.
    tokens: visual tokens of the largest prompt, of which the numbers kept are counted.
    objective: what was measured, "kl" or "task".
    full: the loss of the full model at each answer token, in nats.
    rows: {layer: {tokens kept: the loss at each answer token, in nats}}, from the first layer that
        can be pruned on.
    ranks: {layer: {tokens kept: name of the method that was measured}}, the best of several.
    forward_passes: what it cost, in forward passes of one question. A pass that begins at a later
        layer counts as the part of the layers that ran.
    Raises ValueError for anything else. Printed, it is a table of the losses.

    >>> row = {0: [2.0, 0.0], 4: [0.5, 0.0]}
    >>> profile = Profile({"fastv": {}}, "llava", 2, 8, "kl", [0.0, 0.0], {1: row})
    >>> profile.loss(1, 4), profile.loss(1, 8), profile.predict(torch.tensor([[1.0, 0.5]])).tolist()
    (0.25, 0.0, [0.25])
    """

    methods: Mapping[str, Mapping[str, Any]]
    model_type: str
    layers: int
    tokens: int
    objective: str
    full: Sequence[float]
    rows: Mapping[int, Mapping[int, Sequence[float]]]
    ranks: Mapping[int, Mapping[int, str]] = field(default_factory=dict)
    forward_passes: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        if not isinstance(self.methods, Mapping) or not self.methods:
            raise ValueError(f"methods must be {{name: options}}, got {self.methods!r}")
        for name, options in self.methods.items():
            build_method(name, options)
        check_objective(self.objective)
        for name, kind in (("model_type", str), ("ranks", Mapping), ("versions", Mapping)):
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
        _losses([self.forward_passes])
        for name in ("layers", "tokens"):
            if type(size := getattr(self, name)) is not int or size < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, got {size!r}")
        rows = {k: {n: _losses(row[n]) for n in sorted(row)} for k, row in self.rows.items()}
        object.__setattr__(self, "full", _losses(self.full))
        object.__setattr__(self, "rows", rows)
        first = min(rows, default=self.layers)
        if not rows or list(rows) != list(range(max(first, 0), self.layers)):
            expected = f"layers one after the other, up to {self.layers - 1}"
            raise ValueError(f"rows must be of {expected}, got {list(rows)}")
        for layer, row in rows.items():
            if 0 not in row or not all(0 <= n < self.tokens for n in row):
                expected = f"numbers from 0, which is there, up to {self.tokens - 1}"
                raise ValueError(f"rows[{layer}] must be of {expected}, got {list(row)}")
            if any(len(losses) != len(self.full) for losses in row.values()):
                raise ValueError(f"rows[{layer}] must have {len(self.full)} losses each")
        only = next(iter(self.methods))
        ranks = self.ranks or {k: dict.fromkeys(row, only) for k, row in rows.items()}
        ranks = {k: {n: row[n] for n in sorted(row)} for k, row in ranks.items()}
        object.__setattr__(self, "ranks", ranks)
        who = {name for row in ranks.values() for name in row.values()}
        if {k: {*row} for k, row in rows.items()} != {k: {*row} for k, row in ranks.items()} or (
            not who <= set(self.methods)
        ):
            expected = f"one of {', '.join(self.methods)} for each measurement in rows"
            raise ValueError(f"ranks must be {expected}, got {ranks}")

    def __repr__(self) -> str:
        kept = {percent(share, 0): int(share * self.tokens) for share in (0, 0.25, 0.5)}
        rows = [[k, *(f"{self.loss(k, n):.3f}" for n in kept.values())] for k in self.rows]
        what = {"kl": "KL from the full model", "task": "loss of the answers"}[self.objective]
        return (
            f"profile of {self.model_type} with {self.method}: {what} in nats, if a share of "
            f"{self.tokens} visual tokens is kept from a layer on\n{table(['layer', *kept], rows)}"
        )

    @property
    def first_layer(self) -> int:
        """The first layer that can be pruned."""
        return min(self.rows)

    @property
    def method(self) -> str:
        """The names of the methods, in a word."""
        return ", ".join(self.methods)

    def ranker(self, layer: int, tokens: float) -> str:
        """The method that was best at a layer, where about so many tokens were kept."""
        near = [n for n in self.ranks[layer] if n] or [0]
        return self.ranks[layer][min(near, key=lambda n: abs(n - tokens))]

    def ranked_by(self, ratios: Sequence[float]) -> dict[str, Any]:
        """`method` and `method_options` of a `PruningConfig` with these keep ratios (L,).

        Each drop is ranked by the method that was best at its layer and nearest to its tokens: a
        composite, where these differ.
        """
        if len(self.methods) == 1:
            ((name, own),) = self.methods.items()
            return {"method": name, "method_options": dict(own)}
        before, last = (1.0, *ratios), ""
        parts: list[str] = []
        for layer in (i for i, r in enumerate(ratios) if r < before[i]):
            name = self.ranker(layer, ratios[layer] * self.tokens)
            # Where nothing is kept, whoever ranks is the same.
            if not parts or (ratios[layer] and name != last):
                parts.append(f"{name}@{layer}" if parts else name)
                last = name
        parts = parts or [next(iter(self.methods))]
        names = {part.split("@")[0] for part in parts}
        options = {name: dict(own) for name, own in self.methods.items() if name in names and own}
        if len(parts) == 1:
            options = options.get(parts[0], {})
        return {"method": "+".join(parts), "method_options": options}

    # ---- what it says ---------------------------------------------------------------------------
    def loss(self, layer: int, tokens: int) -> float:
        """g_k(n): the mean loss over the answer tokens, in nats.

        Between the numbers that were measured, it is as `table` says.
        """
        return float(self._losses(layer, tokens).mean())

    def noise(self, layer: int, tokens: int) -> float:
        """The standard error of `loss`, in nats."""
        losses = self._losses(layer, tokens)
        return float(losses.std() / len(losses) ** 0.5) if len(losses) > 1 else math.inf

    def _losses(self, layer: int, tokens: int) -> Tensor:
        return self._row(layer, torch.tensor([float(tokens)]).double())[0]

    def exit(self, tolerance: float = FREE) -> int | None:
        """The first layer from which on no token is needed: losing all costs `tolerance` nats more
        at most, there and in every later layer; None if there is no such layer."""
        base, found = sum(self.full) / len(self.full), None
        for layer in reversed(list(self.rows)):
            if self.loss(layer, 0) > base + tolerance:
                break
            found = layer
        return found

    def traps(self, factor: float = 3.0) -> list[int]:
        """Layers that rank badly: a drop of half of the tokens costs `factor` times as much as at
        the layer before or after, whichever is worse, and at least 0.1 nats. The first and the last
        layer have no two neighbours to be compared with."""
        losses = {layer: self.loss(layer, self.tokens // 2) for layer in self.rows}
        least = 0.1 + sum(self.full) / len(self.full)

        def ranks_badly(layer: int) -> bool:
            near = max(losses[layer - 1], losses[layer + 1])
            return losses[layer] > max(least, factor * near)

        return [layer for layer in list(losses)[1:-1] if ranks_badly(layer)]

    # ---- what it predicts -----------------------------------------------------------------------
    def table(self, parts: int | None = None) -> Tensor:
        """Losses (layers, parts + 1, answer tokens) of keeping i / `parts` of the tokens.

        parts: None: one for each token. Between two numbers of tokens that were measured, the
        square root of the loss is linear. Layers that cannot be pruned have the losses of the full
        model.
        """
        parts = self.tokens if parts is None else parts
        wanted = torch.arange(parts + 1, dtype=torch.float64) * (self.tokens / parts)
        return torch.stack([self._row(layer, wanted) for layer in range(self.layers)])

    def _row(self, layer: int, wanted: Tensor) -> Tensor:
        """Losses (W, answer tokens) of keeping `wanted` tokens (W,) from a layer on."""
        measured = {**self.rows.get(layer, {}), self.tokens: self.full}
        x = torch.tensor(sorted(measured), dtype=torch.float64)
        roots = torch.tensor([measured[int(n)] for n in x], dtype=torch.float64).sqrt()
        if len(x) == 1:
            return roots.square().round(decimals=9).expand(len(wanted), -1)
        right = torch.searchsorted(x, wanted).clamp(1, len(x) - 1)
        weight = ((wanted - x[right - 1]) / (x[right] - x[right - 1]))[:, None]
        return torch.lerp(roots[right - 1], roots[right], weight).square().round(decimals=9)

    def predict(self, ratios: Tensor) -> Tensor:
        """The loss (C,) that schedules (C, L) are expected to have, in nats.

            loss(r) = mean over answer tokens a of   max over drops (k, n) of   g_k(n)_a

        Exact for one drop. An answer is lost if any of the drops loses it. (The sum over the
        drops instead of the largest counts what is lost twice.)
        """
        return predicted(self.table(), ratios.double())

    # ---- pictures and files ---------------------------------------------------------------------
    def plot(self, path: str | os.PathLike) -> None:
        """Draw it as a heat map, to an `.svg` or `.png` file: see `vispco.plot.plot_profile`."""
        # By its name: what is measured does not depend on how it is drawn.
        import_module("vispco.plot.profile").plot_profile(self, path)

    def to_dict(self) -> dict:
        """A JSON-ready dict, with the schema version."""
        rows = {str(k): {str(n): list(row[n]) for n in row} for k, row in self.rows.items()}
        given = {**asdict(self), "full": list(self.full)}
        ranks = {str(k): {str(n): name for n, name in row.items()} for k, row in self.ranks.items()}
        given |= {"rows": rows, "ranks": ranks}
        return {"schema_version": SCHEMA_VERSION, **given}

    @classmethod
    def from_dict(cls, data: Any) -> Profile:
        """The inverse of `to_dict`. Raises ValueError for anything else."""
        required = {each.name for each in fields(cls)} - {"forward_passes", "versions"}
        data = checked_keys(
            data, "a profile", required=required, optional={"forward_passes", "versions"}
        )
        try:
            rows = {int(k): {int(n): row[n] for n in row} for k, row in data.pop("rows").items()}
            ranks = {int(k): {int(n): row[n] for n in row} for k, row in data.pop("ranks").items()}
        except (AttributeError, TypeError) as error:
            expected = "rows must be {layer: {tokens: losses}}, ranks {layer: {tokens: method}}"
            raise ValueError(expected) from error
        return cls(**{**data, "rows": rows, "ranks": ranks})


def _losses(given: Any) -> tuple[float, ...]:
    losses = tuple(given) if isinstance(given, (list, tuple)) else ()
    if not losses or not all(type(x) in (int, float) and 0 <= x < math.inf for x in losses):
        raise ValueError(
            f"losses must be numbers from 0 on, one for each answer token, got {given!r}"
        )
    return tuple(map(float, losses))


def predicted(table: Tensor, ratios: Tensor, scale: float = math.inf) -> Tensor:
    """The mean over the answer tokens of the largest loss of a drop: (C,), see `Profile.predict`.

    table: (L, parts + 1, A) losses of one drop. ratios: (C, L) kept shares of the tokens.
    scale: of the mean, see `average`.
    """
    before = torch.cat([torch.ones_like(ratios[:, :1]), ratios[:, :-1]], 1)
    places = (ratios * (table.shape[1] - 1)).round().long()
    worst = table[0, -1].expand(len(ratios), -1)
    for k in range(len(table)):
        drops = (ratios[:, k] < before[:, k])[:, None]
        worst = torch.where(drops, torch.maximum(worst, table[k, places[:, k]]), worst)
    return average(worst, scale)


def average(losses: Tensor, scale: float = math.inf) -> Tensor:
    """The exponential mean of losses (..., A) in nats: a lost token counts the same, however far.

        -scale log mean exp(-loss / scale)

    Between the least loss (scale 0) and the mean (scale infinity). A token that is answered wrongly
    may lose 4 nats or 20: chance decides, and a few such tokens decide the mean of a small sample.

    >>> losses = torch.tensor([0.1, 0.1, 20.0])
    >>> [round(float(average(losses, scale)), 2) for scale in (4, math.inf)]
    [1.71, 6.73]
    """
    if math.isinf(scale):
        return losses.mean(-1)
    return -scale * ((-losses / scale).logsumexp(-1) - math.log(losses.shape[-1]))
