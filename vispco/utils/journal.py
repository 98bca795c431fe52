"""A journal of what was dear to compute, so that a search that was killed goes on where it was.

All that takes time in a search is what the model computes; the rest (optimiser, multipliers, random
numbers, Gaussian process) is cheap and, given that, always the same. So a search runs the same code
always: what its journal holds is recalled, what it lacks is computed and written down. There is no
state to save, and none to forget.

The file has one JSON object per line: what a value is `of`, the value, the seconds that it took,
and a CRC-32 of the file so far. The first is of the search itself: its arguments, its model and
data, and what else decides the last bit.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from .digest import key, of_batches, of_model, of_tensors
from .distributed import broadcast, gathered, processes, rank, total
from .files import locked
from .version import versions

_BEGIN = b'{"of": {"journal": '
_CHECK = b', "check": '


class Journal:
    """Values in the order in which they are asked for, in a file of this process alone.

    path: the file, made if it is not there; None: nothing is kept.
    fresh: whatever the file holds is dropped as soon as a search begins.
    recalled, computed: how many values came from the file, and how many were made.
    seconds: what the recalled values took when they were made.
    Of several processes (`vispco.utils.distributed`), the first has the file.
    Raises ValueError if another process has it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for _ in range(2):
    ...         with Journal(os.path.join(folder, "journal.jsonl")) as journal:
    ...             journal.recall({"journal": "an example"}, lambda: print("computed") or 0.5)
    computed
    0.5
    0.5
    """

    def __init__(self, path: str | os.PathLike | None = None, fresh: bool = False):
        self.path, self.fresh = path, fresh
        self._file: Any = None if path is None or rank() else locked(path)
        self._rewind()

    def begin(
        self, what: str, model: nn.Module, prepared: Sequence, arguments: Mapping[str, Any]
    ) -> None:
        """Start to read at the search itself.

        Raises ValueError, naming the first differences, if the journal is of another search.
        """
        if self.path is None:
            return
        if self.fresh and self._file:
            self._file.truncate(0)
        self.fresh = False
        self._rewind()
        self.recall(_search(what, model, prepared, arguments), lambda: None)
        self._reset_counts()

    def recall(self, of: dict, make: Callable[[], Any]) -> Any:
        """The value of `of`: what the file holds next, or else what `make()` gives, written down.

        The value is JSON-ready. A last line that was cut off while it was written is dropped.
        Raises ValueError if what the file holds next is of something else, or is damaged. Raises
        OSError if nothing can be written, as on a full disk.
        """
        if self.path is None:
            return make()
        line = broadcast(self._next() if self._file else None)
        if line is None:
            started = time.perf_counter()
            value = make()
            if self._file:
                seconds = round(time.perf_counter() - started, 6)
                self._append({"of": of, "value": value, "seconds": seconds})
            self.computed += 1
            return value
        entry = json.loads(line)
        if different := differences(entry["of"], json.loads(json.dumps(of))):
            raise ValueError(
                f"{os.fspath(self.path)} is of another search: {different}; resume with the same "
                "arguments, model, data, versions and machine, or start anew"
            )
        self.recalled += 1
        self.seconds += entry["seconds"]
        return entry["value"]

    @property
    def search(self) -> dict | None:
        """What the journal is of, or None if it holds nothing yet."""
        self._rewind()
        line = broadcast(self._next() if self._file and not self.fresh else None)
        return None if line is None else json.loads(line)["of"]

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the file. An empty file is removed."""
        if self._file and not self._file.closed:
            with contextlib.suppress(OSError):
                if not os.fstat(self._file.fileno()).st_size:
                    os.unlink(self._file.name)
            # A full disk makes it fail.
            with contextlib.suppress(OSError):
                self._file.close()

    # ---- the file ------------------------------------------------------------------------------
    def _reset_counts(self) -> None:
        self.recalled = self.computed = 0
        self.seconds = 0.0

    def _rewind(self) -> None:
        self._reset_counts()
        self._line = self._crc = 0
        if self._file:
            self._file.seek(0)

    def _next(self) -> str | None:
        """The next line; or None, and the file ends here."""
        place, line = self._file.tell(), self._file.readline()
        body, _, check = line.rpartition(_CHECK)
        crc = _sum(body, self._crc)
        if check == b'"%08x"}\n' % crc:
            self._line += 1
            self._crc = crc
            return body.decode() + "}"
        name = os.fspath(self._file.name)
        if not place and not line.startswith(_BEGIN) and not _BEGIN.startswith(line):
            raise ValueError(f"{name} is no journal of a search: choose another file")
        if self._file.read(1):
            raise ValueError(f"{name}: line {self._line + 1} is damaged: start anew")
        self._file.truncate(place)
        self._file.seek(place)
        return None

    def _append(self, entry: dict) -> None:
        body = json.dumps(entry).encode()[:-1]
        crc = _sum(body, self._crc)
        try:
            self._file.write(body + _CHECK + b'"%08x"}\n' % crc)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(self._file.name)) from None
        self._line += 1
        self._crc = crc


def _sum(body: bytes, before: int) -> int:
    """CRC-32 of the file up to this line, line ends included.

    Without the line ends, damage that joins two lines would leave the sum as it was.
    """
    return zlib.crc32(body + b"\n", before)


def opened(
    journal: Journal | str | os.PathLike | None,
) -> contextlib.AbstractContextManager[Journal]:
    """A journal that is closed at the end of a `with` block, unless it was open before."""
    return contextlib.nullcontext(journal) if isinstance(journal, Journal) else Journal(journal)


def _search(what: str, model: Any, prepared: Sequence, arguments: Mapping[str, Any]) -> dict:
    """All that decides what a search finds, to the bit, as the first process knows it."""
    own = of_batches({**dict(b.inputs.items()), "labels": b.labels} for b in prepared)
    everybody = gathered(torch.tensor([list(bytes.fromhex(own))])).tolist()
    kind = model.device.type
    found = {
        "journal": what,
        **arguments,
        "model": of_model(model)[:16],
        "questions": total(sum(map(len, prepared))),
        "data": key(everybody=everybody)[:16],
        **versions(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if kind == "cuda" else kind,
        "CPU": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": processes(),
    }
    return json.loads(broadcast(json.dumps(found, default=str)) or "{}")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], most: int = 3) -> str:
    """The first names whose values differ, with both values.

    >>> differences({"seed": 0, "steps": 20}, {"seed": 0, "steps": 30})
    'steps was 20 and is 30'
    """

    def show(values: Mapping[str, Any], name: str) -> str:
        if name not in values:
            return "not there"
        return shorten(json.dumps(values[name]), 80, placeholder="...")

    found = []
    for name in dict.fromkeys([*before, *now]):
        both = name in before and name in now
        if not both or before[name] != now[name]:
            found.append(f"{name} was {show(before, name)} and is {show(now, name)}")
    rest = f"; and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + rest


def encode_tensor(tensor: Tensor) -> str:
    """The bytes of a tensor as text, for JSON."""
    content: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return base64.b64encode(content.tobytes()).decode()


def decode_tensor(text: str, like: Tensor) -> Tensor:
    """The inverse of `encode_tensor`, for a tensor of the type, shape and device of `like`.

    >>> decode_tensor(encode_tensor(torch.tensor([0.1, -0.0])), like=torch.zeros(2))
    tensor([0.1000, -0.0000])
    """
    content = bytearray(base64.b64decode(text))
    return torch.frombuffer(content, dtype=like.dtype).view(like.shape).to(like.device)


def digest_tensors(*tensors: Tensor) -> str:
    """A short digest of the bits of tensors."""
    return of_tensors((str(i), tensor) for i, tensor in enumerate(tensors))[:16]
