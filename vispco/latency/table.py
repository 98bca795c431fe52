"""Prefill latency as a cost that a budget can limit: a table of measured times."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from numbers import Real
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import frozen
from ..flops import Cost, Dimensions
from ..pruning import unwrapped
from ..registry import adapter_for
from ..utils.files import SCHEMA_VERSION, JsonFile, checked_keys
from ..utils.version import versions
from .timing import in_turns, timed


@dataclass(frozen=True)
class LatencyTable(Cost, JsonFile):
    """Seconds of one decoder layer, measured at some sequence lengths. Prefill latency is

        F(n) = sum_i t(N_t + n_i)   over the layers i, with N_t text and n_i visual tokens

    t is linear between the lengths and beyond the last, and constant below the first. It never
    falls: each time is raised to the largest before it. The vision tower, the lm_head, and ranking
    and dropping tokens are left out: they are small where layers are large, but not in tiny models.

    dimensions: of the decoder that was measured.
    lengths: numbers of tokens, increasing. seconds: of one layer at each length.
    meta: how it was measured.
    Raises ValueError for anything else.

    >>> sizes = Dimensions(2, 8, 2, 2, 4, 16, 10)
    >>> table = LatencyTable(sizes, lengths=(10, 20), seconds=(1e-3, 3e-3))
    >>> round(float(table(torch.tensor([10.0, 0.0]), 10, 5)), 6)  # t(15) + t(5)
    0.003
    """

    dimensions: Dimensions
    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    meta: dict[str, Any] = field(default_factory=dict, compare=False)

    unit = "seconds"

    def __post_init__(self):
        for name, size in self.dimensions.sizes().items():
            least = 0 if name in ("ffn", "vision_head_dim") else 1
            most = 10_000 if name == "layers" else 2**31
            each = size if isinstance(size, tuple) else (size,)
            if any(type(x) is not int or not least <= x <= most for x in each):
                expected = f"whole numbers, {name} from {least} to {most}"
                raise ValueError(f"dimensions must be {expected}, got {size!r}")
        object.__setattr__(self, "lengths", _checked_lengths(self.lengths))
        if len(self.seconds) != len(self.lengths) or not all(map(_is_time, self.seconds)):
            expected = f"one positive number per length ({len(self.lengths)})"
            raise ValueError(f"seconds must be {expected}, got {self.seconds!r}")
        object.__setattr__(self, "seconds", tuple(accumulate(map(float, self.seconds), max)))

    def layer(self, tokens: Tensor) -> Tensor:
        """Seconds (float64) of one layer that `tokens` (...) enter, elementwise."""
        x = torch.tensor(self.lengths, dtype=torch.float64, device=tokens.device)
        y = torch.tensor(self.seconds, dtype=torch.float64, device=tokens.device)
        at = tokens.double().clamp(min=self.lengths[0])
        right = torch.searchsorted(x, at.detach(), right=True).clamp(max=len(x) - 1)
        left = right - 1
        return y[left] + (at - x[left]) * (y[right] - y[left]) / (x[right] - x[left])

    def ratio(self, counts: Tensor, n_visual, n_text, full) -> Tensor:
        """Predicted time (...) of a pruned call over that of the full model:

            (t_0 + F(n)) / (t_0 + F(N)),   t_0 = max(0, full - F(N))

        counts: visual tokens that enter each layer `(..., L)`, of n_visual (...).
        full: measured seconds of the full call. t_0 is the part that no pruning makes faster: the
            vision tower, embeddings and head, and in a whole answer the decoding.

        >>> sizes = Dimensions(2, 8, 2, 2, 4, 16, 10)
        >>> table = LatencyTable(sizes, lengths=(10, 20), seconds=(1e-3, 3e-3))
        >>> ratio = table.ratio(torch.tensor([15.0, 5.0]), 15, 5, full=10e-3)
        >>> round(float(ratio), 6)  # (4 + 3 + 1) / (4 + 3 + 3)
        0.8
        """
        whole = self.full(n_visual, n_text)
        fixed = (full - whole).clamp(min=0)
        return (fixed + self(counts, n_visual, n_text)) / (fixed + whole)

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        lengths: Sequence[int],
        repeats: int = 10,
        batch_size: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> LatencyTable:
        """Time the prefill of random embeddings by the model's decoder, without pruning.

        The model stays on its device, as it is. One layer's time is the decoder's over its number
        of layers: layers are alike, and nothing between them waits for the device. The time at a
        length is the median of `repeats`. All lengths take turns, so that a slow moment strikes
        all of them; two more rounds before are not counted.

        lengths: numbers of tokens, increasing. batch_size: of the prefill that is timed.
        Raises ValueError for bad numbers, or if the decoder's layers have hooks (it may be pruned).

        >>> from vispco import testbed
        >>> model, processor = testbed.load("testbed-llava")
        >>> table = LatencyTable.measure(model, lengths=[32, 64, 128], repeats=3)
        >>> table.lengths, table.seconds == tuple(sorted(table.seconds))
        ((32, 64, 128), True)
        """
        model, lengths = unwrapped(model), _checked_lengths(lengths)
        if repeats < 1 or batch_size < 1:
            found = f"{repeats} and {batch_size}"
            raise ValueError(f"repeats and batch_size must be at least 1, got {found}")
        adapter = adapter_for(model)(model)
        dimensions = adapter.dimensions(adapter.config)
        device: Any = model.device
        calls = prefills(model, lengths, batch_size)
        with frozen(model), torch.no_grad():
            times = in_turns(calls, rounds=repeats, timer=timed(device, clock))
        on_gpu = device.type == "cuda"
        meta = {
            "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "model_type": adapter.config.model_type,
            "repeats": repeats,
            "batch_size": batch_size,
            "versions": versions(),
        }
        seconds = tuple(median(t) / dimensions.layers for t in times.values())
        return cls(dimensions, lengths, seconds, meta)

    def to_dict(self) -> dict:
        """A JSON-ready dict, with the schema version."""
        lists = {"lengths": list(self.lengths), "seconds": list(self.seconds)}
        parts = {"dimensions": self.dimensions.sizes(), **lists, "meta": dict(self.meta)}
        return {"schema_version": SCHEMA_VERSION, **parts}

    @classmethod
    def from_dict(cls, data: Any) -> LatencyTable:
        """The inverse of `to_dict`.

        Raises ValueError for missing or unknown keys, another schema version, or bad values.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        data = checked_keys(data, "a latency table", required=names)
        try:
            dimensions, meta = Dimensions(**data["dimensions"]), dict(data["meta"])
            return cls(dimensions, tuple(data["lengths"]), tuple(data["seconds"]), meta)
        except TypeError as error:
            parts = "objects dimensions and meta, and lists lengths and seconds"
            raise ValueError(f"a latency table needs {parts}: {error}") from None


def prefills(
    model: nn.Module, lengths: Sequence[int], batch_size: int = 1
) -> dict[int, Callable[[], Any]]:
    """By length, a call that runs the decoder alone on random embeddings (batch_size, length, d).

    Raises ValueError if the decoder's layers have hooks (it may be pruned).
    """
    adapter = adapter_for(model)(model)
    if any(layer._forward_pre_hooks for layer in adapter.layers):
        advice = "measure the full model, outside of any `with vispco.apply`"
        raise ValueError(f"the decoder's layers have hooks: {advice}")
    hidden, generator = adapter.dimensions(adapter.config).hidden, torch.Generator().manual_seed(0)
    calls: dict[int, Callable[[], Any]] = {}
    for n in lengths:
        states = torch.randn(batch_size, n, hidden, generator=generator)
        states = states.to(adapter.model.device, adapter.model.dtype)
        calls[n] = partial(adapter.decoder, inputs_embeds=states, use_cache=True)
    return calls


def default_lengths(longest: int, points: int = 8) -> list[int]:
    """Lengths for a table that reaches up to `longest` tokens.

    >>> default_lengths(80), default_lengths(1)
    ([10, 20, 30, 40, 50, 60, 70, 80], [1, 2])
    """
    longest = max(2, longest)
    return sorted({max(1, round(longest * i / points)) for i in range(1, points + 1)})


def _checked_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    found = tuple(lengths) if isinstance(lengths, Iterable) else ()
    # bool is an int, but no number of tokens.
    whole = all(type(n) is not bool and isinstance(n, int) and 0 < n < 2**53 for n in found)
    if len(found) < 2 or not whole or list(found) != sorted(set(found)):
        expected = "two or more increasing numbers of tokens, such as [64, 256, 704]"
        raise ValueError(f"lengths must be {expected}, got {lengths!r}")
    return found


def _is_time(value: Any) -> bool:
    return isinstance(value, Real) and type(value) is not bool and 0 < float(value) < math.inf
