"""What all kernel functions have in common."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import KERNELS, did_you_mean


class _Checked(type):
    """Checks each kernel's formula once it is made, after the `__init__` of its own class."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made: Any = cls
        known = inspect.signature(partial(made.__init__, None)).parameters
        if not any(each.kind is each.VAR_KEYWORD for each in known.values()):
            for name in kwargs.keys() - known.keys():
                hint = did_you_mean(name, known)
                takes = ", ".join(known)
                raise ValueError(
                    f"the kernel {cls.__name__} does not take {name!r}: {hint}it takes {takes}"
                )
        kernel = super().__call__(*args, **kwargs)
        kernel._check_formula()
        return kernel


class Kernel(nn.Module, metaclass=_Checked):
    """Base class: one unconstrained parameter vector `theta`, shape `(P,)`, and its curve.

    num_layers: number of decoder layers, L.
    first_layer: first layer whose INPUT may be pruned. Methods that rank tokens by the attention
        of the layer before need 1.

    A subclass defines `initial()`, the first theta, and `ratios(i, ...)`, the paper's formula.
    So that the formula can use the paper's letters, it may define `named(theta)`: the formula's
    quantities, within their bounds, which `ratios` receives by name.

    Raises ValueError if `num_layers` < 1, if `first_layer` is not in 0..num_layers - 1, or if the
    formula does not take several thetas at once.

    >>> class Constant(Kernel):
    ...     def initial(self): return torch.zeros(1)
    ...     def ratios(self, i, theta): return theta.sigmoid().expand(*theta.shape[:-1], len(i))
    >>> Constant(num_layers=4)().tolist()
    [1.0, 0.5, 0.5, 0.5]
    """

    #: Whether every non-increasing schedule is one of the curves.
    free: bool = False
    #: Whether the curves stand for steps, each before one layer: `settled` makes them sharp.
    stairs: bool = False

    def __init__(self, num_layers: int, first_layer: int = 1):
        super().__init__()
        for name, number in {"num_layers": num_layers, "first_layer": first_layer}.items():
            if not isinstance(number, int):
                kind = type(number).__name__
                raise ValueError(f"{name} must be a whole number of decoder layers, got {kind}")
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers!r}")
        if not 0 <= first_layer < num_layers:
            raise ValueError(
                f"first_layer must be in 0..{num_layers - 1}, got {first_layer!r}: "
                "no layer would be left to prune; pass a smaller first_layer"
            )
        self.num_layers, self.first_layer = num_layers, first_layer
        self.theta = nn.Parameter(self.initial())

    def _check_formula(self) -> None:
        """Raise ValueError unless the formula takes several thetas at once, as searches do."""
        theta = self.theta.detach()
        several = torch.stack([theta, theta + 0.5, theta - 0.5])[:, None]  # (3, 1, P)
        fault = ""
        try:
            together = self(several)
            alone = torch.stack([self(row) for row in several[:, 0]])[:, None]
            if together.shape != (3, 1, self.num_layers):
                fault = f"it gave the shape {tuple(together.shape)} for a theta (3, 1, P)"
            elif not torch.allclose(together, alone, atol=1e-5):
                fault = "it gave other ratios for several thetas than for each alone"
        except NotImplementedError:
            # The formula is missing: it is called first when it is needed.
            return
        except (RuntimeError, IndexError, TypeError) as error:
            fault = f"for a theta (3, 1, P) it failed: {error}"
        if fault:
            raise ValueError(
                f"the formula of {type(self).__name__} must take thetas of any shape (..., P), and "
                f"return ratios (..., L); {fault}. Count from the end: theta[..., :1] for "
                "theta[0], sum(-1) for sum()"
            )

    def initial(self) -> Tensor:
        """The theta `(P,)` where a search starts."""
        name = type(self).__name__
        raise NotImplementedError(f"{name} must define initial(): the first theta, shape (P,)")

    def starts(self) -> Tensor:
        """Thetas `(n, P)`, `initial()` first: a search starts at the best of them.

        A gradient that starts far from where a step belongs may never find it.
        """
        return self.initial()[None]

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """The formula's quantities from theta `(..., P)`: each `(..., 1)` or longer."""
        return {"theta": theta}

    def ratios(self, i: Tensor, *args: Any, **named: Any) -> Tensor:
        """The formula as published, before clipping: layer indices `(L,)` -> ratios `(..., L)`."""
        name = type(self).__name__
        raise NotImplementedError(f"{name} must define ratios(i, ...): the curve, (..., L)")

    def schedule(self, theta: Tensor, **constants: float) -> Tensor:
        """Keep ratios `(..., L)` of any theta `(..., P)`.

        They are in [0, 1], never increase, and are exactly 1 before `first_layer`.

        constants: of the formula, instead of the kernel's own (`gamma`, where there is one).
        Raises ValueError if the last dimension of theta is not P.

        >>> from vispco.kernels import SingleLayer
        >>> SingleLayer(num_layers=3).schedule(torch.zeros(5, 7, 2)).shape
        torch.Size([5, 7, 3])
        """
        if theta.shape[-1:] != self.theta.shape:
            shapes = f"(..., {self.num_parameters}), got {tuple(theta.shape)}"
            raise ValueError(f"theta must have shape {shapes}")
        i = torch.arange(self.num_layers, dtype=theta.dtype, device=theta.device)
        ratios = self.ratios(i, **self.named(theta), **constants).clamp(0, 1)  # (..., L)
        ratios = torch.where(i < self.first_layer, 1, ratios)
        # Rounding alone could make a ratio grow by one ulp.
        return ratios.cummin(-1).values

    def forward(self, theta: Tensor | None = None, **constants: float) -> Tensor:
        """`schedule` of the kernel's own theta, or of the given one."""
        return self.schedule(self.theta if theta is None else theta, **constants)

    def settled(self, theta: Tensor | None = None) -> Tensor:
        """The schedule to deploy `(..., L)`, without gradient: steps are sharp."""
        return self(theta).detach()

    @property
    def num_parameters(self) -> int:
        """P, the length of theta."""
        return self.theta.numel()

    def describe(self) -> dict[str, float | list[float]]:
        """The current quantities in the paper's letters, for logs.

        >>> from vispco.kernels import SingleLayer
        >>> SingleLayer(num_layers=28).describe()
        {'k': 14.0, 'r': 0.5}
        """
        values = {name: value.tolist() for name, value in self.named(self.theta.detach()).items()}
        return {name: value[0] if len(value) == 1 else value for name, value in values.items()}

    def _before_layers(self) -> Tensor:
        """The logits of positions k / L half a layer before each layer that can be pruned."""
        layers = torch.arange(self.first_layer, self.num_layers)
        return ((layers - 0.5).clamp(min=0.25) / self.num_layers).logit()


KERNELS.base = Kernel
