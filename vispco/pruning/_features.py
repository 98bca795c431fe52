"""What the vision tower makes of a batch's images and videos: made once, for many forward passes.

Pruning begins behind the tower, and a search does not change the tower's weights. The decoder's
layers before the first drop cannot be skipped likewise: methods score the tokens that enter layer 1
by what layer 0 projects.
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
    """The features of one batch, in main memory, as the backbone's methods gave them.

    Those methods are `get_image_features` and `get_video_features`.

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
        # By kind and number of the call.
        self.made: dict[tuple[str, int], Any] = {}
        # Calls of each kind in this forward pass.
        self._calls: Counter = Counter()
        self._making = False

    @contextmanager
    def used(self, backbone: Any) -> Iterator[None]:
        """For one forward pass of `backbone` over the batch.

        A backbone without those two methods makes its own features in every pass.
        """
        self._calls.clear()
        with ExitStack() as stack:
            # Compiled code would be compiled again.
            stack.callback(Eagerly().remove)
            for kind in ("image", "video"):
                if hasattr(backbone, name := f"get_{kind}_features"):
                    stack.callback(Replaced(backbone, name, partial(self._once, kind)).remove)
            yield

    def _once(self, kind: str, make: Callable[[], Any], given: dict) -> Any:
        if self._making:
            # Some make the features of videos with the method for images.
            return make()
        call = kind, self._calls[kind]
        self._calls[kind] += 1
        if call not in self.made:
            self._making = True
            try:
                output = make()
            finally:
                self._making = False
            self.made[call] = tree_map_only(Tensor, _Stored.of, _needed(output))
        return tree_map_only(_Stored, lambda x: x.tensor.to(x.device), self.made[call])


@dataclass
class _Stored:
    """A tensor in main memory, and where it came from."""

    tensor: Tensor
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Stored:
        return cls(tensor.detach().cpu(), tensor.device)


def _needed(output: Any) -> Any:
    """Without what the tower's layers gave on the way, of which the features are made already.

    The patches as they leave the tower are often larger than the features.
    """
    if getattr(output, "pooler_output", None) is None:
        return output
    on_the_way = ("last_hidden_state", "hidden_states", "attentions")
    return type(output)(**{name: x for name, x in output.items() if name not in on_the_way})
