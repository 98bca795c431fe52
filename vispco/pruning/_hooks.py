"""What goes into a model while it is pruned, and comes out again.

All of it has a `remove()`, as the handles of hooks do.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

#: Model -> weak reference to its handle.
_applied: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_applying = threading.Lock()
Self = TypeVar("Self", bound="Handle")


class Handle:
    """Hooks in one model, until the `with` block ends or `.remove()` is called.

    A model has one handle at a time. Subclasses override `_register`.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.hooks: list = []
        # Whether its `with` block is open.
        self._open = False
        # What it says that it does.
        self.says = ""
        self._turns = threading.RLock()

    def __repr__(self) -> str:
        model = type(self.model).__name__
        if not self.installed:
            again = "a `with` block on this handle prunes it again"
            return f"{model} is not pruned now; {again}"
        return f"{model} is pruned: {self.says or 'by a schedule'}"

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
                raise ValueError(
                    f"this {type(self.model).__name__} is pruned already: leave that `with` block "
                    "or call .remove() on its handle first"
                )
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
            raise ValueError(
                "this pruned model is running already, in another thread: let threads take turns, "
                "or give each a model of its own"
            )
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
        raise ValueError(
            "a model cannot be copied or pickled while it is pruned: leave the `with` block, or "
            "call .remove() on the handle, first (save_pretrained works, for the weights are as "
            "always)"
        )


class Replaced:
    """A method of one object, replaced until `remove()`: a hook for methods.

    around: what runs in its place. It is given the call of the method as it was, which takes no
        arguments any more, and a dict of all its arguments by name.

    >>> class Owner:
    ...     def twice(self, x): return 2 * x
    >>> owner = Owner()
    >>> hook = Replaced(owner, "twice", lambda call, given: (call(), given))
    >>> owner.twice(3)
    (6, {'x': 3})
    >>> hook.remove(); owner.twice(3)
    6
    """

    def __init__(self, owner: Any, name: str, around: Callable[[Callable[[], Any], dict], Any]):
        method = getattr(owner, name)
        names = tuple(inspect.signature(method).parameters)

        @functools.wraps(method)
        def ours(*args, **kwargs):
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            return around(functools.partial(method, *args, **kwargs), given)

        self.owner, self.name, self.before = owner, name, vars(owner).get(name)
        self.ours = ours
        setattr(owner, name, ours)

    def remove(self) -> None:
        """Put back what was there; what somebody else put there since is theirs to take away."""
        if vars(self.owner).get(self.name) is self.ours:
            delattr(self.owner, self.name)
            if self.before is not None:
                setattr(self.owner, self.name, self.before)


class Eagerly:
    """While any of these has not been removed, what `torch.compile` made runs as plain PyTorch.

    Compiled code does not look whether hooks have come: what was compiled before `apply` would
    silently not prune.
    """

    # Reentrant: the garbage collector may call `remove`.
    _lock = threading.RLock()
    _count, _on = 0, False
    _stance: AbstractContextManager = nullcontext()

    def __init__(self):
        with Eagerly._lock:
            if not Eagerly._count:
                Eagerly._stance = torch.compiler.set_stance("force_eager")
            Eagerly._count += 1
            self._on = True

    def remove(self) -> None:
        """Let compiled code run again, if nothing else needs plain PyTorch."""
        with Eagerly._lock:
            if self._on and not sys.is_finalizing():
                self._on = False
                Eagerly._count -= 1
                if not Eagerly._count:
                    Eagerly._stance.__exit__(None, None, None)

    # For a model that is let go while it is pruned.
    __del__ = remove
