"""Composite: several methods in one configuration, each ranks the drops of its own layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..registry import METHODS, build_method
from .base import Method

#: "a+b", or with the layer at which each later part begins: "a+b@6", "a+b@6+c@12".
NOTATION = re.compile(r"[^+@]+(\+[^+@]+|(\+[^+@]+@[0-9]+)+)")


class Composite(Method):
    """Hands every layer to one of its parts: the last that begins at this layer or before.

    parts: (start, method) of each. The first starts at 0, and ranks from its own first layer on.
    Raises ValueError as `begin` does.

    >>> method = build_method("vispruner+fastv@6", {"vispruner": {"step": 4}})
    >>> [type(method.at(layer)).__name__ for layer in (0, 5, 6)]
    ['VisPruner', 'VisPruner', 'FastV']
    """

    def __init__(self, parts: Sequence[tuple[int, Method]]):
        self.parts = tuple(parts)
        self.first_layer = self.begin(lambda part: part.first_layer)
        for flag in ("reads_vision", "reads_next", "reads_grid", "reads_unrotated"):
            setattr(self, flag, any(getattr(part, flag) for _, part in self.parts))
        depths = [depth for _, part in self.parts for depth in part.vision_depths]
        self.vision_depths = tuple(dict.fromkeys(depths))

    def begin(self, first_layer: Callable[[Method], int], layers: float = math.inf) -> int:
        """First layer that can be pruned, if `first_layer` gives that of each part.

        layers: number of the model's layers.
        Raises ValueError for a part that begins before it can rank, or that never ranks.
        """
        starts = [first_layer(self.parts[0][1]), *(start for start, _ in self.parts[1:])]
        for start, stop, (_, part) in zip(starts, [*starts[1:], layers], self.parts, strict=True):
            first = first_layer(part)
            if not first <= start < stop:
                raise ValueError(
                    f"{type(part).__name__} cannot rank from layer {start} on and before {stop}, "
                    f"where the next part begins or the model ends: it can from {first} on; write "
                    "increasing layers after each @, as in 'fastv+pdrop@3'"
                )
        return starts[0]

    def at(self, layer: int) -> Method:
        """The part that ranks what is about to enter `layer`."""
        return [part for start, part in self.parts if start <= layer][-1]

    def score(self, ctx):
        """(B, n_visual) of the part in charge."""
        return self.at(ctx.layer).score(ctx)

    def limit(self, ctx, scores):
        """Of the part in charge."""
        return self.at(ctx.layer).limit(ctx, scores)

    def merge(self, ctx, kept):
        """Of the part in charge."""
        return self.at(ctx.layer).merge(ctx, kept)

    def flops(self, dimensions, n_visual, n_text):
        """Not known without the layer."""
        raise NotImplementedError("a composite's FLOPs depend on the layer: ask method.at(layer)")


def composite(name: str, options: Mapping[str, Any]) -> Composite:
    """The composite that is written `name`. Without a layer, the second part begins at layer 1.

    options: {name of a part: its options}.
    Raises ValueError for another notation, an unknown part, or options that no part takes.
    """
    if not NOTATION.fullmatch(name):
        raise ValueError(
            "a composite method is written 'visionzip+pdrop', or with the layer at which each part "
            f"after the first begins, 'fastv+pdrop@12+fastv@13', got {name!r}"
        )
    split = [part.partition("@") for part in name.split("+")]
    names = [part for part, _, _ in split]
    if not all(key in names and isinstance(given, Mapping) for key, given in options.items()):
        form = f"{{{names[0]!r}: {{...}}}}"
        raise ValueError(f"options of {name!r} are given by part, {form}, got {dict(options)}")
    starts = [0, *(int(start or 1) for _, _, start in split[1:])]
    methods = [build_method(part, options.get(part)) for part in names]
    return Composite(list(zip(starts, methods, strict=True)))


METHODS.fallback = composite
