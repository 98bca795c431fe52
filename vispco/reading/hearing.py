"""Hearing queries and keys where a layer hands them to its attention function.

Every attention layer of Hugging Face ends in a call `attention(module, query, key, value, mask,
scaling=..., softcap=...)`. Heard there, queries and keys are what the layer uses: after projection,
norm, rotary embedding and whatever else a family does. So no family has to be known.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

from torch import nn

#: What hears a module is kept on it, under this name: so both are let go together.
_HEAR = "_vispco_hear"
#: (id of a namespace, name) -> [namespace, function as it was, how many need it replaced].
_replaced: dict[tuple[int, str], list] = {}
_lock = threading.RLock()


class Hearing:
    """Calls `hear(query, key, options)` for every attention that `modules` compute, until removed.

    query: (B, H, N, E), key: (B, G, N, E), just before the attention function computes with them.
    options: its other arguments, such as `attention_mask`, `scaling` and `softcap`. What `hear`
    returns, if anything, are keyword arguments that the function gets in place of its own.
    """

    def __init__(self, modules: Iterable[nn.Module], hear: Callable[[Any, Any, dict], Any]):
        self.modules = list(modules)
        self._places = list(_functions(self.modules))
        with _lock:
            for module in self.modules:
                vars(module)[_HEAR] = hear
            for namespace, name in self._places:
                _replace(namespace, name)

    def remove(self) -> None:
        """Hear nothing more. Calling it twice is harmless."""
        with _lock:
            for module in self.modules:
                vars(module).pop(_HEAR, None)
            for namespace, name in self._places:
                _put_back(namespace, name)
            self.modules, self._places = [], []

    # For a model that is let go while it is pruned.
    __del__ = remove


def _functions(modules: Iterable[nn.Module]) -> Iterator[tuple[MutableMapping, str]]:
    """Where the attention functions of `modules` are looked up: in the files of their classes."""
    seen = set()
    for forward in {inspect.unwrap(type(module).forward) for module in modules}:
        namespace = getattr(forward, "__globals__", {})
        if id(namespace) in seen:
            continue
        seen.add(id(namespace))
        for name, value in list(namespace.items()):
            if name.endswith("eager_attention_forward") and callable(value):
                yield namespace, name
        interface = namespace.get("ALL_ATTENTION_FUNCTIONS")
        if interface is not None and id(interface) not in seen:
            seen.add(id(interface))
            for name in list(interface):
                yield interface, name


def _replace(namespace: MutableMapping, name: str) -> None:
    place = _replaced.setdefault((id(namespace), name), [namespace, namespace[name], 0])
    place[2] += 1
    if place[2] > 1:
        return
    function = place[1]

    @functools.wraps(function)
    def heard(module, query, key, *args, **options):
        hear = vars(module).get(_HEAR)
        if hear is not None:
            named = {**dict(zip(("value", "attention_mask"), args, strict=False)), **options}
            options |= hear(query, key, named) or {}
        return function(module, query, key, *args, **options)

    namespace[name] = heard


def _put_back(namespace: MutableMapping, name: str) -> None:
    place = _replaced[id(namespace), name]
    place[2] -= 1
    if place[2]:
        return
    del _replaced[id(namespace), name]
    if isinstance(namespace, dict):
        namespace[name] = place[1]
    else:
        # transformers keeps a function set this way apart from those that all models share.
        del namespace[name]
        if namespace[name] is not place[1]:
            namespace[name] = place[1]
