"""The ratio predictor: one network for the whole frontier, theta = f(input, B) (VisPCO, arXiv 2604.15188)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .kernels import Kernel


class FiLM(nn.Module):
    """Feature-wise linear modulation by the budget: `(1 + scale(B)) x + shift(B)`; at first, the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.modulation = nn.Sequential(nn.Linear(1, width), nn.GELU(), nn.Linear(width, 2 * width))
        nn.init.zeros_(self.modulation[-1].weight)
        nn.init.zeros_(self.modulation[-1].bias)

    def forward(self, x: Tensor, budget: Tensor) -> Tensor:
        """x (B, S, width), budget (B,) in [0, 1]."""
        scale, shift = self.modulation(2 * budget[:, None, None].to(x) - 1).chunk(2, -1)
        return x * (1 + scale) + shift


class RatioPredictor(nn.Module):
    """A kernel's theta for a prompt and a budget.

        x = W e                                  e: input embeddings of the prompt, visual and text
        x <- FiLM(x + block(x), B), twice        block: LayerNorm, Linear, GELU, Linear
        theta = theta_0 + head(mean of x over the prompt)

    hidden: width of the embeddings; None: the budget alone decides (e is one learned vector), which gives one
    configuration per budget. The head starts at 0, so the first theta is `kernel.initial()` for any budget.

    >>> from vispco.kernels import Monotone
    >>> predictor = RatioPredictor(Monotone(4), hidden=8)
    >>> predictor(torch.tensor([0.2, 0.9]), torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)).shape
    torch.Size([2, 4])
    """

    def __init__(self, kernel: Kernel, hidden: int | None = None, width: int = 32):
        super().__init__()
        self.embed = nn.Linear(hidden, width) if hidden else nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)) for _ in range(2))
        self.films = nn.ModuleList(FiLM(width) for _ in range(2))
        self.head = nn.Linear(width, kernel.num_parameters)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("start", kernel.initial().float())

    @property
    def conditioned(self) -> bool:
        """Whether the prompt has a say."""
        return isinstance(self.embed, nn.Linear)

    def forward(self, budget: Tensor, embeddings: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        """theta (B, P). budget (B,) as a share of the prunable cost; embeddings (B, S, hidden), real (B, S) bool."""
        if self.conditioned:
            if embeddings is None or real is None:
                raise ValueError("this predictor looks at the prompt: give its embeddings (B, S, hidden) and which are real")
            x = self.embed(embeddings.float())
        else:
            x, real = self.embed.expand(len(budget), 1, -1), None
        for block, film in zip(self.blocks, self.films):
            x = film(x + block(x), budget)
        weight = torch.ones_like(x[..., :1]) if real is None else real[..., None].to(x)
        return self.start + self.head((x * weight).sum(1) / weight.sum(1).clamp(min=1))
