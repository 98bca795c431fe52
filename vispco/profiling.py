"""`vispco.profile`: what a model does with its image, layer by layer.

    g_k(n) = loss when everything is kept until layer k, and n visual tokens from there on

It tells in which layers the image is read, which layers rank its tokens badly, and from which
layer on it is dead weight. `vispco.search(start="profile")` plans schedules by it.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import PreparedBatch, frozen, prepare, run_teacher
from .pruning._prefix import Prefix
from .pruning.dropping import Dropping
from .pruning.forward import answer_logits, check_objective, during, token_losses
from .registry import adapter_for, build_method, is_composite, named_options
from .utils.distributed import gathered, total
from .utils.files import SCHEMA_VERSION, JsonFile, checked_keys
from .utils.journal import Journal, opened
from .utils.version import versions

#: Shares of the tokens that a row of the profile may measure.
SHARES = (0, 1 / 64, 1 / 16, 1 / 8, 7 / 32, 3 / 8, 9 / 16, 3 / 4, 7 / 8, 15 / 16)
#: Of these with the tokens themselves: where several methods race, few kept and many.
PROBES = -8, -4
#: The methods of method="auto": rankings by attention, by the tower, by differences; no ranking.
AUTO = ["fastv", "pdrop", "sparsevlm", "visionzip", "vispruner", "divprune", "strided", "pool"]
#: Losses below this many nats are as good as 0.
FREE = 0.01


@dataclass(frozen=True)
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
    Raises ValueError for anything else.

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
        object.__setattr__(self, "ranks", ranks)
        who = {name for row in ranks.values() for name in row.values()}
        if {k: {*row} for k, row in rows.items()} != {k: {*row} for k, row in ranks.items()} or (
            not who <= set(self.methods)
        ):
            expected = f"one of {', '.join(self.methods)} for each measurement in rows"
            raise ValueError(f"ranks must be {expected}, got {ranks}")

    @property
    def first_layer(self) -> int:
        """The first layer that can be pruned."""
        return min(self.rows)

    @property
    def method(self) -> str:
        """The names of the methods, in a word."""
        return ", ".join(self.methods)

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
            kept = ratios[layer] * self.tokens
            # Where nothing is kept, whoever ranks is the same.
            near = [n for n in self.ranks[layer] if n] or [0]
            name = self.ranks[layer][min(near, key=lambda n: abs(n - kept))]
            if not parts or (kept and name != last):
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
        the layer before or after, whichever is worse, and at least 0.1 nats."""
        half, found = self.tokens // 2, []
        losses = {layer: self.loss(layer, half) for layer in self.rows}
        for layer, loss in losses.items():
            near = [losses[i] for i in (layer - 1, layer + 1) if i in losses]
            if near and loss > 0.1 + sum(self.full) / len(self.full) and loss > factor * max(near):
                found.append(layer)
        return found

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
        from .plot.profile import plot_profile

        plot_profile(self, path)

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


def predicted(table: Tensor, ratios: Tensor) -> Tensor:
    """The mean over the answer tokens of the largest loss of a drop: (C,), see `Profile.predict`.

    table: (L, parts + 1, A) losses of one drop. ratios: (C, L) kept shares of the tokens.
    """
    before = torch.cat([torch.ones_like(ratios[:, :1]), ratios[:, :-1]], 1)
    places = (ratios * (table.shape[1] - 1)).round().long()
    worst = table[0, -1].expand(len(ratios), -1)
    for k in range(len(table)):
        drops = (ratios[:, k] < before[:, k])[:, None]
        worst = torch.where(drops, torch.maximum(worst, table[k, places[:, k]]), worst)
    return worst.mean(-1)


def profile(
    model: nn.Module,
    batches: Sequence[Mapping],
    method: str | Mapping | Sequence = "fastv",
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
    method: a registered pruning method, a name or a mapping {"name": ..., **options}; or several of
        them, a list or "auto" (`AUTO`), of which the profile has each layer's best.
    objective: "kl", the divergence from the full model's answers, or "task".
    measurements: most numbers of tokens that are measured at one layer. The first is 0. The next
        ones are where the loss changes most. A layer is left as soon as it is known: where the
        loss of no token at all is that of the full model, one measurement is enough.
    journal: a file that holds every measurement; the same profile goes on after the last one.
    callback: called with a dict after every measurement (layer, tokens, method, loss).
    Raises ValueError for bad input, FloatingPointError for numbers that are not finite.

    All measurements of one layer share the layers before it, which run once. Without any token,
    all methods are the same: that is measured once. Several methods race at each layer on the first
    batch, with few tokens kept and with many; the winners are measured on all batches, and the
    profile has the better one of each measurement. One that this model does not serve is left out,
    with a warning.

    >>> from vispco import testbed
    >>> model, _ = testbed.load("testbed-llava")
    >>> found = profile(model, testbed.batches("calibration", n=32, batch_size=32))
    >>> found.loss(1, 0) > found.loss(7, 0), found.exit()
    (True, 6)
    """
    check_objective(objective)
    methods = named_methods(method)
    prepared = prepare(model, batches, keep_features=True)
    asked = {"methods": methods, "objective": objective, "measurements": measurements}
    with opened(journal) as kept, frozen(model):
        kept.begin("vispco.profile", model, prepared, asked)
        run_teacher(model, prepared)
        return measured(model, prepared, methods, objective, measurements, kept, callback)


def named_methods(method: str | Mapping | Sequence) -> dict[str, dict[str, Any]]:
    """{name: options} of one method or several: a name, a mapping, a list of these, or "auto".

    Raises ValueError for an unknown method or option, or for one method twice.

    >>> named_methods(["fastv", {"name": "visionzip", "contextual": 0.2}])
    {'fastv': {}, 'visionzip': {'contextual': 0.2}}
    """
    given: Any = AUTO if method == "auto" else method
    several = given if isinstance(given, (list, tuple)) else [given]
    found = dict(named_options("method", each) for each in several)
    composite = len(found) > 1 and any(map(is_composite, found))
    if not found or len(found) < len(several) or composite:
        expected = "several methods must be different ones, at least one, and no composites"
        raise ValueError(f"{expected}, got {method!r}")
    for name, options in found.items():
        build_method(name, options)
    return found


def measured(
    model: nn.Module,
    prepared: Sequence[PreparedBatch],
    methods: Mapping[str, Mapping[str, Any]],
    objective: str = "kl",
    measurements: int = 6,
    journal: Journal | None = None,
    callback: Callable[[dict], Any] | None = None,
) -> Profile:
    """The profile of prepared batches, whose teacher has run, on a frozen model."""
    adapter = adapter_for(model)(model)
    built = {name: build_method(name, options) for name, options in methods.items()}
    runs = _Runs(adapter, built, prepared, objective, journal or Journal(), callback)
    rows: dict[int, dict[int, list[float]]] = {}
    ranks: dict[int, dict[int, str]] = {}
    race = _Race(runs)
    for layer in range(min(runs.first_layers.values()), runs.layers):
        able = race.able(layer)
        row, who = {0: runs.losses(layer, 0, able[0])}, {0: able[0]}
        few, many, levels = able[0], able[0], []
        if len(able) > 1 and _next(row, runs, 2) is not None:
            few, many = race.best(layer)
            levels = race.levels
        least, most = race.levels
        while (tokens := levels.pop() if levels else _next(row, runs, measurements)) is not None:
            # Between the two levels of the race, either winner may be the better one.
            names = {few} if tokens <= least else {many} if tokens >= most else {few, many}
            found = {name: runs.losses(layer, tokens, name) for name in sorted(names)}
            who[tokens] = min(found, key=lambda name: _mean(found[name]))
            row[tokens] = found[who[tokens]]
        rows[layer], ranks[layer] = row, who
    own = (dict(methods), adapter.config.model_type, runs.layers, runs.tokens, objective)
    passes = round(runs.passes + runs.samples, 3)
    return Profile(*own, runs.full, rows, ranks, passes, versions())


class _Race:
    """Which of several methods rank best at a layer, on the first batch.

    At the first layers all of them run. Later the best four so far do, and the others in turn.
    """

    def __init__(self, runs: _Runs):
        self.runs = runs
        # The methods that have run, best first.
        self.standing: list[str] = []

    @property
    def levels(self) -> list[int]:
        """The two numbers of tokens kept at which the methods race."""
        return [_levels(self.runs.tokens)[i] for i in PROBES]

    def able(self, layer: int) -> list[str]:
        """The methods that can rank what enters a layer, the best so far first."""
        names = [name for name, first in self.runs.first_layers.items() if first <= layer]
        return [*self.standing, *(name for name in names if name not in self.standing)]

    def best(self, layer: int) -> list[str]:
        """The best method where few tokens are kept, and the best where many are."""
        names, runs = self.able(layer), self.runs
        known = len(self.standing)
        in_turn = names[4:known][layer % max(1, known - 4) :][:1]
        racers = names[:4] + in_turn + names[max(4, known) :]
        found = {}
        for name in list(racers):
            try:
                found[name] = [_mean(runs.losses(layer, n, name, part=1)) for n in self.levels]
            except ValueError as error:
                # Some read a tower, or places, that this model does not tell.
                warnings.warn(f"{name} is left out: {error}", stacklevel=2)
                racers.remove(name)
                del runs.first_layers[name]
        if not racers:
            raise ValueError(f"none of {', '.join(names)} can rank what enters layer {layer}")
        ranked = sorted(racers, key=lambda name: sum(math.log(x + FREE) for x in found[name]))
        self.standing = [*ranked, *(name for name in self.standing if name not in racers)]
        return [min(racers, key=lambda name: found[name][i]) for i in range(len(self.levels))]


def _levels(tokens: int) -> list[int]:
    """The numbers of tokens that a row may measure, and all of them, rising."""
    return sorted({math.floor(share * tokens) for share in SHARES} | {tokens})


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)


def _next(row: Mapping[int, Sequence[float]], runs: _Runs, most: int) -> int | None:
    """How many tokens to measure next at a layer: in the middle of the steepest part; None: done.

    Steep is what changes the logarithm of (loss + 0.01) by more than 1.
    """
    if len(row) >= most:
        return None
    known, places = {**row, runs.tokens: runs.full}, _levels(runs.tokens)
    found = [i for i, level in enumerate(places) if level in known]
    heights = [math.log(max(0.0, _mean(known[places[i]])) + FREE) for i in found]
    best, chosen = 1.0, None
    for (i, high), (j, low) in itertools.pairwise(zip(found, heights, strict=True)):
        if j - i > 1 and high - low > best:
            best, chosen = high - low, places[(i + j) // 2]
    return chosen


class _Runs:
    """Measures single drops, and counts the forward passes.

    methods: {name: method}. first_layers: the first layer that each can prune.
    """

    def __init__(self, adapter, methods, prepared, objective, journal: Journal, callback=None):
        self.adapter, self.prepared, self.journal = adapter, list(prepared), journal
        self.objective, self.callback = objective, callback
        full = torch.ones(len(adapter.layers))
        self.pruners = {name: Dropping(adapter, each, full) for name, each in methods.items()}
        self.first_layers = {name: each.first_layer for name, each in self.pruners.items()}
        self.layers = len(adapter.layers)
        most = max(int(batch.n_visual.max()) for batch in prepared)
        self.tokens = int(gathered(torch.tensor([most])).max())
        self.samples = total(sum(map(len, prepared)))
        self.prefixes = [Prefix(adapter, batch) for batch in prepared]
        self.full = self._gathered(lambda i: self.prepared[i].log_probs)
        # Whether passes share their first layers. To know it takes about two passes of one batch.
        self.shares = journal.recall({"shares": len(prepared)}, self._shares)
        self.passes = 2.0 * total(len(prepared[0]))
        # The layers of the prefixes that have been counted.
        self._known = [0] * len(prepared)

    def losses(self, layer: int, tokens: int, name: str, part: int | None = None) -> list[float]:
        """The loss at each answer token, `tokens` kept from `layer` on.

        name: of the method. part: of how many batches, the first ones; None: all.
        """
        batches = range(len(self.prepared))[:part]
        asked = {"layer": layer, "tokens": tokens, "method": name, "batches": len(batches)}
        with during(f"{name}, layer {layer}, {tokens} tokens"):
            make = partial(self._measure, layer, tokens, name, batches)
            losses = self.journal.recall(asked, make)
        begin = self._begin(layer)
        for i in batches:
            layers = self.layers - min(begin, self._known[i])
            self.passes += total(len(self.prepared[i])) * layers / self.layers
            self._known[i] = max(begin, self._known[i])
        if self.callback:
            self.callback({**asked, "loss": _mean(losses)})
        return losses

    def _measure(self, layer: int, tokens: int, name: str, batches: Sequence[int]) -> list[float]:
        ratios = torch.ones(self.layers, dtype=torch.float64)
        ratios[layer:] = tokens / self.tokens
        begin, pruner = self._begin(layer), self.pruners[name]

        def logits(i: int) -> Tensor:
            self.prefixes[i].advance(begin)
            with self.prefixes[i].replayed(begin):
                return pruner.run(self.prepared[i], ratios)

        with pruner:
            return self._gathered(logits, batches)

    def _begin(self, layer: int) -> int:
        """Where a pass may begin: at the last attention before the drop, which methods may read."""
        before = [i for i in range(layer) if self.adapter.attends(i)]
        return before[-1] if before and self.shares else 0

    def _shares(self) -> bool:
        """Whether a pass that begins in the middle gives the full model's answers, to the bit.

        Not where later layers read more of the earlier ones than the hidden states.
        """
        batch, prefix = self.prepared[0], Prefix(self.adapter, self.prepared[0])
        try:
            for layers in sorted({self.layers // 2, self.layers - 1} - {0}):
                prefix.advance(layers)
                with torch.no_grad(), prefix.replayed(layers):
                    found = answer_logits(self.adapter.model, batch).log_softmax(-1)
                if not torch.equal(found, batch.log_probs):
                    return False
        except Exception:
            # Some layer misses what others left for it.
            return False
        return True

    @torch.no_grad()
    def _gathered(
        self, logits: Callable[[int], Tensor], batches: Sequence[int] | None = None
    ) -> list[float]:
        """The losses of all processes at the answer tokens of some batches; None: of all."""
        numbers = range(len(self.prepared)) if batches is None else batches
        found = [token_losses(logits(i), self.prepared[i], self.objective) for i in numbers]
        losses = gathered(torch.cat(found).cpu()).clamp(min=0)
        return [round(loss, 6) for loss in losses.tolist()]
