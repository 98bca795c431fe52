"""Schedules by rules that need no gradient: FitPrune's fit of attention statistics, VTW's layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..budget import Budget
from ..config import PruningConfig
from ..evaluate import costs, evaluate
from ..flops import CostModel
from ..methods.base import Method
from ..methods.fitprune import received
from ..pruning import Masking
from ..registry import adapter_for, build_method
from ..calibration import PreparedBatch, prepare, shapes


# ---- FitPrune's schedule -----------------------------------------------------------------------------------
def fitprune_schedule(model: nn.Module, batches: Sequence[Mapping], budget: float | str,
                      method: str = "fitprune", *, relative_to: str = "prunable",
                      method_options: Mapping | None = None) -> PruningConfig:
    """Drop the same share of attention in every layer: as much as the budget asks for (FitPrune, 2409.10197).

    One pass of the full model over `batches` records what each visual token receives from text and from
    visual tokens in each layer, c and e of the method "fitprune". Then, for the least alpha that fits the
    budget, and layer by layer:

        drop C & E,   C = the tokens of least c, as many as have at most alpha of all c;   E = the same of e

    The shares that remain, averaged over the samples, are hardened to whole tokens within the budget. No
    gradient, no seed. The attention of layer i - 1 decides about the input of layer i, so layer 0 keeps
    everything. Departs from the authors' code: shares are of what the tokens still present receive, and the
    FLOPs are those of `Budget`.
    method: who ranks the tokens when the schedule is applied; the fit is the same. Other arguments and
    errors: as of `vispco.search`.
    """
    adapter = adapter_for(model)(model)
    scorer = build_method(method, method_options)
    prepared = prepare(model, batches)
    cost = CostModel(adapter.dimensions(adapter.config), scorer)
    first = max(1, scorer.first_layer)
    limit = Budget(budget, cost, *shapes(prepared), first, relative_to)
    masses, valid = attention_masses(model, prepared)

    def fits(alpha: float) -> bool:
        counts = (remaining(masses, valid, alpha, first) * limit.tokens).round().long()
        return limit.holds(counts.tolist())

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    ratios = limit.harden(remaining(masses, valid, high, first))
    config = PruningConfig(method, ratios, method_options or {}, adapter.config.model_type, budget,
                           n_visual=limit.tokens)
    return replace(config, flops=float(costs(adapter, prepared, config)[0].mean()))


def remaining(masses: Tensor, valid: Tensor, alpha: float, first_layer: int = 1) -> Tensor:
    """Mean share (L,) of visual tokens that enter each layer if `alpha` of the mass may go in each.

    masses: (S, L - 1, 2, V) what each token receives in two ways, in all layers but the last.
    valid: (S, V) bool.

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
    """Attention that each visual token receives from text and from visual tokens: (S, L - 1, 2, V).

    Of the full model, in all layers but the last. Second result: which tokens exist, (S, V) bool.
    S: samples that have any.
    """
    adapter, recorder = adapter_for(model)(model), _Recorder()
    everything = torch.ones(len(adapter.layers), requires_grad=True)  # or the pruner would hook no layer
    training = model.training
    masses: list[Tensor] = []
    valid: list[Tensor] = []
    model.eval()
    try:
        with _Observer(adapter, recorder, everything).install() as observer, torch.no_grad():
            for prepared_batch in prepared:
                recorder.seen = []
                observer.run(prepared_batch)
                masses.append(torch.stack([mass for mass, _ in recorder.seen], 1))  # (B, L - 1, 2, V)
                valid.append(recorder.seen[0][1])
    finally:
        model.train(training)
    width = max(v.shape[1] for v in valid)
    mass, real = (torch.cat([pad(x, (0, width - x.shape[-1])) for x in xs]) for xs in (masses, valid))
    return mass[real.any(1)], real[real.any(1)]


class _Recorder(Method):
    """Writes down the attention that it could rank by."""

    seen: list[tuple[Tensor, Tensor]]

    def score(self, ctx):
        self.seen.append((torch.stack(received(ctx), 1).cpu() * ctx.valid[:, None].cpu(), ctx.valid.cpu()))


class _Observer(Masking):
    """Shows its method the input of every layer, and prunes nothing."""

    def enter(self, i: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        state = self.prefill
        if i >= self.method.first_layer:
            self.method.score(state.context(i, hidden, kwargs, state.left, self.adapter, exhaustive=True))
        state.rotary = kwargs["position_embeddings"]
        return hidden, {}


# ---- VTW's schedule ----------------------------------------------------------------------------------------
def vtw_schedule(model: nn.Module, batches: Sequence[Mapping], threshold: float = 0.003,
                 samples: int = 20) -> PruningConfig:
    """Drop all visual tokens at the first layer where that hardly shows (VTW, arXiv 2405.05803).

        K = min {k : KL(without visual tokens from layer k on || full) <= threshold}

    KL: mean over the answer tokens of the first batches that hold `samples` samples (all, if there are
    fewer), in nats. If no layer will do, nothing is dropped. Raises ValueError as `vispco.evaluate` does, and
    for a negative threshold or no samples.
    """
    if not threshold >= 0 or samples < 1:
        raise ValueError("threshold must be 0 or more and samples at least 1, "
                         f"got {threshold!r} and {samples!r}")
    adapter = adapter_for(model)(model)
    prepared = prepare(model, batches)
    used: list[PreparedBatch] = []
    while prepared and sum(map(len, used)) < samples:
        used.append(prepared.pop(0))
    layers = len(adapter.layers)
    for k in range(layers):
        config = PruningConfig("vtw", [1.0] * k + [0.0] * (layers - k), model_type=adapter.config.model_type)
        if evaluate(model, used, config).kl <= threshold:
            return config
    return PruningConfig("vtw", [1.0] * layers, model_type=adapter.config.model_type)
