"""Augmented Lagrangian: minimise f(x) subject to constraints, by unconstrained problems in turn.

After Nocedal & Wright, Numerical Optimization, ch. 17 (Framework 17.3, Algorithm 17.4), in the
notation of VisPCO (arXiv 2604.15188): the slack c(x) = B - F(x) is what is left of the budget, w
are the multipliers, lambda the penalties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class AugmentedLagrangian:
    """Multipliers w and penalties lambda of m constraints.

    A constraint is `c >= 0` ("inequality") or `c = 0` ("equality"): c(x) `(m,)` is the slack, f(x)
    the objective.

    inequality   phi = f + sum (z^2 - w^2) / (2 lambda),   z = max(0, w - lambda c);   then w <- z
    equality     phi = f - sum (w c - lambda c^2 / 2);                      then w <- w - lambda c
    both         lambda <- min(alpha lambda, max_penalty) where violation >= beta * the last one

    The new w makes grad phi the gradient of the plain Lagrangian f - w c. So w takes the lambda
    that phi was minimised with, and lambda grows after. lambda never grows where the violation is
    within epsilon. The violation of an inequality is |min(c, w / lambda)| where the paper has
    |B - F|. It vanishes exactly if c >= 0, w >= 0 and w c = 0, so that an optimum with budget to
    spare is accepted too.

    kind, multiplier, penalty: one for all constraints, or one per constraint.
    epsilon: largest violation that counts as satisfied, in the units of the slack.
    Raises ValueError for penalty <= 0, alpha < 1, beta outside (0, 1], epsilon < 0,
    max_penalty < penalty, or a negative multiplier of an inequality.

    >>> alm = AugmentedLagrangian(penalty=2.)
    >>> alm.loss(torch.tensor(1.), torch.tensor(-.5))  # z = 1, phi = 1 + 1 / 4
    tensor(1.2500)
    >>> alm.update(-.5); alm.multiplier, alm.penalty, alm.violation
    ((1.0,), (2.0,), (0.5,))
    """

    def __init__(
        self,
        num_constraints: int = 1,
        kind: str | Sequence[str] = "inequality",
        multiplier: Tensor | float | Sequence[float] = 0.0,
        penalty: Tensor | float | Sequence[float] = 1.0,
        alpha: float = 2.0,
        beta: float = 0.5,
        epsilon: float = 0.01,
        max_penalty: float = 1e6,
    ):
        if num_constraints < 1:
            raise ValueError(f"num_constraints must be at least 1, got {num_constraints!r}")
        self._m = num_constraints
        self._one_each = f"one number per constraint ({self._m})"
        self.kind = (kind,) * self._m if isinstance(kind, str) else tuple(kind)
        known = len(self.kind) == self._m and set(self.kind) <= {"inequality", "equality"}
        kinds = f"'inequality' or 'equality', for all constraints or one each ({self._m})"
        _check("kind", kind, known, kinds)
        self._inequality = torch.tensor([k == "inequality" for k in self.kind])  # (m,)
        self._w = self._vector("multiplier", multiplier)
        self._lambda = self._vector("penalty", penalty)
        # Infinite, so that the first update leaves the penalty alone.
        self._violation = torch.full_like(self._w, torch.inf)
        signs = self._w[self._inequality] >= 0
        _check("penalty", penalty, (self._lambda > 0).all(), "positive (phi divides by it)")
        _check("multiplier", multiplier, signs.all(), ">= 0 for inequalities")
        _check("alpha", alpha, 1 <= alpha < torch.inf, "at least 1")
        _check("beta", beta, 0 < beta <= 1, "in (0, 1]")
        _check("epsilon", epsilon, 0 <= epsilon < torch.inf, "at least 0")
        above = (max_penalty >= self._lambda).all()
        _check("max_penalty", max_penalty, above, "at least the penalty")
        self.alpha, self.beta, self.epsilon, self.max_penalty = alpha, beta, epsilon, max_penalty

    @property
    def multiplier(self) -> tuple[float, ...]:
        """w, one per constraint: at the optimum, how fast the objective falls with the budget."""
        return tuple(self._w.tolist())

    @property
    def penalty(self) -> tuple[float, ...]:
        """lambda, one per constraint."""
        return tuple(self._lambda.tolist())

    @property
    def violation(self) -> tuple[float, ...]:
        """Violations at the last update, one per constraint; infinite before the first."""
        return tuple(self._violation.tolist())

    def loss(self, objective: Tensor, slack: Tensor) -> Tensor:
        """phi, a scalar tensor to minimise, from the objective (scalar) and the slack `(m,)`.

        Raises ValueError for another number of slacks.
        """
        c = slack.reshape(-1)
        _check("slack", c, len(c) == self._m, self._one_each)
        w, lam = self._w.to(c), self._lambda.to(c)
        z = (w - lam * c).clamp(min=0)
        inequality, equality = (z**2 - w**2) / (2 * lam), lam * c**2 / 2 - w * c
        return objective + torch.where(self._inequality.to(c.device), inequality, equality).sum()

    def update(self, slack: Tensor | float | Sequence[float]) -> None:
        """The multiplier step, then the penalty step, at the minimiser of phi.

        slack: c there, `(m,)`.
        Raises FloatingPointError, and changes nothing, if the slack is not finite.
        """
        c, violation = self._vector("slack", slack), self.violations(slack)
        stuck = (violation > self.epsilon) & (violation >= self.beta * self._violation)
        w = self._w - self._lambda * c
        self._w = torch.where(self._inequality, w.clamp(min=0), w)
        grown = (self.alpha * self._lambda).clamp(max=self.max_penalty)
        self._lambda = torch.where(stuck, grown, self._lambda)
        self._violation = violation

    def violations(self, slack: Tensor | float | Sequence[float]) -> Tensor:
        """Violations `(m,)` at this slack, given the current multipliers and penalties."""
        c = self._vector("slack", slack)
        return torch.where(self._inequality, c.minimum(self._w / self._lambda), c).abs()

    def satisfied(self, slack: Tensor | float | Sequence[float]) -> bool:
        """Whether every violation is within epsilon, given the current multipliers.

        >>> alm = AugmentedLagrangian(2, kind=("inequality", "equality"), epsilon=.01)
        >>> alm.satisfied([5., .001]), alm.satisfied([5., .1]), alm.satisfied([-.1, 0.])
        (True, False, False)
        """
        return bool((self.violations(slack) <= self.epsilon).all())

    def state_dict(self) -> dict[str, list]:
        """What changes from step to step, JSON-ready. A violation is None before any update."""
        return {
            "kind": list(self.kind),
            "multiplier": self._w.tolist(),
            "penalty": self._lambda.tolist(),
            "violation": [v if v < torch.inf else None for v in self._violation.tolist()],
        }

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Continue where `state_dict` was taken, to the bit.

        Raises ValueError for the state of other constraints.
        """
        names = ["kind", "multiplier", "penalty", "violation"]
        _check("state", sorted(state), sorted(state) == names, f"a dict of {', '.join(names)}")
        kind = state["kind"]
        _check("state's kind", kind, tuple(kind) == self.kind, f"{self.kind}")
        known = [-1.0 if v is None else v for v in state["violation"]]
        violation = self._vector("violation", known)
        self._w = self._vector("multiplier", state["multiplier"])
        self._lambda = self._vector("penalty", state["penalty"])
        self._violation = violation.where(violation >= 0, torch.inf)

    def _vector(self, name: str, values: Tensor | float | Sequence[float]) -> Tensor:
        """A copy in float64 on the CPU, one number per constraint."""
        v = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().reshape(-1)
        if len(v) == 1 and name != "slack":
            v = v.expand(self._m)
        _check(name, v.tolist(), len(v) == self._m, self._one_each)
        error = FloatingPointError if name == "slack" else ValueError
        _check(name, v.tolist(), v.isfinite().all(), "finite", error)
        return v.clone()


def _check(name: str, value: Any, fits: Any, expected: str, error: type = ValueError) -> None:
    if not fits:
        raise error(f"{name} must be {expected}, got {value!r}")


@dataclass(frozen=True)
class Step:
    """One outer step of `minimise`: where the inner minimisation ended.

    multiplier, penalty: the w and lambda that it was run with.
    gradient_norm: of phi, the largest absolute entry.
    """

    objective: float
    slack: tuple[float, ...]
    multiplier: tuple[float, ...]
    penalty: tuple[float, ...]
    gradient_norm: float


@dataclass
class Result:
    """The outcome of `minimise`: whether it converged, and its outer steps."""

    converged: bool = False
    history: list[Step] = field(default_factory=list)


def minimise(
    objective_fn: Callable[[], Tensor],
    slack_fn: Callable[[], Tensor],
    parameters: Iterable[Tensor],
    alm: AugmentedLagrangian,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    inner: int = 100,
    outer: int = 50,
    tolerance: float = 1e-6,
) -> Result:
    """Minimise an objective under the constraints of `alm`; changes parameters and `alm` in place.

    Outer step: minimise phi by `inner` iterations. Stop if the constraints are satisfied (to
    alm.epsilon) and max |grad phi| <= tolerance, which together are the KKT conditions. Else update
    w and lambda.

    objective_fn, slack_fn: functions of no arguments that return a scalar tensor and a tensor
        `(m,)`, which depend on `parameters`.
    optimizer: any torch optimiser over the parameters. The default is L-BFGS with a line search,
        begun anew for each phi, whose curvature changes with w and lambda.
    Raises FloatingPointError, naming the outer step, if the objective or a slack is not finite. The
    parameters are then as they were before that step. Raises ValueError without parameters.

    >>> # The point nearest to (3, 2) with x + y <= 3:
    >>> x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    >>> target = torch.tensor([3., 2.])
    >>> alm = AugmentedLagrangian(epsilon=1e-8)
    >>> result = minimise(lambda: ((x - target) ** 2).sum(), lambda: 3 - x.sum(), [x], alm)
    >>> result.converged, [round(v, 4) for v in x.tolist()], round(alm.multiplier[0], 4)
    (True, [2.0, 1.0], 2.0)
    """
    parameters = list(parameters)
    if not parameters:
        needed = "at least one parameter tensor that requires a gradient"
        raise ValueError(f"minimise needs {needed}, got none")
    result = Result()

    def evaluate() -> tuple[Tensor, Tensor]:
        objective, slack = objective_fn(), slack_fn().reshape(-1)
        if not (objective.isfinite() and slack.isfinite().all()):
            values = f"objective {objective.item()}, slack {slack.tolist()}"
            advice = "use a smaller learning rate or penalty"
            raise FloatingPointError(f"outer step {len(result.history)}: {values}; {advice}")
        return objective, slack

    def closure() -> float:
        for parameter in parameters:
            parameter.grad = None
        phi = alm.loss(*evaluate())
        phi.backward()
        return float(phi.detach())

    def minimise_phi() -> None:
        if optimizer is not None:
            for _ in range(inner):
                optimizer.step(closure)
            return
        lbfgs = torch.optim.LBFGS(
            parameters,
            max_iter=inner,
            line_search_fn="strong_wolfe",
            history_size=20,
            tolerance_grad=tolerance / 10,
            tolerance_change=0,
        )
        lbfgs.step(closure)

    for _ in range(outer):
        good = [parameter.detach().clone() for parameter in parameters]
        try:
            minimise_phi()
            closure()
            objective, slack = (value.detach() for value in evaluate())
        except FloatingPointError:
            with torch.no_grad():
                for parameter, value in zip(parameters, good, strict=True):
                    parameter.copy_(value)
            raise
        gradient = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)
        values = float(objective), tuple(slack.tolist())
        result.history.append(Step(*values, alm.multiplier, alm.penalty, gradient))
        result.converged = gradient <= tolerance and alm.satisfied(slack)
        alm.update(slack)
        if result.converged:
            break
    return result
