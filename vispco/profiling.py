"""`vispco.profile`: what a model does with its image, layer by layer.

    g_k(n) = loss when everything is kept until layer k, and n visual tokens from there on

It tells in which layers the image is read, which layers rank its tokens badly, and from which
layer on it is dead weight. `vispco.search(start="profile")` plans schedules by it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import PreparedBatch, frozen, prepare, run_teacher
from .pruning._prefix import Prefix
from .pruning.dropping import Dropping
from .pruning.forward import answer_logits, check_objective, during, token_losses
from .registry import adapter_for, build_method, named_options
from .utils.distributed import gathered, total
from .utils.files import SCHEMA_VERSION, JsonFile, checked_keys
from .utils.journal import Journal, opened
from .utils.version import versions

#: Shares of the tokens that a row of the profile may measure.
SHARES = (0, 1 / 64, 1 / 16, 1 / 8, 7 / 32, 3 / 8, 9 / 16, 3 / 4, 7 / 8, 15 / 16)
#: Losses below this many nats are as good as 0.
FREE = 0.01


@dataclass(frozen=True)
class Profile(JsonFile):
    """The losses of keeping `n` visual tokens from layer `k` on, and all of them before.

    method, method_options: what ranks the tokens. model_type, layers: of the model.
    tokens: visual tokens of the largest prompt, of which the numbers kept are counted.
    first_layer: the first layer that can be pruned.
    objective: what was measured, "kl" or "task".
    full: the loss of the full model at each answer token, in nats.
    rows: {layer: {tokens kept: the loss at each answer token, in nats}}.
    forward_passes: what it cost, in forward passes of one question. A pass that begins at a later
        layer counts as the part of the layers that ran.
    Raises ValueError for anything else.

    >>> tokens = {0: [2.0, 0.0], 4: [0.5, 0.0]}
    >>> profile = Profile("fastv", {}, "llava", 2, 8, 1, "kl", [0.0, 0.0], {1: tokens})
    >>> profile.loss(1, 4), profile.loss(1, 8), profile.predict(torch.tensor([[1.0, 0.5]])).tolist()
    (0.25, 0.0, [0.25])
    """

    method: str
    method_options: Mapping[str, Any]
    model_type: str
    layers: int
    tokens: int
    first_layer: int
    objective: str
    full: Sequence[float]
    rows: Mapping[int, Mapping[int, Sequence[float]]]
    forward_passes: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        build_method(self.method, self.method_options)
        rows = {k: {n: tuple(row[n]) for n in sorted(row)} for k, row in self.rows.items()}
        object.__setattr__(self, "full", tuple(self.full))
        object.__setattr__(self, "rows", rows)
        check_objective(self.objective)
        inside = range(self.first_layer, self.layers)
        if list(self.rows) != list(inside):
            expected = f"rows must be of the layers {self.first_layer} to {self.layers - 1}"
            raise ValueError(f"{expected}, got {list(self.rows)}")
        for layer, row in self.rows.items():
            if 0 not in row or not all(0 <= n < self.tokens for n in row):
                expected = f"numbers from 0, which is there, up to {self.tokens - 1}"
                raise ValueError(f"rows[{layer}] must be of {expected}, got {list(row)}")
            if any(len(losses) != len(self.full) for losses in row.values()):
                raise ValueError(f"rows[{layer}] must have {len(self.full)} losses each")

    # ---- what it says ---------------------------------------------------------------------------
    def loss(self, layer: int, tokens: int) -> float:
        """g_k(n): the mean loss over the answer tokens, in nats.

        Between the numbers that were measured, it is as `table` says.
        """
        return float(self.table([tokens])[layer, 0].mean())

    def noise(self, layer: int, tokens: int) -> float:
        """The standard error of `loss`, in nats."""
        losses = self.table([tokens])[layer, 0]
        return float(losses.std() / len(losses) ** 0.5) if len(losses) > 1 else math.inf

    def exit(self, tolerance: float = FREE) -> int | None:
        """The first layer from which on no token is needed: losing all costs `tolerance` nats more
        at most, there and in every later layer; None if there is no such layer."""
        base, found = sum(self.full) / len(self.full), None
        for layer in reversed(self.rows):
            if self.loss(layer, 0) > base + tolerance:
                break
            found = layer
        return found

    def traps(self, factor: float = 3.0) -> list[int]:
        """Layers that rank badly: a drop of half of the tokens costs `factor` times as much as at
        the layer before or after, whichever is worse, and at least 0.1 nats."""
        half, found = self.tokens // 2, []
        losses = {layer: self.loss(layer, half) for layer in self.rows}
        for layer, loss in losses.items():
            near = [losses[i] for i in (layer - 1, layer + 1) if i in losses]
            if near and loss > 0.1 + sum(self.full) / len(self.full) and loss > factor * max(near):
                found.append(layer)
        return found

    # ---- what it predicts -----------------------------------------------------------------------
    def table(self, counts: Sequence[int] | None = None) -> Tensor:
        """Losses (layers, len(counts), answer tokens) of keeping `counts` tokens; None: 0 to all.

        Between two numbers that were measured, the square root of the loss is linear. Layers that
        cannot be pruned have the losses of the full model.
        """
        wanted = torch.arange(self.tokens + 1) if counts is None else torch.tensor(counts)
        full = torch.tensor(self.full, dtype=torch.float64)
        table = full.expand(self.layers, len(wanted), -1).clone()
        for layer, row in self.rows.items():
            measured = {**row, self.tokens: self.full}
            x = torch.tensor(sorted(measured))
            y = torch.tensor([list(measured[n]) for n in x.tolist()], dtype=torch.float64)
            right = torch.searchsorted(x, wanted).clamp(1, len(x) - 1)
            left = right - 1
            weight = ((wanted - x[left]) / (x[right] - x[left]))[:, None]
            y = y.clamp(min=0).sqrt()
            table[layer] = torch.lerp(y[left], y[right], weight.double()).square().round(decimals=9)
        return table

    def predict(self, ratios: Tensor) -> Tensor:
        """The loss (C,) that schedules (C, L) are expected to have, in nats.

            loss(r) = mean over answer tokens a of   max over drops (k, n) of   g_k(n)_a

        Exact for one drop. An answer is lost if any of the drops loses it. (The sum over the
        drops instead of the largest counts what is lost twice.)
        """
        counts = (ratios.double() * self.tokens).round().long()
        return predicted(self.table(), counts)

    # ---- pictures and files ---------------------------------------------------------------------
    def plot(self, path: str | os.PathLike) -> None:
        """Draw it as a heat map, to an `.svg` or `.png` file: see `vispco.plot.plot_profile`."""
        from .plot.profile import plot_profile

        plot_profile(self, path)

    def to_dict(self) -> dict:
        """A JSON-ready dict, with the schema version."""
        rows = {str(k): {str(n): list(row[n]) for n in row} for k, row in self.rows.items()}
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "rows": rows}

    @classmethod
    def from_dict(cls, data: Any) -> Profile:
        """The inverse of `to_dict`. Raises ValueError for anything else."""
        required = {each.name for each in fields(cls)} - {"forward_passes", "versions"}
        data = checked_keys(
            data, "a profile", required=required, optional={"forward_passes", "versions"}
        )
        rows = {
            int(k): {int(n): tuple(map(float, losses)) for n, losses in row.items()}
            for k, row in data.pop("rows").items()
        }
        return cls(**{**data, "rows": rows})


def predicted(table: Tensor, counts: Tensor) -> Tensor:
    """The mean over the answer tokens of the largest loss of a drop: (C,), see `Profile.predict`.

    table: (L, tokens + 1, A) losses of one drop. counts: (C, L) whole tokens.
    """
    layers, most, _ = table.shape
    before = torch.cat([torch.full_like(counts[:, :1], most - 1), counts[:, :-1]], 1)
    worst = table[0, -1].expand(len(counts), -1)
    for k in range(layers):
        drops = (counts[:, k] < before[:, k])[:, None]
        worst = torch.where(drops, torch.maximum(worst, table[k, counts[:, k]]), worst)
    return worst.mean(-1)


def profile(
    model: nn.Module,
    batches: Sequence[Mapping],
    method: str | Mapping = "fastv",
    *,
    objective: str = "kl",
    measurements: int = 6,
    journal: Journal | str | os.PathLike | None = None,
    callback: Callable[[dict], Any] | None = None,
) -> Profile:
    """Measure what it costs to keep n visual tokens from layer k on, for every layer.

    model: any vision-language model whose decoder holds visual tokens. Its weights are not changed.
    batches: dicts of model inputs with `labels`, as of `vispco.search`. 32 questions are enough to
        plan by.
    method: a registered pruning method, a name or a mapping {"name": ..., **options}.
    objective: "kl", the divergence from the full model's answers, or "task".
    measurements: most numbers of tokens that are measured at one layer. The first is 0. The next
        ones are where the loss changes most. A layer is left as soon as it is known: where the
        loss of no token at all is that of the full model, one measurement is enough.
    journal: a file that holds every measurement; the same profile goes on after the last one.
    callback: called with a dict after every measurement (layer, tokens, loss).
    Raises ValueError for bad input, FloatingPointError for numbers that are not finite.

    All measurements of one layer share the layers before it, which run once.

    >>> from vispco import testbed
    >>> model, _ = testbed.load("testbed-llava")
    >>> found = profile(model, testbed.batches("calibration", n=32, batch_size=32))
    >>> found.loss(1, 0) > found.loss(7, 0), found.exit()
    (True, 6)
    """
    check_objective(objective)
    name, options = named_options("method", method)
    prepared = prepare(model, batches, keep_features=True)
    asked = {"method": name, "method_options": options, "objective": objective}
    with opened(journal) as kept, frozen(model):
        kept.begin("vispco.profile", model, prepared, {**asked, "measurements": measurements})
        run_teacher(model, prepared)
        return measured(model, prepared, name, options, objective, measurements, kept, callback)


def measured(
    model: nn.Module,
    prepared: Sequence[PreparedBatch],
    name: str,
    options: Mapping[str, Any],
    objective: str = "kl",
    measurements: int = 6,
    journal: Journal | None = None,
    callback: Callable[[dict], Any] | None = None,
) -> Profile:
    """The profile of prepared batches, whose teacher has run, on a frozen model."""
    adapter = adapter_for(model)(model)
    method = build_method(name, options)
    runs = _Runs(adapter, method, prepared, objective, journal or Journal())
    rows: dict[int, dict[int, list[float]]] = {}
    for layer in range(runs.first_layer, runs.layers):
        row = rows[layer] = {}
        while (tokens := _next(row, runs, measurements)) is not None:
            row[tokens] = runs.losses(layer, tokens)
            if callback:
                mean = sum(row[tokens]) / len(row[tokens])
                callback({"layer": layer, "tokens": tokens, "loss": mean})
    own = (name, dict(options), adapter.config.model_type, runs.layers, runs.tokens)
    passes = round(runs.passes + runs.samples, 3)
    return Profile(*own, runs.first_layer, objective, runs.full, rows, passes, versions=versions())


def _next(row: Mapping[int, Sequence[float]], runs: _Runs, most: int) -> int | None:
    """How many tokens to measure next at a layer: in the middle of the steepest part; None: done.

    Steep is what changes the logarithm of (loss + 0.01) by more than 1.
    """
    levels = sorted({math.floor(share * runs.tokens) for share in SHARES} | {runs.tokens})
    if not row:
        return 0
    if len(row) == most:
        return None
    known = {**row, runs.tokens: runs.full}
    places = [i for i, level in enumerate(levels) if level in known]
    heights = [math.log(max(0.0, sum(known[levels[i]]) / len(runs.full)) + FREE) for i in places]
    best, found = 1.0, None
    for j in range(len(places) - 1):
        steep = heights[j] - heights[j + 1]
        if places[j + 1] - places[j] > 1 and steep > best:
            best, found = steep, levels[(places[j] + places[j + 1]) // 2]
    return found


class _Runs:
    """Measures single drops on all batches, and counts the forward passes."""

    def __init__(self, adapter, method, prepared, objective: str, journal: Journal):
        self.adapter, self.prepared, self.journal = adapter, list(prepared), journal
        self.objective = objective
        self.pruner = Dropping(adapter, method, torch.ones(len(adapter.layers)))
        self.first_layer, self.layers = self.pruner.first_layer, len(adapter.layers)
        most = max(int(batch.n_visual.max()) for batch in prepared)
        self.tokens = int(gathered(torch.tensor([most])).max())
        self.samples = total(sum(map(len, prepared)))
        self.passes = 0.0
        self.prefixes = [Prefix(adapter, batch) for batch in prepared]
        self.full = self._gathered(lambda i: self.prepared[i].log_probs)
        # The layers of the prefix that have been counted.
        self._known = 0

    def losses(self, layer: int, tokens: int) -> list[float]:
        """The loss at each answer token of all processes, `tokens` kept from `layer` on."""
        asked = {"layer": layer, "tokens": tokens}
        with during(f"layer {layer}, {tokens} tokens"):
            found = self.journal.recall(asked, lambda: self._measure(layer, tokens))
        begin = self._begin(layer)
        self.passes += self.samples * (self.layers - min(begin, self._known)) / self.layers
        self._known = max(begin, self._known)
        return found

    def _measure(self, layer: int, tokens: int) -> list[float]:
        ratios = torch.ones(self.layers, dtype=torch.float64)
        ratios[layer:] = tokens / self.tokens
        begin = self._begin(layer)

        def logits(i: int) -> Tensor:
            self.prefixes[i].advance(begin)
            with self.prefixes[i].replayed(begin):
                return self.pruner.run(self.prepared[i], ratios)

        with self.pruner:
            return self._gathered(logits)

    def _begin(self, layer: int) -> int:
        """Where a pass may begin: at the last attention before the drop, which methods may read."""
        before = [i for i in range(layer) if self.adapter.attends(i)]
        return before[-1] if before and self.shares else 0

    @cached_property
    def shares(self) -> bool:
        """Whether a pass that begins in the middle gives the full model's answers, to the bit.

        Not where later layers read more of the earlier ones than the hidden states.
        """
        batch, middle = self.prepared[0], self.layers // 2
        prefix = Prefix(self.adapter, batch)
        try:
            prefix.advance(middle)
            with torch.no_grad(), prefix.replayed(middle):
                found = answer_logits(self.adapter.model, batch).log_softmax(-1)
        except Exception:
            # Some layer misses what others left for it.
            return False
        return torch.equal(found, batch.log_probs)

    @torch.no_grad()
    def _gathered(self, logits: Callable[[int], Tensor]) -> list[float]:
        found = []
        for i, batch in enumerate(self.prepared):
            found.append(token_losses(logits(i), batch, self.objective).cpu())
        return [round(loss, 6) for loss in gathered(torch.cat(found)).tolist()]
