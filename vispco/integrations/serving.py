"""One drop before the language model, in a serving engine: the features of one picture at a time.

An engine keeps what its vision tower made of a picture for every prompt that has it, and counts the
picture's tokens before the tower has run. So the number kept depends on the number of tokens alone,
and which are kept depends on the picture alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import PruningConfig, whole_tokens
from ..pruning.prompt import Prompt
from ..pruning.state import PassState
from ..registry import build_method
from ..solvers.before import before_llm

#: Side of the square of tokens on which a method is tried.
TRIED = 4


@dataclass(frozen=True)
class OneDrop:
    """The drop before layer 0 of a configuration that has no other.

    method: a `vispco.Method`. ratio: the share of a picture's tokens that is kept.
    """

    method: Any
    ratio: float

    @classmethod
    def of(cls, config: PruningConfig) -> OneDrop:
        """The one drop of a configuration.

        Raises ValueError for a configuration that drops elsewhere, or all tokens, or none; and for
        a method that reads the language model or the text, or whose count depends on the picture.

        >>> drop = OneDrop.of(PruningConfig("divprune", [0.25] * 4))
        >>> drop.ratio, drop.count(576)
        (0.25, 144)
        >>> OneDrop.of(PruningConfig("fastv", [1, 1, 0.5, 0.5]))
        Traceback (most recent call last):
        ValueError: the configuration (fastv: layer 2 keeps 50.0 % (drops 50.0 %)) must drop once, \
before layer 0: find one with vispco search --before-llm, or give every layer the same keep ratio
        """
        steps = config.steps
        if list(steps) != [0]:
            raise ValueError(
                f"the configuration ({config.describe()}) must drop once, before layer 0: find one "
                "with vispco search --before-llm, or give every layer the same keep ratio"
            )
        if not steps[0]:
            raise ValueError(
                "the configuration drops all visual tokens, and a picture needs a token at least: "
                "set keep_ratios above 0"
            )
        drop = cls(build_method(config.method, config.method_options).at(0), steps[0])
        reason = drop.refusal()
        if reason is not None:
            able = [name for name in before_llm() if cls(build_method(name), 0.5).refusal() is None]
            raise ValueError(
                f"method {config.method!r} cannot rank a picture before the language model: "
                f"{reason}; choose from {', '.join(able)}"
            )
        return drop

    def refusal(self) -> str | None:
        """Why the method cannot rank a picture by what the vision side gives; None: it can.

        It is tried on a square of made-up tokens.
        """
        side = torch.arange(TRIED)
        grid = torch.cartesian_prod(torch.tensor([0]), side, side)
        n = len(grid)
        features = torch.linspace(-1, 1, 8 * n).sin().view(n, 8)
        # Where all are attended alike, a method that counts outliers keeps fewer.
        attention = torch.full((n,), 1 / n), features
        if self.method.first_layer or self.method.reads_next:
            return "it ranks by what happens in the language model"
        try:
            self.keep(features, lambda: grid, lambda depth: attention)
        except ValueError as error:
            return str(error)
        return None

    def count(self, n: int) -> int:
        """Whole tokens kept of a picture's `n`."""
        return int(whole_tokens(self.ratio, n))

    def keep(
        self,
        features: Tensor,
        grid: Callable[[], Tensor],
        tower: Callable[[float | None], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """The tokens (K, D) that are kept of one picture, merged if the method merges.

        features: (n, D), what would enter the language model. grid: gives frame, row and column
        (n, 3). tower: gives the attention (n,) that the tokens receive in the vision tower, at a
        depth or (None) in the layer that makes them, and their keys (n, E).
        The second result is their places among the n (K,), in ascending order.
        Raises ValueError if the method asks for anything else, or keeps another number of tokens.
        """
        n, method = len(features), self.method
        kept = self.count(n)
        every = torch.ones(1, n, dtype=torch.bool, device=features.device)
        prompt = Prompt(every, every, every, [n], [n], [0], [0], n, False)
        state = _Alone(
            None, method, False, prompt, [[kept]], [n], _sources(method, features, grid, tower)
        )
        hidden = state.embeddings = features[None]
        hidden, _, _, chosen = state.choose(0, hidden, [kept], _nothing_ahead)
        places = chosen[0].nonzero()[:, 0]
        if len(places) != kept:
            raise ValueError(
                f"{type(method).__name__} keeps {len(places)} of {n} tokens, and {kept} places are "
                "counted before it has seen them: leave out the option by which it keeps fewer"
            )
        return hidden[0, places], places


def _sources(method: Any, features: Tensor, grid: Any, tower: Any) -> dict[str, Any]:
    """What a method may ask of the vision side, as `vispco.pruning._tower.Tower.sources`."""

    def read(depth: float | None = None) -> tuple[Tensor, Tensor]:
        attention, keys = tower(depth)
        return attention[None], keys[None]

    depths = {depth: lambda depth=depth: read(depth) for depth in method.vision_depths}
    return {
        "tower": read,
        "depths": depths,
        "grid": lambda: grid()[None].to(features.device),
    }


class _Alone(PassState):
    """A pass that ends before the first layer, and has pictures but no text."""

    def context(self, *args: Any) -> Any:
        context = super().context(*args)
        absent: Any = _NoText()
        context.text_mask = context.last = absent
        return context


class _NoText:
    """In place of what a method would read of the text."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "it reads the text of the prompt, and a picture's tokens are kept for every prompt "
            "that has it"
        )

    # Whatever is done with it, by itself or with a tensor.
    __getattr__ = __getitem__ = __and__ = __or__ = __invert__ = __torch_function__ = _refuse


def _nothing_ahead(rotary: bool = True) -> Any:
    raise ValueError("it reads the language model, which has not run")
