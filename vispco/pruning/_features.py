"""What the vision tower makes of a batch's images and videos: made once, however often the language model runs.

Pruning begins behind the tower, whose weights a search does not change. The decoder's layers before the first cut are another
matter: methods score the tokens before layer 1 by what layer 0 projects, so there is no layer left that could be skipped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ._hooks import Eagerly, Replaced


class Features:
    """Of one batch, in main memory, as `get_image_features` and `get_video_features` gave them.

    >>> class Backbone(torch.nn.Module):
    ...     def get_image_features(self, pixels):
    ...         print("the tower runs")
    ...         return 2 * pixels
    >>> backbone, features = Backbone(), Features()
    >>> for _ in range(2):
    ...     with features.used(backbone):
    ...         backbone.get_image_features(torch.ones(2))
    the tower runs
    tensor([2., 2.])
    tensor([2., 2.])
    """

    def __init__(self) -> None:
        self.made: dict[tuple[str, int], Any] = {}  # by kind and number of the call
        self._calls: Counter = Counter()  # in this forward pass
        self._making = False

    @contextmanager
    def used(self, backbone: Any) -> Iterator[None]:
        """For one forward pass of `backbone` over the batch; a backbone without those two methods makes its own."""
        self._calls.clear()
        with ExitStack() as stack:
            stack.callback(Eagerly().remove)  # compiled code would be compiled again
            for kind in ("image", "video"):
                if hasattr(backbone, name := f"get_{kind}_features"):
                    stack.callback(Replaced(backbone, name, partial(self._once, kind)).remove)
            yield

    def _once(self, kind: str, method: Callable) -> Callable:
        def features(*args, **kwargs):
            if self._making:  # some make the features of videos with the method for images
                return method(*args, **kwargs)
            call = kind, self._calls[kind]
            self._calls[kind] += 1
            if call not in self.made:
                self._making = True
                try:
                    self.made[call] = tree_map_only(Tensor, _Stored.of, _needed(method(*args, **kwargs)))
                finally:
                    self._making = False
            return tree_map_only(_Stored, _Stored.back, self.made[call])

        return features


@dataclass
class _Stored:
    """A tensor in main memory, and where it came from."""

    tensor: Tensor
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Stored:
        return cls(tensor.detach().cpu(), tensor.device)

    def back(self) -> Tensor:
        return self.tensor.to(self.device)


def _needed(output: Any) -> Any:
    """Without what the tower's layers gave on the way, of which the features are made already."""
    if not hasattr(output, "pooler_output"):
        return output
    return type(output)(**{name: value for name, value in output.items() if name not in ("hidden_states", "attentions")})
