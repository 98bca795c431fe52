"""Amortised search: learn the whole frontier in one run, then ask for any budget.

    minimise over f   E_{x, B} log KL(pruned || full),   r = R(i; f(x, B)) scaled so that F(r) = B

Every sample of a batch draws a budget of its own. Its schedule is scaled onto that budget (`on_budget`), so the
constraint holds at every step and needs no multiplier. The logarithm gives all budgets a say: small ones have a
divergence a hundred times that of large ones.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..budget import Budget, on_budget, ramp
from ..config import PruningConfig
from ..pruning.context import before_answer
from ..utils.distributed import count, gathered, processes, rank, total
from ..flops import CostModel
from ..frontier import Frontier
from ..kernels import Kernel
from ..pruning import Masking
from ..registry import KERNELS, adapter_for, build_method
from ..calibration import PreparedBatch, answer_logits, during, frozen, prepare, shapes, run_teacher
from ..utils.version import versions
from .descent import whole
from ..utils.journal import Journal, name_of, opened, packed, unpacked
from .predictor import RatioPredictor
from .refine import Evaluator, refine


class Amortised:
    """What `amortise` has learned: a configuration for any budget.

    predictor, kernel: the network, and the curve whose theta it gives.
    """

    def __init__(self, model: nn.Module, prepared: list[PreparedBatch], predictor: RatioPredictor, kernel: Kernel, method: str,
                 method_options: Mapping, meta: dict):
        self.model, self.prepared, self.predictor, self.kernel = model, prepared, predictor, kernel
        self.method, self.method_options, self.meta = method, dict(method_options), meta

    @torch.no_grad()
    def ratios(self, budget: float) -> Tensor:
        """The schedule (L,) for a share of the prunable cost; of a predictor that looks at prompts, the mean over the
        calibration data. Not yet in whole tokens."""
        schedules = []
        for prepared_batch in self.prepared if self.predictor.conditioned else self.prepared[:1]:
            theta = self.predictor(torch.full((len(prepared_batch),), float(budget)), *features(self.model, prepared_batch, self.predictor))
            schedules.append(self.kernel.schedule(theta))
        return gathered(torch.cat(schedules).double()).mean(0)

    def frontier(self, budgets: Sequence[float], refinement: int = 0, seed: int = 0, passes: float = math.inf,
                 journal: Journal | str | os.PathLike | None = None) -> Frontier:
        """One configuration per budget, in whole tokens, never above it, measured on the calibration data.

        refinement: schedules tried per budget (`vispco.solvers.refine`), as long as they cost at most `passes` forward passes.
        journal: as of `vispco.search`, another file than `amortise` had.
        """
        adapter = adapter_for(self.model)(self.model)
        scorer = build_method(self.method, self.method_options)
        cost, limits, evaluators = CostModel(adapter.dimensions(adapter.config), scorer), [], []
        with opened(journal) as kept:
            kept.begin("vispco.amortise: frontier", self.model, self.prepared, {
                "method": self.method, "method_options": self.method_options, "kernel": type(self.kernel).__name__,
                "predictor": name_of(*self.predictor.parameters()), "budgets": list(budgets), "refinement": refinement, "seed": seed,
                "passes": passes})
            for budget in sorted(budgets):
                limit = Budget(budget, cost, *shapes(self.prepared), scorer.first_layer)
                evaluator = Evaluator(self.model, self.prepared, {
                    "method": self.method, "method_options": self.method_options, "model_type": adapter.config.model_type,
                    "budget": budget, "n_visual": limit.tokens, "versions": versions()}, journal=kept)
                evaluator.losses([tuple(limit.harden(self.ratios(budget)))])
                limits.append(limit)
                evaluators.append(evaluator)
            refine(evaluators, limits, refinement, seed, passes=passes)
        points, passes = [b.point(limit) for b, limit in zip(evaluators, limits)], sum(b.passes for b in evaluators)
        return Frontier(points, {**self.meta, "forward_passes": self.meta["forward_passes"] + passes})

    def config(self, budget: float) -> PruningConfig:
        """The configuration for one budget."""
        return self.frontier([budget]).points[0].config


def amortise(model: nn.Module, batches: Sequence[Mapping], method: str = "fastv", kernel: str = "monotone",
             between: tuple[float, float] | None = None, *, conditioned: bool = False, steps: int = 200,
             learning_rate: float = 0.1, seed: int = 0, method_options: Mapping | None = None,
             kernel_options: Mapping | None = None, estimator: str | Mapping | None = None,
             checkpoint: bool = False, journal: Journal | str | os.PathLike | None = None,
             callback: Callable[[dict], Any] | None = None) -> Amortised:
    """Learn the frontier between two budgets (shares of the prunable cost) in one run of `steps` batches.

    between: the least and the largest budget that will be asked for; None: all that can be reached, up to 0.95.
    conditioned: whether the predictor looks at the prompts, or at the budget alone. learning_rate: of the predictor's table
    of thetas; its network, if it looks at the prompts, learns at a twentieth. Small batches and many steps do better than
    the reverse: 200 batches of 8 questions, say. With a free kernel every budget starts at its `vispco.budget.ramp`. Other arguments and errors as of `vispco.search`.

    >>> from vispco import testbed
    >>> model, _ = testbed.load("testbed-llava")
    >>> learned = amortise(model, testbed.batches("calibration", n=32, batch_size=16), steps=4)
    >>> [round(p.share, 1) for p in learned.frontier([0.3, 0.6]).points]
    [0.3, 0.6]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    adapter, scorer = adapter_for(model)(model), build_method(method, method_options)
    curve = KERNELS.get(kernel)(len(adapter.layers), scorer.first_layer, **(kernel_options or {}))
    prepared = prepare(model, batches, keep_features=True)
    cost = CostModel(adapter.dimensions(adapter.config), scorer)
    tokens = int(shapes(prepared)[0].max())
    everything = Budget(1.0, cost, *shapes(prepared), scorer.first_layer)
    least = everything.share(everything.least)
    low, high = (least, 0.95) if between is None else between
    if not least <= low + 1e-9 < high <= 1:
        raise ValueError(f"between must be two increasing shares in [{least:.4g}, 1], what {method!r} can reach on this model, "
                         f"got {between!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictor = RatioPredictor(curve, adapter.dimensions(adapter.config).hidden if conditioned else None, (low, high))
    if hasattr(curve, "inverse"):
        predictor.begin(torch.stack([curve.inverse(ramp(Budget(max(knot, least + 1e-3), cost, *shapes(prepared), scorer.first_layer)))
                                     for knot in predictor.knots]))
    generator, seen = torch.Generator().manual_seed(seed), 0
    queue: list[int] = []
    parameters = list(predictor.parameters())
    network = [p for p in parameters if p is not predictor.table]
    groups = [{"params": [predictor.table], "lr": learning_rate}, *([{"params": network, "lr": learning_rate / 20}] * conditioned)]
    optimizer = torch.optim.Adam(groups)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    with opened(journal) as kept, frozen(model, checkpoint):
        kept.begin("vispco.amortise", model, prepared, {
            "method": method, "kernel": kernel, "between": [low, high], "conditioned": conditioned, "steps": steps,
            "learning_rate": learning_rate, "seed": seed, "method_options": method_options, "kernel_options": kernel_options,
            "estimator": estimator, "checkpoint": checkpoint})
        run_teacher(model, prepared)
        with Masking(adapter, scorer, torch.ones(1, requires_grad=True), estimator).install() as pruner:
            for step in range(steps):
                queue = queue or torch.randperm(len(prepared), generator=generator).tolist()
                number = queue.pop()
                prepared_batch = prepared[number]
                samples = count(len(prepared_batch))
                share = torch.rand(samples, generator=generator) + torch.randperm(samples, generator=generator)
                share = low + (high - low) * share / samples  # stratified

                def gradient() -> dict:
                    budget = share[rank()::processes()]
                    theta = predictor(budget, *features(model, prepared_batch, predictor))
                    text, full = cost.text_only(prepared_batch.n_text).double(), cost.full(prepared_batch.n_visual, prepared_batch.n_text).double()
                    ratios = on_budget(curve.schedule(theta), cost, prepared_batch.n_visual, prepared_batch.n_text, text + budget * (full - text))
                    with during(f"step {step}"):
                        kl = per_sample(prepared_batch, pruner.losses(prepared_batch, whole(ratios, tokens), step))
                    loss = (kl + 1e-2).log().sum() / count(len(kl))
                    found = [total(part) for part in torch.autograd.grad(loss, parameters)]
                    loss, norm = total(loss), sum(float(part.norm()) for part in found)
                    if not math.isfinite(float(loss.detach()) + norm):
                        raise FloatingPointError(f"step {step}: the loss is {float(loss.detach())}, its gradient {norm}; learn in "
                                                 "float32 or bfloat16, with a smaller learning rate")
                    return {"loss": float(gathered(kl.detach()).mean()), "log": float(loss.detach()),
                            "gradients": [packed(part) for part in found]}

                done = kept.recall({"step": step, "prepared_batch": number, "budgets": name_of(share), "predictor": name_of(*parameters)},
                                   gradient)
                for parameter, found in zip(parameters, done["gradients"]):
                    parameter.grad = unpacked(found, parameter)
                optimizer.step()
                decay.step()
                seen += samples
                if callback:
                    callback({"step": step, "steps": steps, "loss": done["loss"], "log": done["log"]})
    meta = {"method": method, "kernel": kernel, "seed": seed, "steps": steps, "learning_rate": learning_rate,
            "conditioned": conditioned, "between": [low, high], "model_type": adapter.config.model_type,
            "num_layers": len(adapter.layers), "n_visual": tokens, "samples": count(sum(map(len, prepared))),
            "full_flops": float(cost.full(*shapes(prepared)).double().mean()),
            "text_flops": float(cost.text_only(shapes(prepared)[1]).double().mean()),
            "forward_passes": count(sum(map(len, prepared))) + 3 * seen, "versions": versions()}
    return Amortised(model, prepared, predictor.eval(), curve, method, method_options or {}, meta)


def per_sample(prepared_batch: PreparedBatch, divergence: Tensor) -> Tensor:
    """Mean of the answer tokens' KL(pruned || full) (A,) for each sample that has an answer (samples,)."""
    rows = prepared_batch.rows.to(divergence.device)
    answers = torch.bincount(rows, minlength=len(prepared_batch)).to(divergence)
    kl = torch.zeros(len(prepared_batch), device=rows.device).index_add(0, rows, divergence) / answers.clamp(min=1)
    return kl[answers > 0]


@torch.no_grad()
def features(model: nn.Module, prepared_batch: PreparedBatch, predictor: RatioPredictor) -> tuple[Tensor, Tensor] | tuple[()]:
    """Input embeddings (B, S, hidden) of the prompts, and which are real, for a predictor that looks at them, where it is."""
    if not predictor.conditioned:
        return ()
    decoder, caught = adapter_for(model)(model).decoder, []

    def catch(module, args, kwargs):
        caught.append(kwargs["inputs_embeds"])
        raise Stop

    hook = decoder.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        answer_logits(model, prepared_batch)
    except Stop:
        pass
    finally:
        hook.remove()
    mask = prepared_batch.inputs.get("attention_mask")
    real = torch.ones_like(prepared_batch.labels, dtype=torch.bool) if mask is None else mask.bool()
    return caught[0].to(predictor.table), before_answer(real, prepared_batch.labels).to(predictor.table.device)


class Stop(Exception):
    """The embeddings are known; the rest of the forward pass is not needed."""
