"""Schedules by rules that need no gradient: FitPrune's fit of attention statistics, VTW's layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..budget import Budget
from ..calibration import PreparedBatch, frozen, prepare, shapes
from ..config import PruningConfig
from ..evaluate import costs, evaluate
from ..flops import CostModel
from ..methods.fitprune import FitPrune, received
from ..pruning import Masking, unwrapped
from ..registry import adapter_for, build_method
from ..schedule import bisect


# ---- FitPrune's schedule -------------------------------------------------------------------------
def fitprune_schedule(
    model: nn.Module,
    batches: Sequence[Mapping],
    budget: float | str,
    method: str = "fitprune",
    *,
    relative_to: str = "prunable",
    method_options: Mapping | None = None,
) -> PruningConfig:
    """Drop the same share of attention in every layer (FitPrune, arXiv 2409.10197).

    One pass of the full model over `batches` records what each visual token receives from text and
    from visual tokens in each layer, c and e of the method "fitprune". Then, for the least alpha
    that fits the budget, and layer by layer:

        drop C & E,   C = the tokens of least c, as many as have at most alpha of all c
                      E = the tokens of least e, as many as have at most alpha of all e

    The shares that remain, averaged over the samples, are hardened to whole tokens within the
    budget. No gradient, no seed. The attention of layer i - 1 decides about the input of layer i,
    so layer 0 keeps everything. Departs from the authors' code: shares are of what the tokens still
    present receive, and the FLOPs are those of `Budget`.

    method: who ranks the tokens when the schedule is applied; the fit is the same.
    Other arguments and errors: as of `vispco.search`.
    """
    model = unwrapped(model)
    adapter = adapter_for(model)(model)
    scorer = build_method(method, method_options)
    prepared = prepare(model, batches)
    cost = CostModel(adapter.dimensions(adapter.config), scorer)
    first = max(1, scorer.first_layer)
    limit = Budget(budget, cost, *shapes(prepared), first, relative_to)
    masses, valid = attention_masses(model, prepared)

    def too_dear(alpha: Tensor) -> Tensor:
        counts = (remaining(masses, valid, alpha, first) * limit.tokens).round().long()
        return ~limit.fits(counts)

    nothing = torch.zeros((), dtype=torch.float64)
    _, alpha = bisect(too_dear, nothing, nothing + 1, halvings=40)
    ratios = limit.harden(remaining(masses, valid, alpha, first))
    options, family = method_options or {}, adapter.config.model_type
    config = PruningConfig(method, ratios, options, family, budget, n_visual=limit.tokens)
    return replace(config, flops=float(costs(adapter, prepared, config)[0].mean()))


def remaining(masses: Tensor, valid: Tensor, alpha: float | Tensor, first_layer: int = 1) -> Tensor:
    """Mean share (L,) of visual tokens that enter each layer if `alpha` of the mass may go in each.

    masses: (S, L - 1, 2, V) what each token receives in two ways, in all layers but the last.
    valid: (S, V) bool, which tokens exist.

    >>> even = torch.ones(1, 3, 2, 8)
    >>> (remaining(even, torch.ones(1, 8, dtype=torch.bool), 0.25) * 8).tolist()
    [8.0, 6.0, 5.0, 4.0]
    """
    present, shares = valid, [torch.ones((), dtype=torch.float64)]
    for layer in range(1, masses.shape[1] + 1):
        mass = (masses[:, layer - 1] * present[:, None]).double()  # (S, 2, V)
        order = mass.masked_fill(~present[:, None], float("inf")).argsort(dim=-1, stable=True)
        prefix = mass.gather(-1, order).cumsum(-1)
        least = torch.zeros_like(order, dtype=torch.bool)
        least = least.scatter(-1, order, prefix <= alpha * prefix[..., -1:])
        if layer >= first_layer:
            present = present & ~least.all(1)
        shares.append((present.sum(1) / valid.sum(1).double()).mean())
    return torch.stack(shares)


def attention_masses(model: nn.Module, prepared: Sequence[PreparedBatch]) -> tuple[Tensor, Tensor]:
    """Attention that each visual token receives from text and from visual tokens.

    First result: (S, L - 1, 2, V), of the full model, in all layers but the last. Second result:
    which tokens exist, (S, V) bool. S: samples that have any.
    """
    adapter = adapter_for(model)(model)
    if not all(map(adapter.attends, range(len(adapter.layers)))):
        raise ValueError(
            f"FitPrune's fit reads the attention of every layer, and some of "
            f"{type(model).__name__} have none: search a configuration instead"
        )
    # Ratios without a gradient that keep everything: the pruner would hook no layer.
    everything = torch.ones(len(adapter.layers), requires_grad=True)
    masses, valid = [], []
    observer = _Observer(adapter, FitPrune(), everything)
    with frozen(model), observer.install(), torch.no_grad():
        for batch in prepared:
            observer.seen = []
            observer.run(batch)
            masses.append(torch.stack([mass for mass, _ in observer.seen], 1))  # (B, L - 1, 2, V)
            valid.append(observer.seen[0][1])
    width = max(real.shape[1] for real in valid)
    mass = torch.cat([pad(x, (0, width - x.shape[-1])) for x in masses])
    real = torch.cat([pad(x, (0, width - x.shape[-1])) for x in valid])
    return mass[real.any(1)], real[real.any(1)]


class _Observer(Masking):
    """Writes down what visual tokens receive in the layer just run, and prunes nothing."""

    seen: list[tuple[Tensor, Tensor]]

    def enter(self, i: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        state = self.state
        if i >= self.method.first_layer:
            ctx = state.context(i, hidden, state.left, lambda: None)
            mass = torch.stack(received(ctx), 1) * ctx.valid[:, None]
            self.seen.append((mass.cpu(), ctx.valid.cpu()))
        return hidden, {}


# ---- VTW's schedule ------------------------------------------------------------------------------
def vtw_schedule(
    model: nn.Module, batches: Sequence[Mapping], threshold: float = 0.003, samples: int = 20
) -> PruningConfig:
    """Drop all visual tokens at the first layer where that hardly shows (VTW, arXiv 2405.05803).

        K = min {k : KL(without visual tokens from layer k on || full) <= threshold}

    KL: mean over the answer tokens of the first batches that hold `samples` samples (all, if there
    are fewer), in nats. If no layer will do, nothing is dropped. Raises ValueError as
    `vispco.evaluate` does, and for a negative threshold or no samples.
    """
    if not threshold >= 0 or samples < 1:
        raise ValueError(
            f"threshold must be 0 or more and samples at least 1, got {threshold!r} and {samples!r}"
        )
    model = unwrapped(model)
    prepared = prepare(model, batches)
    used: list[PreparedBatch] = []
    while prepared and sum(map(len, used)) < samples:
        used.append(prepared.pop(0))
    adapter = adapter_for(model)(model)
    layers, family = len(adapter.layers), adapter.config.model_type
    for k in range(layers):
        ratios = [1.0] * k + [0.0] * (layers - k)
        config = PruningConfig("vtw", ratios, model_type=family)
        if evaluate(model, used, config).kl <= threshold:
            return config
    return PruningConfig("vtw", [1.0] * layers, model_type=family)
