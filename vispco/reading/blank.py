"""A blank model: built from its configuration alone, of any size, and counted as it runs.

Every parameter is one number, seen with the shape of the parameter, so that a model of 70 billion
parameters takes no memory. Neither does what it computes: where an operation gives floating-point
numbers, only their shape is found. Integers and booleans are computed, so that whatever a model
decides by them (grids, tiles, masks, experts) goes as it does for a real model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry


@cache
def _number(dtype: torch.dtype) -> Tensor:
    """The number behind all blank tensors of a dtype. Not 0: pictures of zeros count as none."""
    return torch.ones((), dtype=dtype, device="cpu")


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of one number, seen in every place, that takes no memory."""
    return _number(dtype).expand(shape)


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _is_blank(x: Any) -> bool:
    return _is_float(x) and x.untyped_storage().data_ptr() == _number(x.dtype).data_ptr()


class Counting(TorchDispatchMode):
    """Within it, blank models run. `total`: their FLOPs so far, as `torch.utils.flop_counter`.

    building: whether tensors made from no others, such as parameters, are blank, too.
    """

    def __init__(self, building: bool = False):
        super().__init__()
        self.total, self.building = 0, building
        # What operations gave, by what went into them.
        self._known: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = self._result(func, args, kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out

    def _result(self, func: Any, args: Any, kwargs: dict) -> Any:
        if _looks(func):
            return func(*args, **kwargs)
        given = tree_leaves((args, kwargs))
        made = self.building and not any(isinstance(x, Tensor) for x in given)
        if not made and not any(map(_is_blank, given)):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            # What is blank remains so.
            return args[0] if _is_blank(args[0]) else func(*args, **kwargs)
        sizes = [(x.shape, x.dtype) if isinstance(x, Tensor) else (type(x), x) for x in given]
        key = func, *kwargs, *sizes
        if key not in self._known:
            self._known[key] = _shapes(func, args, kwargs)
        known = self._known[key]
        return _blanks(func(*args, **kwargs) if known is None else known)


@cache
def _looks(func: Any) -> bool:
    """Whether an operation is another look at the same numbers. Blank ones do not look complex."""
    view = func.is_view or torch.Tag.inplace_view in func.tags
    return view and func is not torch.ops.aten.view_as_complex.default


def _shapes(func: Any, args: Any, kwargs: dict) -> Any:
    """Results without numbers; None if some are integers, or if their shapes depend on numbers."""
    meta = torch.device("meta")
    args, kwargs = tree_map_only(Tensor, lambda x: torch.empty_like(x, device=meta), (args, kwargs))
    kwargs = {name: meta if name == "device" else x for name, x in kwargs.items()}
    try:
        results = func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):
        return None
    return results if all(map(_is_float, tree_leaves(results))) else None


def _blanks(results: Any) -> Any:
    """The same with blank tensors in place of all of floating-point numbers."""
    return tree_map_only(
        Tensor, lambda x: blank(*x.shape, dtype=x.dtype) if _is_float(x) else x, results
    )


class _Attention(TorchFunctionMode):
    """Counts an attention function as the two products that it is, and does nothing else of it."""

    def __init__(self, counter: Counting):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
        *rows, size = given["query"].shape
        width = given["value"].shape[-1]
        self.counter.total += 2 * math.prod(rows) * given["key"].shape[-2] * (size + width)
        return blank(*rows, width, dtype=given["query"].dtype)


@contextmanager
def counting() -> Iterator[Counting]:
    """Within it, blank models run, and are counted: `with counting() as counter`."""
    with torch.no_grad(), torch.device("cpu"), Counting() as counter, _Attention(counter):
        yield counter


class Spent:
    """FLOPs that a module spends, of those that a counter counts, until removed: `total`."""

    def __init__(self, counter: Counting, module: nn.Module):
        self.counter, self.total = counter, 0
        start = module.register_forward_pre_hook(lambda *_: self._add(-counter.total))
        stop = module.register_forward_hook(lambda *_: self._add(counter.total))
        self._hooks = start, stop

    def _add(self, flops: int) -> None:
        self.total += flops

    def so_far(self) -> int:
        """`total`, while the module runs."""
        return self.total + self.counter.total

    def remove(self) -> None:
        """Count no more."""
        for hook in self._hooks:
            hook.remove()


@dataclass(frozen=True)
class Blueprint:
    """Adapter, class and configuration of a model. Equal ones are built once."""

    adapter_class: type
    model_class: type
    json: str
    config: Any = field(compare=False, repr=False)

    @classmethod
    def of(cls, adapter_class: type, config: Any) -> Blueprint:
        """Raises ValueError if no class of models is known for the configuration."""
        json = config.to_json_string(use_diff=False)
        return cls(adapter_class, model_class(config), json, config)

    def adapter(self) -> Any:
        """An adapter on the blank model.

        Raises ValueError if the model cannot be built.
        """
        with self.explained():
            return _built(self)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Errors within it are ValueErrors that name the class."""
        try:
            yield
        except Exception as error:
            raise ValueError(
                f"the costs of {self.model_class.__name__} cannot be counted from its "
                f"configuration: {type(error).__name__}: {error}"
            ) from error


@lru_cache(maxsize=16)
def _built(blueprint: Blueprint) -> Any:
    config = copy.deepcopy(blueprint.config)
    # Kernels of other packages are no operations that the counter knows.
    config._attn_implementation, config._experts_implementation = None, "eager"
    with torch.device("cpu"), Counting(building=True):
        model = blueprint.model_class(config).float().eval()
    return blueprint.adapter_class(model)


def model_class(config: Any) -> Any:
    """The class of the vision-language models that have such a configuration.

    That is a class that is loaded, such as one that came with its weights, or one of transformers.
    Raises ValueError if there is none.
    """
    kinds = [c for c in _subclasses(transformers.PreTrainedModel) if c.config_class is type(config)]
    loaded = [c for c in kinds if c.can_generate()]
    named = [c for c in loaded if c.__name__ in (config.architectures or ())]
    known = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    found = next((c for c in (*named, known, *loaded) if c is not None), None)
    if found is None:
        raise ValueError(
            f"no class of models is known for {type(config).__name__}, so that its costs cannot be "
            "counted: load the model first; its class is known then"
        )
    return found


def _subclasses(kind: Any) -> Iterator[Any]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)
