"""`start="gradient"`: keep ratios by gradient, budget by budget (VisPCO, arXiv 2604.15188).

    minimise over theta   KL(pruned || full) at the answers,   r = R(i; theta)
    subject to            F(r) <= B

The kernel turns theta into keep ratios. The pruner masks the tokens hard and passes gradients
straight through. The augmented Lagrangian holds the budget. The result is hardened to whole tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..alm import AugmentedLagrangian
from ..budget import Budget
from ..calibration import PreparedBatch, during
from ..kernels import Kernel
from ..pruning import Masking
from ..schedule import fit, to_whole_tokens, without_small_drops
from ..ste import build_estimator
from ..utils.distributed import processes, total
from ..utils.journal import Journal, decode_tensor, digest_tensors, encode_tensor
from .evaluator import Evaluator, Schedule
from .problem import Problem, Start
from .steps import batch_order, decay, gradients


@dataclass(frozen=True)
class Gradient(Start):
    """Options of `start="gradient"`: descend for each budget, from the largest down.

    Each budget starts from the last one's solution or from one of the kernel's own starts,
    whichever is best.
    steps: gradient steps per budget, one batch each. 0: none; then the refinement begins where they
    would have begun, and no memory is needed for a backward pass.
    learning_rate: of Adam on theta.
    inner: steps between updates of the multipliers. After each update the hardened schedule, with
    and without its small drops, is measured on all calibration data.
    estimator: of the gradient in the keep ratios, a name or a mapping (`vispco.ste.ESTIMATORS`).
    constraint: options of `AugmentedLagrangian`.
    checkpoint: keep only the inputs of the layers for the backward pass, and run the layers again:
    less memory, more time.
    Raises ValueError for bad values.
    """

    name: ClassVar[str] = "gradient"
    largest_first: ClassVar[bool] = True

    steps: int = 20
    learning_rate: float = 0.2
    inner: int = 5
    estimator: str | Mapping | None = None
    constraint: Mapping | None = None
    checkpoint: bool = False

    def __post_init__(self):
        if self.steps < 0 or self.inner < 1:
            raise ValueError(
                f"steps must be at least 0 and inner at least 1, got {self.steps} and {self.inner}"
            )
        build_estimator(self.estimator)

    def solver(self, problem: Problem, limits: Sequence[Budget], seed: int) -> Descent:
        """The descent on a problem. Raises ValueError for bad options of the constraint."""
        return Descent(self, problem, limits, seed)


class Descent:
    """Gradient descent on theta for every limit, one after the other."""

    def __init__(self, options: Gradient, problem: Problem, limits: Sequence[Budget], seed: int):
        self.options, self.problem, self.seed = options, problem, seed
        self.kernel: Kernel = problem.kernel
        self.lagrangians = [augmented_lagrangian(limit, options.constraint) for limit in limits]
        self.thetas: list[Tensor] = []
        # A free kernel forms every schedule, so nothing keeps the refinement from any.
        propose = None if self.kernel.free else formed(self.kernel, self.thetas, limits)
        self.guidance = {"propose": propose}

    def arguments(self) -> dict[str, Any]:
        """What decides the result, for journal and frontier."""
        return asdict(self.options)

    def run(
        self, evaluators: Sequence[Evaluator], limits: Sequence[Budget], journal: Journal
    ) -> int:
        """Measure the best schedules on the way.

        Returns the forward passes of the steps, a backward pass counting two.
        """
        seen = 0
        for limit, evaluator, lagrangian in zip(limits, evaluators, self.lagrangians, strict=True):
            if limit.holds(limit.everything):
                evaluator.losses([(1.0,) * limit.layers])
            else:
                choose_start(self.kernel, limit, evaluator, self.seed)
                if self.options.steps:
                    seen += self._descend(limit, evaluator, lagrangian)
            self.thetas.append(self.kernel.theta.detach().clone())
        return 3 * seen

    def _descend(self, limit: Budget, evaluator: Evaluator, lagrangian: AugmentedLagrangian) -> int:
        """Optimise the kernel's theta for one limit; returns the samples seen."""
        steps, inner = self.options.steps, self.options.inner
        kernel, problem = self.kernel, self.problem
        optimizer = torch.optim.Adam([kernel.theta], self.options.learning_rate)

        # The last steps are small, so that they end where the last multipliers hold the budget.
        def rate(step: int) -> float:
            return decay(step, steps) * (0.25 if step >= steps - inner else 1)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        order = batch_order(len(problem.prepared), torch.Generator().manual_seed(self.seed))
        seen = 0
        for begin in range(0, steps, inner):
            pruner = Masking(problem.adapter, problem.scorer, kernel(), self.options.estimator)
            with pruner.install():
                for step in range(begin, min(begin + inner, steps)):
                    number = next(order)
                    slacks = limit.slacks(kernel()).detach()
                    at = {"budget": limit.value, "step": step}
                    asked = {**at, "batch": number, "theta": digest_tensors(kernel.theta)}
                    asked |= {"multiplier": lagrangian.multiplier, "penalty": lagrangian.penalty}
                    batch = problem.prepared[number]
                    make = partial(self._step, pruner, batch, limit, lagrangian, step)
                    found = evaluator.journal.recall(asked, make)
                    kernel.theta.grad = decode_tensor(found["gradient"], kernel.theta)
                    norm = float(kernel.theta.grad.norm())
                    optimizer.step()
                    schedule.step()
                    seen += total(len(batch))
                    if problem.callback:
                        report = {**at, "steps": steps, "loss": found["loss"], "gradient": norm}
                        report |= {"slack": float(slacks.min()), "slacks": slacks.tolist()}
                        report |= {"violation": float(lagrangian.violations(slacks).max())}
                        report |= {"multiplier": max(lagrangian.multiplier)}
                        report |= {"penalty": max(lagrangian.penalty), **kernel.describe()}
                        problem.callback(report)
            lagrangian.update(limit.slacks(kernel()).detach())
            # What is left of the violation costs no forward pass to remove.
            fit_budget(kernel, limit)
            ratios = kernel.settled()
            if limit.reachable(ratios):
                both = ratios, without_small_drops(ratios)
                evaluator.losses({tuple(limit.harden(r)) for r in both})
        return seen

    def _step(
        self, pruner, batch, limit: Budget, lagrangian: AugmentedLagrangian, step: int
    ) -> dict:
        """All that a step costs: the objective, and the augmented Lagrangian's gradient."""
        ratios = self.kernel()
        whole = to_whole_tokens(ratios, limit.tokens)
        objective = self.problem.options.objective
        with during(f"budget {limit.value!r}, step {step}"):
            value = mean_loss(pruner, batch, whole, step, objective)
            slacks = limit.slacks(ratios)
            # The objective is a sum over the processes. The constraint is one part of it, and each
            # process has it.
            loss = lagrangian.loss(processes() * value, slacks.to(value)) / processes()
            (gradient,) = gradients(loss, [self.kernel.theta])
        return {"loss": float(total(value.detach())), "gradient": encode_tensor(gradient)}


def mean_loss(
    pruner: Masking, batch: PreparedBatch, ratios: Tensor, seed: int = 0, objective: str = "kl"
) -> Tensor:
    """This process's part of the mean objective over the answer tokens of a batch, in nats.

    Differentiable in the ratios.
    """
    losses = pruner.losses(batch, ratios, seed, objective)  # (A,)
    return losses.sum() / total(len(losses))


def augmented_lagrangian(limit: Budget, constraint: Mapping | None) -> AugmentedLagrangian:
    """The augmented Lagrangian of a limit's constraints, with the search's defaults."""
    constraints = len(limit.slacks(torch.ones(limit.layers)))
    defaults = {"num_constraints": constraints, "penalty": 100.0, "epsilon": 0.01}
    return AugmentedLagrangian(**{**defaults, **(constraint or {})})


def choose_start(kernel: Kernel, limit: Budget, evaluator: Evaluator, seed: int) -> None:
    """Move a kernel to the best of where it is and its own starts, on the budget.

    Where the last budget ended may be a trap for a smaller one. The starts race on a part of the
    calibration data.
    """
    every = list(torch.cat([kernel.theta.detach()[None], kernel.starts().to(kernel.theta)]))
    thetas = [theta for theta in every if limit.reachable(kernel.settled(theta))] or every
    hardened = [harden_theta(kernel, theta, limit) for theta in thetas]
    evaluator.losses(hardened[:1])
    race(evaluator, hardened[1:], torch.Generator().manual_seed(seed))
    kernel.theta.data.copy_(thetas[hardened.index(evaluator.best)])
    fit_budget(kernel, limit)


def race(evaluator: Evaluator, schedules: Sequence[Schedule], generator: torch.Generator) -> None:
    """Measure in full the two schedules that beat the best so far by most on an eighth of the data.

    The part of the data is drawn at random. Fewer are measured if fewer are better.
    """
    best = evaluator.best
    new = [schedule for schedule in dict.fromkeys(schedules) if schedule not in evaluator.records]
    count = len(evaluator.prepared)
    part = torch.randperm(count, generator=generator)[: max(1, round(count / 8))].tolist()
    losses = dict(zip([best, *new], evaluator.losses([best, *new], part), strict=True))
    better = [schedule for schedule in new if losses[schedule] < losses[best]]
    evaluator.losses(sorted(better, key=losses.__getitem__)[:2])


def harden_theta(kernel: Kernel, theta: Tensor, limit: Budget) -> Schedule:
    """The schedule of `theta` in whole tokens, within the kernel's form as far as these allow."""
    ratios = kernel.settled(theta).double()
    fitted = _in_form(kernel, ratios[None], limit)
    return tuple(limit.harden(fitted[0] if len(fitted) else ratios))


def _in_form(kernel: Kernel, ratios: Tensor, limit: Budget) -> Tensor:
    """Schedules (C, L) of a kernel brought onto the budget in the kernel's form."""
    return fit(ratios, limit, hold_cuts=kernel.stairs or kernel.free, lower=False)


def formed(
    kernel: Kernel, thetas: Sequence[Tensor], limits: Sequence[Budget], count: int = 256
) -> Callable[[int, torch.Generator], Tensor]:
    """Candidates of a kernel that forms only some schedules: random steps in theta.

    The steps begin where the gradient ended at this budget, or at the next smaller or larger one.
    """

    def candidates(i: int, generator: torch.Generator) -> Tensor:
        near = torch.stack([thetas[j] for j in (i, i - 1, i + 1) if 0 <= j < len(thetas)])
        near = near[torch.randint(len(near), (count,), generator=generator)]
        size = torch.rand(count, 1, generator=generator)
        stepped = near + size * torch.randn(near.shape, generator=generator)
        return _in_form(kernel, kernel.settled(stepped).double(), limits[i])

    return candidates


def fit_budget(kernel: Kernel, limit: Budget, steps: int = 300, tolerance: float = 1e-3) -> None:
    """Move a kernel onto the budget by gradient on the FLOPs alone, which costs no forward pass."""
    optimizer = torch.optim.Adam([kernel.theta], 0.05)
    for _ in range(steps):
        slack = limit.slack(kernel())
        if abs(float(slack.detach())) < tolerance:
            break
        (kernel.theta.grad,) = torch.autograd.grad(slack**2, kernel.theta)
        optimizer.step()
