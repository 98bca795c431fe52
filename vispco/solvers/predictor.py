"""The ratio predictor: one network for the whole frontier, theta = f(input, B).

After VisPCO (arXiv 2604.15188).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import Kernel


class FiLM(nn.Module):
    """Feature-wise linear modulation by the budget: `(1 + scale(B)) x + shift(B)`.

    It begins as the identity.
    """

    def __init__(self, width: int):
        super().__init__()
        last = nn.Linear(width, 2 * width)
        self.modulation = nn.Sequential(nn.Linear(1, width), nn.GELU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, budget: Tensor) -> Tensor:
        """x (B, S, width), budget (B,) in [0, 1]."""
        scale, shift = self.modulation(2 * budget[:, None, None].to(x) - 1).chunk(2, -1)
        return x * (1 + scale) + shift


def block(width: int) -> nn.Sequential:
    """LayerNorm, Linear, GELU, Linear."""
    first, last = nn.Linear(width, width), nn.Linear(width, width)
    return nn.Sequential(nn.LayerNorm(width), first, nn.GELU(), last)


class RatioPredictor(nn.Module):
    """A kernel's theta for a budget B, and, if it looks at them, a prompt.

        theta = table(B) + head(mean of x over the prompt)
        table(B): linear between `knots` thetas, equally spaced over `between`
        x = W e                                  e: input embeddings of the prompt, visual and text
        x <- FiLM(x + block(x), B), twice        block: LayerNorm, Linear, GELU, Linear

    The paper's network has no table. But each entry of a table meets its own gradient, and a
    network has to find first how to tell budgets apart: with as many steps, it ends at several
    times the divergence.
    hidden: width of the embeddings; None: no network, the budget alone decides, one configuration
    per budget. Table and head start so that the first theta is `kernel.initial()` for any budget
    and prompt; `begin` gives the table others.

    >>> from vispco.kernels import Monotone
    >>> predictor = RatioPredictor(Monotone(4), hidden=8)
    >>> prompts, real = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    >>> predictor(torch.tensor([0.2, 0.9]), prompts, real).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        kernel: Kernel,
        hidden: int | None = None,
        between: tuple[float, float] = (0.0, 1.0),
        *,
        knots: int = 8,
        width: int = 32,
    ):
        super().__init__()
        self.between = between
        self.table = nn.Parameter(kernel.initial().float().expand(knots, -1).clone())  # (knots, P)
        self.conditioned = hidden is not None
        if hidden is not None:
            self.embed = nn.Linear(hidden, width)
            self.blocks = nn.ModuleList(block(width) for _ in range(2))
            self.films = nn.ModuleList(FiLM(width) for _ in range(2))
            self.head = nn.Linear(width, kernel.num_parameters)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    @property
    def knots(self) -> list[float]:
        """The budgets whose thetas the table has."""
        return torch.linspace(*self.between, len(self.table), dtype=torch.float64).tolist()

    @torch.no_grad()
    def begin(self, thetas: Tensor) -> None:
        """Start from these thetas (knots, P)."""
        self.table.copy_(thetas)

    def forward(
        self, budget: Tensor, embeddings: Tensor | None = None, real: Tensor | None = None
    ) -> Tensor:
        """The theta (B, P) of each budget (B,), a share of the prunable cost.

        embeddings (B, S, hidden), real (B, S) bool: the prompts, for a predictor that looks at
        them. Raises ValueError if such a predictor gets none.
        """
        low, high = self.between
        place = ((budget - low) / (high - low)).clamp(0, 1) * (len(self.table) - 1)
        left = place.long().clamp(max=len(self.table) - 2)
        weight = (place - left)[:, None].to(self.table)
        theta = torch.lerp(self.table[left], self.table[left + 1], weight)
        if not self.conditioned:
            return theta
        if embeddings is None or real is None:
            raise ValueError(
                "this predictor looks at the prompt: give its embeddings (B, S, hidden) and which "
                "are real"
            )
        x, weight = self.embed(embeddings.float()), real[..., None].float()
        for layers, film in zip(self.blocks, self.films, strict=True):
            x = film(x + layers(x), budget)
        return theta + self.head((x * weight).sum(1) / weight.sum(1).clamp(min=1))
