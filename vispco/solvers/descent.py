"""`vispco.search`: keep ratios by gradient, one configuration per budget.

    minimise over theta   KL(pruned || full) at the answers,   r = R(i; theta)
    subject to            F(r) <= B

(VisPCO, arXiv 2604.15188.) The kernel turns theta into keep ratios; the pruner masks the tokens hard and passes
gradients straight through; the augmented Lagrangian holds the budget; the result is hardened to whole tokens.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..alm import AugmentedLagrangian
from ..budget import Limit, limit_for
from ..latency.table import LatencyTable, cost_models
from ..utils.distributed import count, processes, total
from ..frontier import Frontier
from ..kernels import Kernel
from ..pruning import Masking
from ..registry import KERNELS, adapter_for, build_method
from ..ste import build_estimator
from ..calibration import PreparedBatch, check_objective, during, frozen, prepare, shapes, run_teacher
from ..utils.version import versions
from ..utils.journal import Journal, name_of, opened, packed, unpacked
from .refine import Evaluator, Schedule, fitted, refine


def search(model: nn.Module, batches: Sequence[Mapping], method: str = "fastv", kernel: str = "monotone",
           budgets: Sequence[float | str | Mapping] = (0.2, 0.35, 0.5, 0.7, 0.9), *, seed: int = 0, steps: int = 20,
           learning_rate: float = 0.2, inner: int = 5, relative_to: str = "prunable", objective: str = "kl",
           latency: LatencyTable | None = None, method_options: Mapping | None = None,
           kernel_options: Mapping | None = None, estimator: str | Mapping | None = None,
           constraint: Mapping | None = None, refinement: int = 6, checkpoint: bool = False,
           journal: Journal | str | os.PathLike | None = None, callback: Callable[[dict], Any] | None = None) -> Frontier:
    """Find one pruning configuration per budget by gradient.

    model: any model with a registered adapter; its weights are not changed. batches: dicts of model inputs with
    `labels` (-100 outside the answer), the calibration data; the vision tower runs once on each, and what it makes is kept in
    main memory. method, kernel: registered names. budgets: shares of the
    prunable cost (`0.5`, `"50%"`; of the full cost with `relative_to="total"`) or absolute FLOPs; or several limits at
    once, `{"flops": 0.5, "kv_cache": "40%", "latency": "20 ms"}`; never exceeded by any calibration sample.
    latency: the table that a limit on it needs (`vispco.latency.table.LatencyTable.measure`).
    objective: "kl", to the full model's answers, or "task", cross-entropy of the right answers.
    steps: gradient steps per budget, one batch each; 0: none, and the refinement begins where they would have begun, without the
    memory of a backward pass. inner: steps between multiplier updates; after each, the hardened
    schedule, with and without its smallest drops, is measured on all calibration data; the best is returned.
    estimator: of the gradient, a name or options (`vispco.ste.ESTIMATORS`). constraint: of `AugmentedLagrangian`.
    refinement: schedules per budget that are tried in the end (`vispco.solvers.refine`), of those that the kernel can form.
    checkpoint: keep the inputs of the layers only, and run them again in the backward pass: less memory, more time.
    journal: a file that holds every step as soon as it is done. The same search with the same journal goes on after the last
    one, and ends as if it had never stopped, to the bit; the callback hears of all steps again (`vispco.utils.journal`).
    callback: called with a dict after every step (budget, step, loss, slack, multiplier, penalty, ...), and after every schedule
    of the refinement (budget, schedule, loss, best).

    Budgets are searched from the largest down, each started from the last one's solution or from one of the kernel's
    own starts, whichever is best.
    Raises ValueError for bad input, or a journal of another search, before anything runs; FloatingPointError, naming budget,
    step and layer, for numbers that are not finite: logits, hidden states, scores, the loss or its gradient.

    >>> from vispco import testbed
    >>> model, _ = testbed.load("testbed-llava")
    >>> frontier = search(model, testbed.batches("calibration", n=32, batch_size=32), budgets=[0.5], steps=5)
    >>> frontier.points[0].share <= 0.5
    True
    """
    started = time.perf_counter()
    adapter = adapter_for(model)(model)
    scorer = build_method(method, method_options)
    curve = KERNELS.get(kernel)(len(adapter.layers), scorer.first_layer, **(kernel_options or {}))
    if isinstance(budgets, (str, float, int, Mapping)) or not len(budgets):
        raise ValueError(f"budgets must be a sequence such as [0.2, 0.5, 0.8], got {budgets!r}")
    if steps < 0 or inner < 1:
        raise ValueError(f"steps must be at least 0 and inner at least 1, got {steps} and {inner}")
    if refinement < 0:
        raise ValueError(f"refinement must be at least 0 rounds, got {refinement!r}")
    check_objective(objective)
    build_estimator(estimator)
    prepared = prepare(model, batches, keep_features=True)
    costs = cost_models(adapter, scorer, latency)
    prompts = shapes(prepared)
    limits = [limit_for(b, costs, *prompts, scorer.first_layer, relative_to) for b in budgets]
    limits.sort(key=lambda limit: float(limit.slack(torch.ones(limit.layers))), reverse=True)
    solvers = [_solver(limit, constraint) for limit in limits]  # bad options are refused before anything runs

    samples = count(sum(map(len, prepared)))
    passes, evaluators, thetas = samples, [], []
    with opened(journal) as kept, frozen(model, checkpoint):
        kept.begin("vispco.search", model, prepared, {
            "method": method, "kernel": kernel, "budgets": list(budgets), "seed": seed, "steps": steps,
            "learning_rate": learning_rate, "inner": inner, "relative_to": relative_to, "objective": objective,
            "latency": latency and latency.to_dict(), "method_options": method_options, "kernel_options": kernel_options,
            "estimator": estimator, "constraint": constraint, "refinement": refinement, "checkpoint": checkpoint})
        run_teacher(model, prepared)
        for limit, alm in zip(limits, solvers):
            evaluator = Evaluator(model, prepared, {
                "method": method, "method_options": method_options or {}, "model_type": adapter.config.model_type,
                "budget": limit.value, "n_visual": limit.tokens, "versions": versions()}, objective, kept)
            evaluators.append(evaluator)
            if limit.holds([limit.tokens] * limit.layers):
                evaluator.losses([(1.0,) * limit.layers])
            else:
                start(curve, limit, evaluator, seed)
                if steps:
                    passes += 3 * _descend(adapter, scorer, curve, prepared, limit, evaluator, alm, steps=steps, inner=inner,
                                           seed=seed, learning_rate=learning_rate, estimator=estimator, callback=callback)
            thetas.append(curve.theta.detach().clone())
        refine(evaluators, limits, refinement, seed, propose=None if curve.free else formed(curve, thetas, limits),
               callback=callback)
        seconds = time.perf_counter() - started + kept.seconds
    full, text = costs["flops"].full(*prompts), costs["flops"].text_only(prompts[1])
    return Frontier([evaluator.point(limit) for evaluator, limit in zip(evaluators, limits)], {
        "method": method, "kernel": kernel, "objective": objective, "seed": seed, "steps": steps,
        "learning_rate": learning_rate, "inner": inner, "relative_to": relative_to, "model_type": adapter.config.model_type,
        "num_layers": len(adapter.layers), "n_visual": limits[0].tokens, "samples": samples,
        "full_flops": float(full.double().mean()), "text_flops": float(text.double().mean()),
        "forward_passes": passes + sum(evaluator.passes for evaluator in evaluators),
        "seconds": round(seconds, 3), "versions": versions()})


def start(curve: Kernel, limit: Limit, evaluator: Evaluator, seed: int) -> None:
    """Move `curve` to the best of where it is and its kernel's own starts, on the budget.

    Where the last budget ended may be a trap for a smaller one. The thetas race on a part of the calibration data.
    """
    every = list(torch.cat([curve.theta.detach()[None], curve.starts().to(curve.theta)]))
    thetas = [theta for theta in every if limit.reachable(curve.settled(theta))] or every
    hardened = [_hardened(curve, theta, limit) for theta in thetas]
    evaluator.losses(hardened[:1])
    race(evaluator, hardened[1:], 2, generator=torch.Generator().manual_seed(seed))
    curve.theta.data.copy_(thetas[hardened.index(evaluator.best)])
    fit_budget(curve, limit)


def race(evaluator: Evaluator, schedules: Sequence[Schedule], winners: int, share: float = 0.125, *, generator: torch.Generator) -> None:
    """Measure the few on all prepared that beat the best so far on a random part of them."""
    best = evaluator.best
    schedules = [schedule for schedule in dict.fromkeys(schedules) if schedule not in evaluator.records]
    part = torch.randperm(len(evaluator.prepared), generator=generator)[:max(1, round(share * len(evaluator.prepared)))].tolist()
    raced = dict(zip([best, *schedules], evaluator.losses([best, *schedules], part)))
    better = sorted((s for s in schedules if raced[s] < raced[best]), key=raced.__getitem__)
    evaluator.losses(better[:winners])


def _hardened(curve: Kernel, theta: Tensor, limit: Limit) -> Schedule:
    """The schedule of `theta`, within the kernel's form as far as whole tokens allow."""
    ratios = curve.settled(theta).double()
    return tuple(limit.harden(next(iter(_within(curve, ratios[None], limit)), ratios)))


def _within(curve: Kernel, ratios: Tensor, limit: Limit) -> Tensor:
    """Schedules (C, L) of a kernel brought onto the budget in its form."""
    return fitted(ratios, limit, hold_cuts=curve.stairs or curve.free, lower=False)


def formed(curve: Kernel, thetas: Sequence[Tensor], limits: Sequence[Limit], count: int = 256) -> Callable:
    """For kernels that form only some schedules, what `refine` may measure: random steps in theta, from where the gradient
    ended at this budget or the next ones."""
    def candidates(i: int, generator: torch.Generator) -> Tensor:
        near = torch.stack([thetas[j] for j in (i, i - 1, i + 1) if 0 <= j < len(thetas)])
        near = near[torch.randint(len(near), (count,), generator=generator)]
        size = torch.rand(count, 1, generator=generator)
        return _within(curve, curve.settled(near + size * torch.randn(near.shape, generator=generator)).double(), limits[i])

    return candidates


def _solver(limit: Limit, constraint: Mapping | None) -> AugmentedLagrangian:
    count = len(limit.slacks(torch.ones(limit.layers)))
    return AugmentedLagrangian(**{"num_constraints": count, "penalty": 100.0, "epsilon": 0.01, **(constraint or {})})


def _descend(adapter, scorer, curve: Kernel, prepared: list[PreparedBatch], limit: Limit, evaluator: Evaluator, alm: AugmentedLagrangian, *,
             steps: int, inner: int, seed: int, learning_rate: float, estimator: str | Mapping | None, callback) -> int:
    """Optimise `curve` in place for one budget, measuring after every multiplier update; returns samples seen."""
    optimizer = torch.optim.Adam([curve.theta], learning_rate)
    settle = steps - inner  # the last steps are small, so that they end where the last multipliers hold the budget
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 2 * (1 - step / steps)) * (0.25 if step >= settle else 1))
    order, seen = torch.Generator().manual_seed(seed), 0
    queue: list[int] = []
    for begin in range(0, steps, inner):
        with Masking(adapter, scorer, curve(), estimator).install() as pruner:
            for step in range(begin, min(begin + inner, steps)):
                queue = queue or torch.randperm(len(prepared), generator=order).tolist()
                number = queue.pop()
                slacks = limit.slacks(curve()).detach()
                done = evaluator.journal.recall(
                    {"budget": limit.value, "step": step, "prepared_batch": number, "theta": name_of(curve.theta),
                     "multiplier": alm.multiplier, "penalty": alm.penalty},
                    lambda: _gradient(curve, prepared[number], limit, alm, pruner, evaluator.objective, step))
                curve.theta.grad = unpacked(done["gradient"], curve.theta)
                norm = float(curve.theta.grad.norm())
                optimizer.step()
                decay.step()
                seen += count(len(prepared[number]))
                if callback:
                    callback({"budget": limit.value, "step": step, "steps": steps, "loss": done["loss"],
                              "slack": float(slacks.min()), "slacks": slacks.tolist(),
                              "violation": float(alm.violations(slacks).max()), "multiplier": max(alm.multiplier),
                              "penalty": max(alm.penalty), "gradient": norm, **curve.describe()})
        alm.update(limit.slacks(curve()).detach())
        fit_budget(curve, limit)  # what is left of the violation costs no forward pass to remove
        ratios = curve.settled()
        if limit.reachable(ratios):
            evaluator.losses({tuple(limit.harden(r)) for r in (ratios, without_small_drops(ratios))})
    return seen


def _gradient(curve: Kernel, prepared_batch: PreparedBatch, limit: Limit, alm: AugmentedLagrangian, pruner: Masking, objective: str, step: int) -> dict:
    """All that a step costs: the objective's value and, packed, the gradient of the augmented Lagrangian in theta."""
    ratios = curve()
    with during(f"budget {limit.value!r}, step {step}"):
        losses = pruner.losses(prepared_batch, whole(ratios, limit.tokens), step, objective)  # (A,)
    value, slacks = losses.sum() / count(len(losses)), limit.slacks(ratios)  # this process's part of the mean
    loss = alm.loss(processes() * value, slacks.to(value)) / processes()  # of the sum, the constraint is one part
    gradient = total(torch.autograd.grad(loss, curve.theta)[0])
    loss, value = total(loss.detach()), total(value.detach())
    if not math.isfinite(float(loss) + float(gradient.norm())):
        raise FloatingPointError(f"budget {limit.value!r}, step {step}: the loss is {float(loss)}, its gradient "
                                 f"{float(gradient.norm())}; search in float32 or bfloat16, with a smaller learning rate")
    return {"loss": float(value), "gradient": packed(gradient)}


def whole(ratios: Tensor, tokens: int) -> Tensor:
    """Nearest whole tokens, with the gradient of the ratios: the forward pass sees what will be deployed."""
    return (ratios.detach() * tokens).round() / tokens + (ratios - ratios.detach())


def without_small_drops(ratios: Tensor, smallest: float = 0.05) -> Tensor:
    """The schedule without drops of less than `smallest` of all tokens, which no finite theta can switch off.

    >>> [round(r, 2) for r in without_small_drops(torch.tensor([1.0, 0.97, 0.96, 0.4])).tolist()]
    [1.0, 1.0, 1.0, 0.44]
    """
    drops = torch.cat([torch.ones_like(ratios[:1]), ratios[:-1]]) - ratios
    return 1 - drops.where(drops >= smallest, 0.0).cumsum(0)


def fit_budget(curve: Kernel, limit: Limit, steps: int = 300, tolerance: float = 1e-3) -> None:
    """Move `curve` onto the budget by gradient on the FLOPs alone: a start that costs no forward pass."""
    optimizer = torch.optim.Adam([curve.theta], 0.05)
    for _ in range(steps):
        slack = limit.slack(curve())
        if abs(float(slack.detach())) < tolerance:
            break
        curve.theta.grad, = torch.autograd.grad(slack**2, curve.theta)
        optimizer.step()
