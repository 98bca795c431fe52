"""Costs other than FLOPs that a budget can limit: the KV cache's memory, and prefill latency from a measured table.

Both are sums over the decoder's layers of what the tokens that enter one cost there, f(N_t + n_i), of one sample.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.files import SCHEMA_VERSION, checked_keys, read_json, write_json
from ..flops import CostModel, Dimensions
from ..registry import adapter_for
from ..calibration import frozen
from .timing import in_turns, timed
from ..utils.version import versions


class LayerSum:
    """F(n) = sum_i f(N_t + n_i), differentiable in the counts. Subclasses define f as `layer`, `unit` and `dimensions`."""

    unit: str
    dimensions: Dimensions

    def layer(self, tokens: Tensor) -> Tensor:
        """Cost of one layer that `tokens` (...) enter, elementwise."""
        raise NotImplementedError

    def __call__(self, counts: Tensor, n_visual, n_text) -> Tensor:
        """Cost (...) of samples with `counts` (..., L) visual tokens entering each layer."""
        tokens = counts + torch.as_tensor(n_text, device=counts.device)[..., None]
        return self.layer(tokens.contiguous()).sum(-1)  # one order of summation, whatever the counts' strides

    def full(self, n_visual, n_text) -> Tensor:
        """Cost (...) without pruning."""
        n_visual = torch.as_tensor(n_visual)
        return self(n_visual[..., None].expand(*n_visual.shape, self.dimensions.layers), n_visual, n_text)

    def text_only(self, n_text) -> Tensor:
        """Cost (...) of the text alone: what no pruning can save."""
        return self.full(torch.zeros_like(torch.as_tensor(n_text)), n_text)


class KVCacheMemory(LayerSum):
    """Bytes of the KV cache after the prefill of one sample; with g key-value heads of size e and b bytes a number,

        F(n) = sum_i (N_t + n_i) 2 g e b

    bytes_per_element: 2 for bfloat16 and float16. Sliding windows save nothing: where tokens are dropped, a layer's cache
    holds all that remain (`vispco.apply`).

    >>> cost = KVCacheMemory(Dimensions(2, 8, 2, 2, 4, 16, 10))
    >>> int(cost(torch.tensor([16, 8]), 16, 4))  # (20 + 12) * 2 * 2 * 4 * 2
    1024
    """

    unit = "bytes"

    def __init__(self, dimensions: Dimensions, bytes_per_element: float = 2):
        if isinstance(bytes_per_element, bool) or not isinstance(bytes_per_element, Real) or bytes_per_element <= 0:
            raise ValueError(f"bytes_per_element must be a positive number (2 for bfloat16), got {bytes_per_element!r}")
        self.dimensions = dimensions
        self.bytes_per_element: float = bytes_per_element

    def layer(self, tokens: Tensor) -> Tensor:
        """Bytes of the keys and values of `tokens` (...)."""
        return tokens * (2 * self.dimensions.kv_heads * self.dimensions.head_dim * self.bytes_per_element)


@dataclass(frozen=True)
class LatencyTable(LayerSum):
    """Seconds of one decoder layer, measured at some sequence lengths; prefill latency is their sum over the layers.

        F(n) = sum_i t(N_t + n_i)

    t is linear between the lengths and beyond the last, constant below the first, and never falls: each time is raised to
    the largest before it. The vision tower, the language model's head, and ranking and dropping tokens are not in it: they
    are small where layers are large, but not in tiny models.

    dimensions: of the decoder it was measured on. lengths: tokens, increasing. seconds: of one layer at each.
    meta: how it was measured. Raises ValueError for anything else.

    >>> table = LatencyTable(Dimensions(2, 8, 2, 2, 4, 16, 10), lengths=(10, 20), seconds=(1e-3, 3e-3))
    >>> round(float(table(torch.tensor([10.0, 0.0]), 10, 5)), 6)  # t(15) + t(5)
    0.003
    """

    dimensions: Dimensions
    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    meta: dict[str, Any] = field(default_factory=dict, compare=False)

    unit = "seconds"

    def __post_init__(self):
        for name, size in dataclasses.asdict(self.dimensions).items():
            least, most = int(name != "vision_head_dim"), 10_000 if name == "layers" else 2**31
            if type(size) is not int or not least <= size <= most:
                raise ValueError(f"dimensions must be whole numbers, {name} from {least} to {most}, got {size!r}")
        object.__setattr__(self, "lengths", _checked_lengths(self.lengths))
        numbers = [s for s in self.seconds if isinstance(s, Real) and not isinstance(s, bool) and 0 < s < float("inf")]
        if len(numbers) != len(self.seconds) or len(numbers) != len(self.lengths):
            raise ValueError(f"seconds must be one positive number per length ({len(self.lengths)}), got {self.seconds!r}")
        object.__setattr__(self, "seconds", tuple(accumulate(map(float, numbers), max)))

    def layer(self, tokens: Tensor) -> Tensor:
        """Seconds of one layer at sequence lengths `tokens` (...), float64."""
        x, y = (torch.tensor(v, dtype=torch.float64, device=tokens.device) for v in (self.lengths, self.seconds))
        at = tokens.double().clamp(min=self.lengths[0])
        right = torch.searchsorted(x, at.detach(), right=True).clamp(max=len(x) - 1)
        left = right - 1
        return y[left] + (at - x[left]) * (y[right] - y[left]) / (x[right] - x[left])

    def ratio(self, counts: Tensor, n_visual, n_text, full) -> Tensor:
        """Predicted time (...) of a call with `counts` (..., L) visual tokens entering each layer, over the full model's,

            (t_0 + F(n)) / (t_0 + F(N)),  t_0 = max(0, full - F(N))

        full: measured seconds of the call in full. t_0 is all of it that no pruning makes faster: the vision tower,
        embeddings and head, and the decoding, where the call is a whole answer.

        >>> table = LatencyTable(Dimensions(2, 8, 2, 2, 4, 16, 10), lengths=(10, 20), seconds=(1e-3, 3e-3))
        >>> round(float(table.ratio(torch.tensor([15.0, 5.0]), 15, 5, full=10e-3)), 6)  # (4 + 3 + 1) / (4 + 3 + 3)
        0.8
        """
        whole = self.full(n_visual, n_text)
        fixed = (full - whole).clamp(min=0)
        return (fixed + self(counts, n_visual, n_text)) / (fixed + whole)

    # ---- measuring --------------------------------------------------------------------------------------
    @classmethod
    def measure(cls, model: nn.Module, lengths: Sequence[int], repeats: int = 10, batch_size: int = 1,
                clock: Callable[[], float] = time.perf_counter) -> LatencyTable:
        """Time the prefill of random embeddings by the model's own decoder, where it is and as it is, without pruning.

        One layer's time is that of the whole decoder over its number of layers: they are alike, and run back to back as
        they will, with nothing between them that waits for the device. Each length counts with the median of `repeats`
        times, taken in turns, so that a slow moment strikes all lengths; two more rounds before are not counted.
        batch_size: of the prefill; the seconds are those of such a batch.
        Raises ValueError for bad numbers, or a model with hooks on its layers (it may be pruned).

        >>> from vispco import testbed
        >>> table = LatencyTable.measure(testbed.load("testbed-llava")[0], lengths=[32, 64, 128], repeats=3)
        >>> table.lengths, table.seconds == tuple(sorted(table.seconds))
        ((32, 64, 128), True)
        """
        lengths = _checked_lengths(lengths)
        if repeats < 1 or batch_size < 1:
            raise ValueError(f"repeats and batch_size must be at least 1, got {repeats} and {batch_size}")
        adapter = adapter_for(model)(model)
        dimensions = adapter.dimensions(adapter.config)
        device: Any = model.device
        with frozen(model), torch.no_grad():
            times = in_turns(prefills(model, lengths, batch_size), rounds=repeats, timer=timed(device, clock))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return cls(dimensions, lengths, tuple(statistics.median(t) / dimensions.layers for t in times.values()), {
            "device": name, "dtype": str(model.dtype).removeprefix("torch."), "model_type": adapter.config.model_type,
            "repeats": repeats, "batch_size": batch_size, "versions": versions()})

    # ---- files ------------------------------------------------------------------------------------------
    def to_dict(self) -> dict:
        """A JSON-ready dict, with the schema version."""
        return {"schema_version": SCHEMA_VERSION, "dimensions": dataclasses.asdict(self.dimensions),
                "lengths": list(self.lengths), "seconds": list(self.seconds), "meta": self.meta}

    @classmethod
    def from_dict(cls, data: Any) -> LatencyTable:
        """The inverse of `to_dict`. Raises ValueError on missing or unknown keys, or another schema."""
        data = checked_keys(data, "a latency table", required={"dimensions", "lengths", "seconds", "meta"})
        try:
            dimensions = Dimensions(**data["dimensions"])
            return cls(dimensions, tuple(data["lengths"]), tuple(data["seconds"]), dict(data["meta"]))
        except TypeError as error:
            raise ValueError(f"a latency table needs objects dimensions and meta, and lists lengths and seconds: {error}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> LatencyTable:
        """Read what `save` wrote. Raises ValueError (FileNotFoundError) that names the file and the fault."""
        return read_json(path, cls.from_dict)


def prefills(model: nn.Module, lengths: Sequence[int], batch_size: int = 1) -> dict[int, Callable[[], Any]]:
    """By length, a call that runs the decoder alone on random embeddings (batch_size, length, d).

    Raises ValueError for a model with hooks on its layers (it may be pruned).
    """
    adapter = adapter_for(model)(model)
    if any(layer._forward_pre_hooks for layer in adapter.layers):
        raise ValueError("the decoder's layers have hooks: measure the full model, outside of any `with vispco.apply`")
    device, dtype = adapter.model.device, adapter.model.dtype
    hidden, generator = adapter.dimensions(adapter.config).hidden, torch.Generator().manual_seed(0)
    states = {n: torch.randn(batch_size, n, hidden, generator=generator).to(device, dtype) for n in lengths}
    return {n: partial(adapter.decoder, inputs_embeds=x, use_cache=True) for n, x in states.items()}


def spread(longest: int, points: int = 8) -> list[int]:
    """Lengths for a table that reaches up to `longest` tokens.

    >>> spread(80), spread(1)
    ([10, 20, 30, 40, 50, 60, 70, 80], [1, 2])
    """
    longest = max(2, longest)
    return sorted({max(1, round(longest * i / points)) for i in range(1, points + 1)})


def _checked_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    found = tuple(lengths)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**53 for n in found)
    if len(found) < 2 or not whole or list(found) != sorted(set(found)):
        raise ValueError(f"lengths must be two or more increasing numbers of tokens, such as [64, 256, 704], got {lengths!r}")
    return found


def cost_models(adapter, method=None, latency: LatencyTable | None = None) -> dict[str, Any]:
    """{name: cost} of all that a budget can limit (`vispco.budget.LIMITS`) on the adapter's model.

    method: whose ranking counts as FLOPs. latency: a table measured on such a model; without one, no budget can limit it.
    Raises ValueError for a table of another decoder.
    """
    dimensions = adapter.dimensions(adapter.config)
    costs = {"flops": CostModel(dimensions, method), "kv_cache": KVCacheMemory(dimensions, adapter.model.dtype.itemsize)}
    if latency is None:
        return costs
    if not isinstance(latency, LatencyTable) or latency.dimensions != dimensions:
        of = f"one of {latency.dimensions}" if isinstance(latency, LatencyTable) else repr(latency)
        raise ValueError(f"latency must be a LatencyTable of this model's decoder, {dimensions}, got {of}: measure one with "
                         "LatencyTable.measure(model, lengths)")
    return {**costs, "latency": latency}
