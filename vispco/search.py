"""`vispco.search`: keep ratios by gradient, one configuration per budget.

    minimise over theta   KL(pruned || full) at the answers,   r = R(i; theta)
    subject to            F(r) <= B

(VisPCO, arXiv 2604.15188.) The kernel turns theta into keep ratios; the pruner masks the tokens hard and passes
gradients straight through; the augmented Lagrangian holds the budget; the result is hardened to whole tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .alm import AugmentedLagrangian
from .budget import Budget
from .flops import CostModel
from .frontier import Frontier
from .kernels import Kernel
from .pruning import Pruner
from .refine import Bench, refine
from .registry import KERNELS, adapter_for, build_method
from .teacher import Lesson, answer_logits, frozen, kl_divergence, prepare, shapes, teach
from .version import versions


def search(model: nn.Module, batches: Sequence[Mapping], method: str = "fastv", kernel: str = "monotone",
           budgets: Sequence[float | str] = (0.2, 0.35, 0.5, 0.7, 0.9), *, seed: int = 0, steps: int = 20,
           learning_rate: float = 0.2, inner: int = 10, relative_to: str = "prunable",
           method_options: Mapping | None = None, kernel_options: Mapping | None = None,
           estimator: Mapping | None = None, constraint: Mapping | None = None, refinement: int | None = None,
           callback: Callable[[dict], Any] | None = None) -> Frontier:
    """Find one pruning configuration per budget by gradient.

    model: any model with a registered adapter; its weights are not changed. batches: dicts of model inputs with
    `labels` (-100 outside the answer), the calibration data. method, kernel: registered names. budgets: shares of the
    prunable cost (`0.5`, `"50%"`; of the full cost with `relative_to="total"`) or absolute FLOPs; never exceeded
    by any calibration sample.
    steps: gradient steps per budget, one batch each. inner: steps between multiplier updates; after each, the hardened
    schedule, with and without its smallest drops, is measured on all calibration data; the best is returned.
    estimator: options of `straight_through_mask`. constraint: of `AugmentedLagrangian`.
    refinement: rounds of local moves on the result (`vispco.refine`), within all non-increasing schedules; None: 4 for a
        kernel that spans them all, and 0 for the others, whose schedules have a form to keep.
    callback: called with a dict after every step (budget, step, loss, slack, multiplier, penalty, ...).

    Budgets are searched from the largest down, each started from the last one's solution or from the kernel's own
    start, whichever is better.
    Raises ValueError for bad input, before anything runs; FloatingPointError if the loss is not finite.

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
    if isinstance(budgets, (str, float, int)) or not len(budgets):
        raise ValueError(f"budgets must be a sequence such as [0.2, 0.5, 0.8], got {budgets!r}")
    if steps < 1 or inner < 1:
        raise ValueError(f"steps and inner must be at least 1, got {steps} and {inner}")
    rounds = refinement if refinement is not None else 4 * curve.free
    if rounds < 0:
        raise ValueError(f"refinement must be at least 0 rounds, got {refinement!r}")
    lessons = prepare(model, batches)
    cost = CostModel(adapter.dimensions(adapter.config), scorer)
    n_visual, n_text = shapes(lessons)
    limits = [Budget(b, cost, n_visual, n_text, scorer.first_layer, relative_to) for b in budgets]
    limits.sort(key=lambda b: float(b.limit.mean()), reverse=True)
    samples = sum(map(len, lessons))

    points, passes = [], samples
    with frozen(model):
        teach(model, lessons)
        for limit in limits:
            bench = Bench(model, lessons, {
                "method": method, "method_options": method_options or {}, "model_type": adapter.config.model_type,
                "budget": limit.value, "n_visual": limit.tokens})

            def measure(ratios: Tensor, bench=bench, limit=limit) -> float:
                """KL of the hardened schedule, with and without its smallest drops, on all calibration data."""
                return min(bench.kl({tuple(limit.harden(r)) for r in (ratios, without_small_drops(ratios))}))

            seen = _search_one(adapter, scorer, curve, lessons, limit, measure, steps=steps, inner=inner, seed=seed,
                               learning_rate=learning_rate, estimator=dict(estimator or {}),
                               constraint=dict(constraint or {}), callback=callback)
            refine(bench, limit, rounds, seed)
            passes += 3 * seen + bench.passes
            points.append(bench.point(limit))
    return Frontier(points, {
        "method": method, "kernel": kernel, "seed": seed, "steps": steps, "learning_rate": learning_rate,
        "inner": inner, "relative_to": relative_to, "model_type": adapter.config.model_type,
        "num_layers": len(adapter.layers), "n_visual": limits[0].tokens, "samples": samples,
        "full_flops": float(cost.full(n_visual, n_text).double().mean()),
        "text_flops": float(cost.text_only(n_text).double().mean()),
        "forward_passes": passes, "seconds": round(time.perf_counter() - started, 3), "versions": versions()})


def _search_one(adapter, scorer, curve: Kernel, lessons: list[Lesson], limit: Budget, measure: Callable, *, steps: int,
                inner: int, seed: int, learning_rate: float, estimator: dict, constraint: dict, callback) -> int:
    """Optimise `curve` in place for one budget, measuring after every multiplier update; returns samples seen.

    Starts where the last budget ended, or at the kernel's own start, whichever is better once on the budget: a
    schedule that is good at a large budget can be a trap at a small one.
    """
    if limit.holds([limit.tokens] * limit.layers):
        measure(torch.ones(limit.layers))
        return 0
    starts = []
    for theta in (curve.theta.detach().clone(), curve.initial().to(curve.theta)):
        curve.theta.data.copy_(theta)
        fit_budget(curve, limit)
        starts.append((measure(curve().detach()), curve.theta.detach().clone()))
    curve.theta.data.copy_(min(starts, key=lambda start: start[0])[1])
    alm = AugmentedLagrangian(**{"penalty": 10.0, "epsilon": 0.01, **constraint})
    optimizer = torch.optim.Adam([curve.theta], learning_rate)
    order, queue, seen = torch.Generator().manual_seed(seed), [], 0
    for start in range(0, steps, inner):
        with Pruner(adapter, scorer, curve(), "search", estimator).install() as pruner:
            for step in range(start, min(start + inner, steps)):
                queue = queue or torch.randperm(len(lessons), generator=order).tolist()
                lesson = lessons[queue.pop()]
                ratios = curve()
                pruner.ratios = whole(ratios, limit.tokens)
                kl, slack = _divergence(adapter.model, lesson, pruner), limit.slack(ratios)
                loss = alm.loss(kl, slack.to(kl))
                if not loss.isfinite():
                    raise FloatingPointError(f"budget {limit.value!r}, step {step}: the loss is {float(loss.detach())}; "
                                             "search in float32 or bfloat16, with a smaller learning rate")
                curve.theta.grad, = torch.autograd.grad(loss, curve.theta)
                norm = float(curve.theta.grad.norm())
                optimizer.step()
                seen += len(lesson)
                if callback:
                    callback({"budget": limit.value, "step": step, "steps": steps, "loss": float(kl.detach()),
                              "slack": float(slack.detach()), "multiplier": alm.multiplier[0],
                              "penalty": alm.penalty[0], "gradient": norm, **curve.describe()})
        alm.update(limit.slack(curve()).detach())
        measure(curve().detach())
    return seen


def _divergence(model: nn.Module, lesson: Lesson, pruner: Pruner) -> Tensor:
    """Mean KL(pruned || full) over the answer tokens; bounds the gradient of each token by its sample's part."""
    divergence = kl_divergence(answer_logits(model, lesson, pruner), lesson.log_probs)  # (A,)
    rows = lesson.rows.to(divergence.device)
    part = divergence.detach() / len(rows)
    pruner.bound = torch.zeros(len(lesson), device=rows.device).index_add(0, rows, part)
    return divergence.mean()


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


def fit_budget(curve: Kernel, limit: Budget, steps: int = 300, tolerance: float = 1e-3) -> None:
    """Move `curve` onto the budget by gradient on the FLOPs alone: a start that costs no forward pass."""
    optimizer = torch.optim.Adam([curve.theta], 0.05)
    for _ in range(steps):
        slack = limit.slack(curve())
        if abs(float(slack.detach())) < tolerance:
            break
        curve.theta.grad, = torch.autograd.grad(slack**2, curve.theta)
        optimizer.step()
