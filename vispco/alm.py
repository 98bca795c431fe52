"""Augmented Lagrangian: minimise f(x) subject to constraints, by a sequence of unconstrained problems.

After Nocedal & Wright, Numerical Optimization, ch. 17 (Framework 17.3, Algorithm 17.4), in the notation of VisPCO
(arXiv 2604.15188): the slack c(x) = B - F(x) is what is left of the budget, w the multipliers, lambda the penalties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

KINDS = ("inequality", "equality")


class AugmentedLagrangian:
    """Multipliers and penalties of m constraints on the slack c(x) `(m,)`: `c >= 0` ("inequality") or `c = 0`.

    inequality   phi = f + sum (z^2 - w^2) / (2 lambda),  z = max(0, w - lambda c);     w <- z
    equality     phi = f - sum (w c - lambda c^2 / 2);                                  w <- w - lambda c
    both         lambda <- min(alpha lambda, max_penalty) where |violation| >= beta |previous violation|

    The new multipliers make grad phi the gradient of the plain Lagrangian f - w c, so they take the lambda that phi was
    minimised with, and lambda grows after. lambda is one per constraint and never grows where the violation is below
    epsilon. For an inequality the violation is |min(c, w / lambda)| rather than the paper's |B - F|: it vanishes
    exactly if c >= 0, w >= 0 and w c = 0, so that a cheap optimum with budget to spare is accepted as well.

    kind, multiplier, penalty: one for all constraints, or one per constraint.
    epsilon: largest violation that counts as satisfied, in the units of the slack (divide by the budget, or sigma).
    Raises ValueError for penalty <= 0, alpha < 1, beta outside (0, 1], epsilon < 0, max_penalty < penalty, a negative
    multiplier of an inequality.

    >>> alm = AugmentedLagrangian(penalty=2.)
    >>> alm.loss(torch.tensor(1.), torch.tensor(-.5))  # z = 1, phi = 1 + 1 / 4
    tensor(1.2500)
    >>> alm.update(-.5); alm.multiplier, alm.penalty, alm.violation
    ((1.0,), (2.0,), (0.5,))
    """

    def __init__(self, num_constraints: int = 1, kind: str | Sequence[str] = "inequality",
                 multiplier: float | Sequence[float] = 0.0, penalty: float | Sequence[float] = 1.0,
                 alpha: float = 2.0, beta: float = 0.5, epsilon: float = 0.01, max_penalty: float = 1e6):
        if num_constraints < 1:
            raise ValueError(f"num_constraints must be at least 1, got {num_constraints!r}")
        self._m = num_constraints
        self.kind = self._each("kind", (kind,) * self._m if isinstance(kind, str) else tuple(kind))
        if unknown := set(self.kind) - set(KINDS):
            raise ValueError(f"kind must be 'inequality' or 'equality', got {unknown.pop()!r}")
        self._multiplier = self._numbers("multiplier", multiplier)
        self._penalty = self._numbers("penalty", penalty)
        self._violation = [math.inf] * self._m  # no previous one: the first update leaves the penalty alone
        if not all(p > 0 for p in self._penalty):
            raise ValueError(f"penalty must be positive, got {penalty!r}: phi divides by it")
        if any(w < 0 for w, kind in zip(self._multiplier, self.kind) if kind == "inequality"):
            raise ValueError(f"the multiplier of an inequality must not be negative, got {multiplier!r}")
        for name, value, fits, expected in (("alpha", alpha, 1 <= alpha < math.inf, ">= 1"),
                                            ("beta", beta, 0 < beta <= 1, "in (0, 1]"),
                                            ("epsilon", epsilon, 0 <= epsilon < math.inf, ">= 0"),
                                            ("max_penalty", max_penalty, max_penalty >= max(self._penalty),
                                             "at least the penalty")):
            if not fits:
                raise ValueError(f"{name} must be {expected}, got {value!r}")
        self.alpha, self.beta, self.epsilon, self.max_penalty = alpha, beta, epsilon, max_penalty

    @property
    def multiplier(self) -> tuple[float, ...]:
        """w: by how much the objective would fall per unit of slack granted; one per constraint."""
        return tuple(self._multiplier)

    @property
    def penalty(self) -> tuple[float, ...]:
        """lambda, one per constraint."""
        return tuple(self._penalty)

    @property
    def violation(self) -> tuple[float, ...]:
        """Violations at the last update; infinite before the first."""
        return tuple(self._violation)

    def loss(self, objective: Tensor, slack: Tensor) -> Tensor:
        """phi, to be minimised: a scalar tensor from the objective f (scalar) and the slack c `(m,)` (or scalar)."""
        c = torch.as_tensor(slack).reshape(-1)
        self._each("slack", c)
        w, lam = c.new_tensor(self._multiplier), c.new_tensor(self._penalty)
        z = (w - lam * c).clamp(min=0)
        inequality = (z**2 - w**2) / (2 * lam)
        equality = lam / 2 * c**2 - w * c
        return objective + torch.where(torch.tensor(self._is_inequality, device=c.device), inequality, equality).sum()

    def update(self, slack: Tensor | float | Sequence[float]) -> None:
        """Multiplier step, then penalty step, at the minimiser of the current phi.

        Raises FloatingPointError, and changes nothing, if the slack is not finite.
        """
        c, violation = self._numbers("slack", slack, FloatingPointError), self._violations(slack)
        for j in range(self._m):
            w = self._multiplier[j] - self._penalty[j] * c[j]
            self._multiplier[j] = max(0.0, w) if self._is_inequality[j] else w
            if violation[j] > self.epsilon and violation[j] >= self.beta * self._violation[j]:
                self._penalty[j] = max(self._penalty[j], min(self.alpha * self._penalty[j], self.max_penalty))
        self._violation = violation

    def satisfied(self, slack: Tensor | float | Sequence[float]) -> bool:
        """Is every violation at most epsilon, given the current multipliers?

        >>> alm = AugmentedLagrangian(2, kind=("inequality", "equality"), epsilon=.01)
        >>> alm.satisfied([5., .001]), alm.satisfied([5., .1]), alm.satisfied([-.1, 0.])
        (True, False, False)
        """
        return max(self._violations(slack)) <= self.epsilon

    def state_dict(self) -> dict[str, list]:
        """What changes from step to step, ready for JSON (a violation is null before the first update)."""
        return {"kind": list(self.kind), "multiplier": list(self._multiplier), "penalty": list(self._penalty),
                "violation": [None if math.isinf(v) else v for v in self._violation]}

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Continue where `state_dict` was taken, to the bit. Raises ValueError if the constraints are others."""
        if missing := {"kind", "multiplier", "penalty", "violation"} - state.keys():
            raise ValueError(f"the state lacks {', '.join(sorted(missing))}")
        if tuple(state["kind"]) != self.kind:
            raise ValueError(f"the state is of constraints {tuple(state['kind'])}, this problem has {self.kind}")
        violation = [math.inf if v is None else v for v in self._each("violation", state["violation"])]
        self._multiplier = self._numbers("multiplier", state["multiplier"])
        self._penalty, self._violation = self._numbers("penalty", state["penalty"]), violation

    @property
    def _is_inequality(self) -> list[bool]:
        return [kind == "inequality" for kind in self.kind]

    def _violations(self, slack) -> list[float]:
        c = self._numbers("slack", slack, FloatingPointError)
        return [abs(min(c[j], self._multiplier[j] / self._penalty[j]) if self._is_inequality[j] else c[j])
                for j in range(self._m)]

    def _numbers(self, name: str, values, error: type[Exception] = ValueError) -> list[float]:
        values = torch.as_tensor(values, dtype=torch.float64).detach().reshape(-1).tolist()
        values = values * self._m if len(values) == 1 and name != "slack" else values
        if not all(map(math.isfinite, self._each(name, values))):
            raise error(f"{name} must be finite, got {values}")
        return values

    def _each(self, name: str, values):
        if len(values) != self._m:
            raise ValueError(f"expected one {name} per constraint ({self._m}), got {len(values)}")
        return values


@dataclass(frozen=True)
class Step:
    """One outer step: where the inner minimisation ended, and the w and lambda it was run with."""

    objective: float
    slack: tuple[float, ...]
    multiplier: tuple[float, ...]
    penalty: tuple[float, ...]
    gradient_norm: float  # of phi, largest absolute entry


@dataclass
class Result:
    """Outcome of `minimise`: did it converge, and its outer steps."""

    converged: bool = False
    history: list[Step] = field(default_factory=list)


def minimise(objective_fn: Callable[[], Tensor], slack_fn: Callable[[], Tensor], parameters: Iterable[Tensor],
             alm: AugmentedLagrangian, *, optimizer: torch.optim.Optimizer | None = None, inner: int = 100,
             outer: int = 50, tolerance: float = 1e-6) -> Result:
    """Minimise an objective under the constraints of `alm`, changing the parameters (and `alm`) in place.

    Outer step: minimise phi by `inner` iterations; stop if the constraints are satisfied (to alm.epsilon) and
    max |grad phi| <= tolerance, which together are the KKT conditions; else update w and lambda.

    objective_fn, slack_fn: no arguments, return a scalar tensor and a tensor `(m,)` that depend on `parameters`.
    optimizer: any torch optimiser over the parameters; by default L-BFGS with a line search, begun anew for each
        phi, whose curvature changes with w and lambda.
    Raises FloatingPointError, naming the outer step, if the objective or a slack is not finite; the parameters are then
    as they were before that step. Raises ValueError without parameters.

    >>> x = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # nearest to (3, 2) with x + y <= 3
    >>> target = torch.tensor([3., 2.])
    >>> alm = AugmentedLagrangian(epsilon=1e-8)
    >>> result = minimise(lambda: ((x - target) ** 2).sum(), lambda: 3 - x.sum(), [x], alm)
    >>> result.converged, [round(v, 4) for v in x.tolist()], round(alm.multiplier[0], 4)
    (True, [2.0, 1.0], 2.0)
    """
    parameters = list(parameters)
    if not parameters:
        raise ValueError("minimise needs at least one parameter tensor that requires a gradient, got none")
    result = Result()

    def evaluate() -> tuple[Tensor, Tensor]:
        objective, slack = objective_fn(), slack_fn().reshape(-1)
        if not (objective.isfinite() and slack.isfinite().all()):
            raise FloatingPointError(f"outer step {len(result.history)}: objective {float(objective)}, slack "
                                     f"{slack.tolist()}; use a smaller learning rate or penalty")
        return objective, slack

    def closure() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        phi = alm.loss(*evaluate())
        phi.backward()
        return phi

    for _ in range(outer):
        good = [parameter.detach().clone() for parameter in parameters]
        try:
            if optimizer is None:
                torch.optim.LBFGS(parameters, max_iter=inner, line_search_fn="strong_wolfe", history_size=20,
                                  tolerance_grad=tolerance / 10, tolerance_change=0).step(closure)
            else:
                for _ in range(inner):
                    optimizer.step(closure)
            closure()
            objective, slack = (value.detach() for value in evaluate())
        except FloatingPointError:
            with torch.no_grad():
                for parameter, value in zip(parameters, good):
                    parameter.copy_(value)
            raise
        gradient = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)
        result.history.append(Step(float(objective), tuple(slack.tolist()), alm.multiplier, alm.penalty, gradient))
        result.converged = gradient <= tolerance and alm.satisfied(slack)
        alm.update(slack)
        if result.converged:
            break
    return result
