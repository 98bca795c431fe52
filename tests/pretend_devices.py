"""Devices that are not there, for tests of models on several devices.

Tensors say that they are on `cpu:1` or `cpu:2`, and do not meet tensors of another device.

PyTorch accepts devices of the CPU with a number, and has none. Inside `pretending()`, tensors made
on such a device, or moved to one, are wrappers. Every operation is run on the CPU, after the check
that PyTorch would make. Autograd sees the wrappers, with their devices, so gradients cross devices
(or fail to) as they would between two GPUs.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
HOST = torch.device("cpu")
COPIES = {aten._to_copy, aten.copy_, aten.copy}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
#: Take numbers that are 0-dimensional tensors of the CPU, besides all pointwise operations.
SCALARS = {aten.masked_fill, aten.masked_fill_, aten.fill, aten.fill_}


class Away(Tensor):
    """A tensor on a pretended device; `here` has the numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor, device: torch.device):
        return Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=device,
        )

    def __init__(self, here: Tensor, device: torch.device):
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside of `pretending()`")

    # What PyTorch does without asking: for these it would look at the memory.
    def tolist(self):
        """As of a GPU's tensor."""
        return self.here.tolist()

    def numpy(self, *args, **kwargs):
        """As of a GPU's tensor."""
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first"
        )

    def as_subclass(self, cls):
        """`cls` wins: wrappers cannot be of two classes.

        Of vispco's `SoftMask`, what matters are its attributes.
        """
        return self.here.as_subclass(cls)

    def __repr__(self, **_):
        return f"{self.here!r} on {self.device}"


@contextmanager
def pretending():
    """Inside, `cpu:1`, `cpu:2`, ... are devices."""
    make = torch.tensor
    # `with torch.device(...)` remembers the functions that make tensors when it is first used. It
    # must remember `torch.tensor` itself, or models are built on a wrong device ever after.
    with torch.device(HOST):
        make(0)

    # No mode sees `torch.tensor`.
    def tensor(*args, device=None, **kwargs):
        made = make(*unwrapped(args), **kwargs)
        return made.to(torch.empty(0).device if device is None else device)

    with mock.patch.object(torch, "tensor", tensor), Pretence():
        yield


class Pretence(TorchDispatchMode):
    """Runs every operation on the numbers, where all tensors are on one device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Most of a search is arithmetic on the host. Blank models begin on the meta device.
        if Away not in types and kwargs.get("device") in (None, HOST, torch.device("meta")):
            return function(*args, **kwargs)
        device = common_device(function, args, kwargs)
        if kwargs.get("device") is not None:
            device = kwargs["device"]
        inside = {**kwargs, "device": HOST} if "device" in kwargs else kwargs
        out = function(*unwrapped(args), **unwrapped(inside))
        # Done in place.
        if function._schema.is_mutable:
            return args[0]
        return out if device == HOST else each(out, lambda t: Away(t, device))


def unwrapped(tree):
    """The same with the numbers of all pretended tensors."""
    return each(tree, lambda t: getattr(t, "here", t))


def each(tree, change):
    """The same with all tensors changed.

    Not `tree_map`: arguments of operations are simpler than what it is made for, and very many.
    """
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: each(x, change) for key, x in tree.items()}
    return type(tree)(each(x, change) for x in tree) if isinstance(tree, (list, tuple)) else tree


def common_device(function, args, kwargs) -> torch.device:
    """Where the result will be.

    Raises RuntimeError, as PyTorch does, if the arguments are on two devices.
    """
    name, (first, *rest) = function.overloadpacket, tensors((args, kwargs)) or [None]
    if first is None:
        return HOST
    if name in COPIES:
        return first.device
    if name in INDEXING:
        indices, values = tensors(args[1]), tensors(args[2:3])
        if any(i.device not in (HOST, first.device) for i in indices):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor "
                f"({first.device})"
            )
        rest = [v for v in values if v.ndim]
    numbers = torch.Tag.pointwise in function.tags or name in SCALARS
    devices = {t.device for t in [first, *rest] if t.ndim or t.device != HOST or not numbers} or {
        HOST
    }
    if len(devices) > 1:
        found = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{found}! ({function})"
        )
    return devices.pop()


def tensors(tree) -> list[Tensor]:
    """All tensors in a tree, in order."""
    found: list[Tensor] = []
    each(tree, found.append)
    return found


def dispatch(model: nn.Module, places: dict[str, str]) -> nn.Module:
    """Spread a model over devices, {module: device}, as accelerate's `dispatch_model` does.

    Whatever has weights moves its arguments to its own device first, except the KV cache. The model
    takes its own arguments to the embeddings, and its output back.
    """
    for name, device in places.items():
        block = placed(model.get_submodule(name), device)
        for module in block.modules():
            if module is block or module.state_dict():
                module.forward = aligned(module.forward, device)
    model.forward = aligned(model.forward, model.get_input_embeddings().weight.device, back=True)
    model.hf_device_map = places
    return model


def placed(block: nn.Module, device: str) -> nn.Module:
    """A module with its weights on a device, as after `block.to(device)`: it moves no argument."""
    for module in block.modules():
        for tree in (module._parameters, module._buffers):
            for key, tensor in tree.items():
                if tensor is None:
                    continue
                there = tensor.detach().to(device)
                if tree is module._parameters:
                    there = nn.Parameter(there, tensor.requires_grad)
                tree[key] = there
    return block


def aligned(forward, device, back: bool = False):
    """`forward` with its arguments on `device`.

    back: move its output to where its first argument was.
    """

    @functools.wraps(forward)
    def run(*args, **kwargs):
        origin = tensors((args, kwargs))[0].device
        rest = {k: v for k, v in kwargs.items() if k == "past_key_values"}
        out = forward(*moved(args, device), **{**moved(kwargs, device), **rest})
        return moved(out, origin) if back else out

    return run


def moved(tree, device):
    """All tensors of a tree on `device`."""
    return tree_map_only(Tensor, lambda t: t.to(device), tree)
