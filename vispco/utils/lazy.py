"""Model inputs whose large tensors are made when they are needed, and held while there is room."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

#: Bytes from which on a tensor of pictures is large.
LARGE = 1 << 16


class Room:
    """How many bytes of large tensors may be held, by all batches together."""

    def __init__(self, size: int):
        self.size, self.used = size, 0

    def take(self, size: int) -> bool:
        """Whether there is room for so many bytes; then it is taken."""
        if self.used + size > self.size:
            return False
        self.used += size
        return True

    def give_back(self, size: int) -> None:
        """So many bytes are held no more."""
        self.used -= size


class Lazy(Mapping):
    """A batch of model inputs: `make()`, called at the first look, and again when it must be.

    Ids, masks, positions and all that is small are held. What is large, such as pixel values, is
    held while there is room, and made again otherwise.

    >>> makes = []
    >>> def make():
    ...     makes.append(1)
    ...     return {"input_ids": torch.ones(1, 3), "pixel_values": torch.ones(1, 3, 99, 99)}
    >>> batch = Lazy(make, Room(0))
    >>> [batch[name].sum() for name in ("input_ids", "pixel_values", "pixel_values", "input_ids")]
    [tensor(3.), tensor(29403.), tensor(29403.), tensor(3.)]
    >>> len(makes), batch.outlines()["pixel_values"].shape
    (3, torch.Size([1, 3, 99, 99]))
    """

    def __init__(self, make: Callable[[], Mapping[str, Any]], room: Room):
        self._held = _Held(make, room)
        self._hidden: tuple[str, ...] = ()

    def without(self, *names: str) -> Lazy:
        """The same batch without some of its inputs; what is held is held once for both."""
        rest = copy.copy(self)
        rest._hidden = names
        return rest

    def outlines(self) -> dict[str, Any]:
        """The inputs with zeros, which take no memory, in place of the large tensors."""
        return self._seen({**self._held.small(), **self._held.shapes})

    def let_go(self) -> None:
        """Hold the large tensors no more. They can be made again."""
        self._held.let_go()

    def items(self) -> Any:
        """As of a dict. The large tensors are made once for all of them."""
        return self._seen(self._held.whole()).items()

    def __getitem__(self, name: str) -> Any:
        if name in self._hidden:
            raise KeyError(name)
        small = self._held.small()
        return small[name] if name in small else self._held.whole()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._seen({**self._held.small(), **self._held.shapes}))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _seen(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: x for name, x in inputs.items() if name not in self._hidden}


class _Held:
    """What is held of a batch. shapes: zeros in the shapes of the large tensors."""

    def __init__(self, make: Callable[[], Mapping[str, Any]], room: Room):
        self.make, self.room = make, room
        self.shapes: dict[str, Tensor] = {}
        self._small: dict[str, Any] | None = None
        self._large: dict[str, Tensor] | None = None

    def whole(self) -> dict[str, Any]:
        if self._small is not None and self._large is not None:
            return {**self._small, **self._large}
        made = dict(self.make())
        shape = made["input_ids"].shape
        large = {name: x for name, x in made.items() if _is_large(name, x, shape)}
        self._small = {name: x for name, x in made.items() if name not in large}
        self.shapes = {name: x.new_zeros(()).expand(x.shape) for name, x in large.items()}
        if self.room.take(_size(large)):
            self._large = large
        return made

    def small(self) -> dict[str, Any]:
        return self.whole() if self._small is None else self._small

    def let_go(self) -> None:
        if self._large is not None:
            self.room.give_back(_size(self._large))
            self._large = None


def _is_large(name: str, x: Any, shape: torch.Size) -> bool:
    """Whether an input holds pixels, or what is alike, and many of them: no ids, no positions."""
    is_tensor = isinstance(x, Tensor) and x.shape != shape and x.nbytes > LARGE
    return is_tensor and (x.is_floating_point() or name.startswith("pixel"))


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(x.nbytes for x in tensors.values())
