"""What goes into a model while it is pruned, and comes out again: all of it has a `remove()`, as hooks' handles do."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import nn

_applied: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> weak reference to its handle
_applying = threading.Lock()
Self = TypeVar("Self", bound="Handle")


class Handle:
    """Hooks in one model, until the `with` block ends or `.remove()` is called; a model has one handle at a time.

    Subclasses override `_register`.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.hooks: list = []
        self._open = False  # its `with` block
        self._turns = threading.RLock()

    def _register(self, add: Callable) -> None:
        """Put the hooks in; `add` each."""

    @property
    def installed(self) -> bool:
        """Whether this is the model's handle."""
        applied = _applied.get(self.model)
        return applied is not None and applied() is self

    def install(self: Self) -> Self:
        """Put the hooks in, all or none. Raises ValueError if the model has another handle."""
        with _applying:
            if self.model in _applied and _applied[self.model]() is not None:
                raise ValueError(f"this {type(self.model).__name__} is pruned already: leave that `with` block or call "
                                 ".remove() on its handle first")
            _applied[self.model] = weakref.ref(self)
        try:
            self._register(self.hooks.append)
        except BaseException:
            self.remove()
            raise
        return self

    def remove(self) -> None:
        """Take the hooks out; the model is as before. Calling it twice is harmless."""
        while self.hooks:
            self.hooks.pop().remove()
        if self.installed:
            del _applied[self.model]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What one thread at a time may do. Raises ValueError if another is at it."""
        if not self._turns.acquire(blocking=False):
            raise ValueError("this pruned model is running already, in another thread: let threads take turns, or give each "
                             "a model of its own")
        try:
            yield
        finally:
            self._turns.release()

    def __enter__(self: Self) -> Self:
        if self._open:
            raise ValueError("the `with` block of this handle is open already: one at a time")
        if not self.installed:
            self.install()
        self._open = True
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self.remove()

    def __reduce_ex__(self, protocol):
        raise ValueError("a model cannot be copied or pickled while it is pruned: leave the `with` block, or call .remove() "
                         "on the handle, first (save_pretrained works, for the weights are as always)")


class Replaced:
    """A method of one object, replaced until `remove()`: a hook for methods."""

    def __init__(self, owner: nn.Module, name: str, around: Callable[[Callable], Callable]):
        method = getattr(owner, name)
        self.owner, self.name, self.before = owner, name, vars(owner).get(name)
        self.ours = functools.wraps(method)(around(method))
        setattr(owner, name, self.ours)

    def remove(self) -> None:
        """Put back what was there; what somebody else put there since is theirs to take away."""
        if vars(self.owner).get(self.name) is self.ours:
            delattr(self.owner, self.name)
            if self.before is not None:
                setattr(self.owner, self.name, self.before)


def named(method: Callable) -> Callable[[tuple, dict], dict]:
    """A function of (args, kwargs) that gives all arguments of a call of `method` by name.

    >>> named(lambda ids, mask=None, **others: None)((1, 2), {"labels": 3})
    {'ids': 1, 'mask': 2, 'labels': 3}
    """
    names = tuple(inspect.signature(method).parameters)
    return lambda args, kwargs: {**dict(zip(names, args)), **kwargs}


class Eagerly:
    """While any of these has not been removed, what `torch.compile` made runs as plain PyTorch.

    Compiled code does not look whether hooks have come: what was compiled before `apply` would silently not prune.
    """

    _lock, _count = threading.RLock(), 0  # reentrant: the garbage collector may call `remove`
    _stance: AbstractContextManager = nullcontext()

    def __init__(self):
        self._on = False
        with Eagerly._lock:
            if not Eagerly._count:
                Eagerly._stance = torch.compiler.set_stance("force_eager")
            Eagerly._count += 1
            self._on = True

    def remove(self) -> None:
        """As a hook's handle does."""
        with Eagerly._lock:
            if self._on and not sys.is_finalizing():
                self._on = False
                Eagerly._count -= 1
                if not Eagerly._count:
                    Eagerly._stance.__exit__(None, None, None)

    __del__ = remove  # with a model that is let go while it is pruned
