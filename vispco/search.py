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
from .config import PruningConfig
from .evaluate import evaluate
from .flops import CostModel
from .frontier import Frontier, FrontierPoint
from .kernels import Kernel
from .pruning import Pruner
from .registry import KERNELS, METHODS, adapter_for
from .teacher import Lesson, answer_logits, kl_divergence, prepare, teach
from .version import versions


def search(model: nn.Module, batches: Sequence[Mapping], method: str = "fastv", kernel: str = "monotone",
           budgets: Sequence[float | str] = (0.1, 0.3, 0.5, 0.7, 0.9), *, seed: int = 0, steps: int = 60,
           learning_rate: float = 0.1, inner: int = 10, relative_to: str = "prunable",
           method_options: Mapping | None = None, kernel_options: Mapping | None = None,
           estimator: Mapping | None = None, constraint: Mapping | None = None,
           callback: Callable[[dict], Any] | None = None) -> Frontier:
    """Find one pruning configuration per budget by gradient.

    model: any model with a registered adapter; its weights are not changed. batches: dicts of model inputs with
    `labels` (-100 outside the answer), the calibration data. method, kernel: registered names. budgets: shares of the
    prunable cost (`0.5`, `"50%"`; of the full cost with `relative_to="total"`) or absolute FLOPs; never exceeded
    by any calibration sample.
    steps: gradient steps per budget, one batch each. inner: steps between multiplier updates.
    estimator: options of `straight_through_mask`. constraint: of `AugmentedLagrangian`.
    callback: called with a dict after every step (budget, step, loss, slack, multiplier, penalty, ...).

    Budgets are searched from the largest down, each started from the last one's solution.
    Raises ValueError for bad input, before anything runs; FloatingPointError if the loss is not finite.

    >>> from vispco import testbed
    >>> model, _ = testbed.load("testbed-llava")
    >>> frontier = search(model, testbed.batches("calibration", n=32, batch_size=32), budgets=[0.5], steps=5)
    >>> frontier.points[0].share <= 0.5
    True
    """
    started = time.perf_counter()
    adapter = adapter_for(model)(model)
    scorer = METHODS.get(method)(**(method_options or {}))
    curve = KERNELS.get(kernel)(len(adapter.layers), scorer.first_layer, **(kernel_options or {}))
    if isinstance(budgets, (str, float, int)) or not len(budgets):
        raise ValueError(f"budgets must be a sequence such as [0.2, 0.5, 0.8], got {budgets!r}")
    if steps < 1 or inner < 1:
        raise ValueError(f"steps and inner must be at least 1, got {steps} and {inner}")
    lessons = prepare(model, batches)
    cost = CostModel(adapter.dimensions(adapter.config), scorer)
    n_visual, n_text = (torch.cat([getattr(x, name) for x in lessons]) for name in ("n_visual", "n_text"))
    limits = [Budget(b, cost, n_visual, n_text, scorer.first_layer, relative_to) for b in budgets]
    limits.sort(key=lambda b: float(b.limit.mean()), reverse=True)
    samples = sum(map(len, lessons))

    frozen = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    model.requires_grad_(False).eval()
    points, passes = [], samples
    try:
        teach(model, lessons)
        for limit in limits:
            found, seen = _search_one(adapter, scorer, curve, lessons, limit, steps=steps, inner=inner, seed=seed,
                                      learning_rate=learning_rate, estimator=dict(estimator or {}),
                                      constraint=dict(constraint or {}), callback=callback)
            config = PruningConfig(method, limit.harden(found), method_options or {}, adapter.config.model_type,
                                   limit.value, n_visual=limit.tokens)
            record = evaluate(model, lessons, config)
            config = PruningConfig(**{**vars(config), "flops": record.flops})
            points.append(FrontierPoint(config, limit.value, record.flops, limit.share(config.tokens(limit.tokens)),
                                        record.kl))
            passes += 3 * seen + samples
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        model.train(training)
    return Frontier(points, {
        "method": method, "kernel": kernel, "seed": seed, "steps": steps, "learning_rate": learning_rate,
        "inner": inner, "relative_to": relative_to, "model_type": adapter.config.model_type,
        "num_layers": len(adapter.layers), "n_visual": limits[0].tokens, "samples": samples,
        "full_flops": float(cost.full(n_visual, n_text).double().mean()),
        "text_flops": float(cost.text_only(n_text).double().mean()),
        "forward_passes": passes, "seconds": round(time.perf_counter() - started, 3), "versions": versions()})


def _search_one(adapter, scorer, curve: Kernel, lessons: list[Lesson], limit: Budget, *, steps: int, inner: int,
                seed: int, learning_rate: float, estimator: dict, constraint: dict,
                callback) -> tuple[Tensor, int]:
    """Optimise `curve` in place for one budget; the keep ratios found, and how many samples were seen."""
    if limit.holds([limit.tokens] * limit.layers):
        return torch.ones(limit.layers), 0
    fit_budget(curve, limit)
    alm = AugmentedLagrangian(**{"penalty": 10.0, "epsilon": 0.01, **constraint})
    optimizer = torch.optim.Adam([curve.theta], learning_rate)
    order = torch.Generator().manual_seed(seed)
    seen, queue = 0, []
    pruner = Pruner(adapter, scorer, curve(), "search", estimator).install()
    try:
        for step in range(steps):
            queue = queue or torch.randperm(len(lessons), generator=order).tolist()
            lesson = lessons[queue.pop()]
            ratios = curve()
            pruner.ratios = whole(ratios, limit.tokens)
            divergence = kl_divergence(answer_logits(adapter.model, lesson, pruner), lesson.log_probs)  # (A,)
            kl = divergence.mean()
            rows = lesson.rows.to(kl.device)
            pruner.bound = torch.zeros(len(lesson), device=kl.device).index_add(0, rows, divergence.detach() / len(rows))
            slack = limit.slack(ratios)
            loss = alm.loss(kl, slack.to(kl))
            if not loss.isfinite():
                raise FloatingPointError(f"budget {limit.value!r}, step {step}: the loss is {float(loss.detach())}; search in "
                                         "float32 or bfloat16, with a smaller learning rate")
            curve.theta.grad, = torch.autograd.grad(loss, curve.theta)
            norm = float(curve.theta.grad.norm())
            optimizer.step()
            seen += len(lesson)
            if callback:
                callback({"budget": limit.value, "step": step, "steps": steps, "loss": float(kl.detach()), "slack": float(slack.detach()),
                          "multiplier": alm.multiplier[0], "penalty": alm.penalty[0], "gradient": norm,
                          **curve.describe()})
            if (step + 1) % inner == 0:
                alm.update(limit.slack(curve()).detach())
    finally:
        pruner.remove()
    return curve().detach(), seen


def whole(ratios: Tensor, tokens: int) -> Tensor:
    """Nearest whole tokens, with the gradient of the ratios: the forward pass sees what will be deployed."""
    return (ratios.detach() * tokens).round() / tokens + (ratios - ratios.detach())


def fit_budget(curve: Kernel, limit: Budget, steps: int = 300, tolerance: float = 1e-3) -> None:
    """Move `curve` onto the budget by gradient on the FLOPs alone: a start that costs no forward pass."""
    optimizer = torch.optim.Adam([curve.theta], 0.05)
    for _ in range(steps):
        slack = limit.slack(curve())
        if abs(float(slack.detach())) < tolerance:
            break
        curve.theta.grad, = torch.autograd.grad(slack**2, curve.theta)
        optimizer.step()
