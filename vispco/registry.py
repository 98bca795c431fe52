"""Registries of pruning methods, model adapters and kernel functions.

A registered class is known everywhere: the command line lists it, `vispco.search` accepts its
name, and the contract test suite runs it. An installed package can register classes that the user
does not import, through the entry-point groups `vispco.methods`, `vispco.adapters` and
`vispco.kernels`.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import entry_points
from typing import Any, TypeVar, overload

from .utils.files import brief

Class = TypeVar("Class", bound=type)


def did_you_mean(name: Any, names: Iterable[Any]) -> str:
    """A hint for an error message: "did you mean 'x'? ", or "" if no name is near.

    >>> did_you_mean("fastw", ["fastv", "random"]), did_you_mean("xyz", ["fastv", "random"])
    ("did you mean 'fastv'? ", '')
    """
    # "FASTV" is meant as "fastv".
    known = {str(each).lower(): str(each) for each in names}
    near = difflib.get_close_matches(str(name).lower(), known, n=1)
    return f"did you mean {known[near[0]]!r}? " if near else ""


def named_options(
    what: str, given: str | Mapping[str, Any] | None, default: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Split a name, or a mapping `{"name": ..., **options}`, into the name and a dict of options.

    what: the argument that `given` was passed as, for error messages.
    default: the name where `given` is None, or a mapping without a "name".
    Whether the name is a known one is for the look-up to say.
    Raises ValueError if `given` is anything else, or if there is no name.

    >>> named_options("kernel", "monotone")
    ('monotone', {})
    >>> named_options("kernel", {"name": "multi_step", "steps": 2})
    ('multi_step', {'steps': 2})
    >>> named_options("estimator", {"clip": False}, default="rank")
    ('rank', {'clip': False})
    """
    options = dict(given) if isinstance(given, Mapping) else {}
    name = given if isinstance(given, str) else options.pop("name", default)
    if name is None or not (given is None or isinstance(given, str | Mapping)):
        expected = "a name, or a mapping of a 'name' and options"
        got = f"the class {given.__name__}" if isinstance(given, type) else brief(repr(given))
        raise ValueError(f"{what} must be {expected}, got {got}")
    return name, options


class Registry:
    """A mapping from names to classes, with entry points and helpful errors.

    kind: the word for such a class in error messages.
    group: the entry-point group from which classes of installed packages are loaded.

    >>> colours = Registry("colour")
    >>> @colours.register("red")
    ... class Red: "The colour of poppies."
    >>> colours.get("red") is Red, colours.names()
    (True, ['red'])
    """

    def __init__(self, kind: str, group: str | None = None):
        self.kind = kind
        self._classes: dict[str, type] = {}
        # What serves where none of the registered does.
        self.fallback: Any = None
        # What every registered class is derived from.
        self.base: Any = None
        # None once the group has been loaded.
        self._group = group

    @overload
    def register(
        self, name: str, cls: None = None, *, overwrite: bool = False
    ) -> Callable[[Class], Class]: ...
    @overload
    def register(self, name: str, cls: Class, *, overwrite: bool = False) -> Class: ...
    def register(self, name: str, cls: type | None = None, *, overwrite: bool = False) -> Any:
        """Register `cls` under `name`; without `cls`, return a decorator that does.

        Raises ValueError if the name is empty, or taken by another class (unless `overwrite`); or
        if `cls` is not derived from the base class of its kind, or lacks what that one demands.
        """
        a_kind = f"{'an' if self.kind[:1] in 'aeiou' else 'a'} {self.kind}"
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"{a_kind}'s name must be a non-empty string, got {name!r}; "
                f"write @register_{self.kind}('name')"
            )
        if cls is None:
            return partial(self.register, name, overwrite=overwrite)
        if self.base and not (isinstance(cls, type) and issubclass(cls, self.base)):
            base, got = self.base.__name__, getattr(cls, "__name__", repr(cls))
            raise ValueError(
                f"{a_kind} must be a class derived from vispco.{base}, got {got}: write "
                f"class {got if str(got).isidentifier() else 'Mine'}(vispco.{base})"
            )
        known = self._classes.get(name, cls)
        if known is not cls and not overwrite:
            raise ValueError(
                f"{self.kind} {name!r} is already registered ({known.__qualname__}); "
                "choose another name or pass overwrite=True"
            )
        if missing := sorted(getattr(cls, "__abstractmethods__", ())):
            lacks = ", ".join(missing)
            raise ValueError(f"{a_kind} must define {lacks}, which {cls.__name__} does not")
        self._classes[name] = cls
        return cls

    def get(self, name: str) -> type[Any]:
        """The class registered under `name`.

        Raises ValueError, with the nearest name, if there is none.
        """
        self._load_entry_points()
        if not isinstance(name, str) or name not in self._classes:
            raise ValueError(
                f"unknown {self.kind} {name!r}: {did_you_mean(name, self._classes)}"
                f"registered are {', '.join(self.names())}; "
                f"add your own with vispco.register_{self.kind}()"
            )
        return self._classes[name]

    def names(self, pattern: str = "*") -> list[str]:
        """Sorted names that match a shell-style pattern."""
        self._load_entry_points()
        return sorted(name for name in self._classes if fnmatch(name, pattern))

    def remove(self, name: str) -> None:
        """Forget `name`, for tests and interactive work."""
        self._classes.pop(name, None)

    def _load_entry_points(self) -> None:
        group, self._group = self._group, None
        for point in entry_points(group=group) if group else ():
            if point.name in self._classes:
                continue
            try:
                self.register(point.name, point.load(), overwrite=True)
            except Exception as error:
                # The fault of another package: name it, and go on.
                what = f"{self.kind} {point.name!r} of an installed package"
                warnings.warn(f"{what} cannot be loaded: {error!r}", stacklevel=2)


METHODS = Registry("method", "vispco.methods")
ADAPTERS = Registry("adapter", "vispco.adapters")
KERNELS = Registry("kernel", "vispco.kernels")

register_method, list_methods = METHODS.register, METHODS.names
register_adapter, list_adapters = ADAPTERS.register, ADAPTERS.names
register_kernel, list_kernels = KERNELS.register, KERNELS.names


def is_composite(name: Any) -> bool:
    """Whether a name is of several methods, "visionzip+pdrop", and not itself registered."""
    return isinstance(name, str) and "+" in name and name not in METHODS.names()


def build_method(name: str, options: Mapping[str, Any] | None = None):
    """An instance of the method registered under `name`, with these options.

    name: may join several, see `vispco.methods.composite`. Their options are then given by part.
    Raises ValueError for an unknown name, or for options that the method does not take.
    """
    if is_composite(name):
        return METHODS.fallback(name, options or {})
    cls, options = METHODS.get(name), dict(options or {})
    try:
        return cls(**options)
    except TypeError as error:
        raise ValueError(f"method {name!r} does not take the options {options}: {error}") from error


def adapter_for(model: Any) -> type[Any]:
    """The adapter class of a model (by its class) or of a configuration (by its `model_type`).

    It is the first whose `handles` says yes; else `vispco.Adapter`, which reads the loaded model.
    Raises ValueError, with the reason, for what is no vision-language model that can be pruned.
    """
    known = map(ADAPTERS.get, list_adapters())
    return next(adapter for adapter in (*known, ADAPTERS.fallback) if adapter.handles(model))
