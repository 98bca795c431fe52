"""GGUF, the file format of llama.cpp: as much of it as one file of a language model uses.

A file holds these, with all numbers little-endian:

1. "GGUF", the version 3, the number of tensors, the number of entries;
2. the entries: key, type, value;
3. for each tensor its name, number of sizes, sizes (the innermost first), type, place;
4. the tensors' contents. Each begins at a multiple of 32 bytes, and the next one follows at once.

A string is its length in bytes, then UTF-8. A list is the type of its items, their number, then the
items. Weights are packed by type in blocks: one float32 (F32), or 32 weights of 8 bits (Q8_0: scale
times number) or 4 bits (Q4_1: scale times number, plus minimum).
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.files import brief

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
#: Most entries, items of lists and tensors, all together, and most sizes of one tensor.
_MOST, _SIZES = 1 << 20, 4
#: Weights in a block, and what a block is, by the code of a type.
_Q8_0 = np.dtype([("scale", "<f2"), ("numbers", "i1", 32)])
_Q4_1 = np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("pairs", "u1", 16)])
_KINDS = {0: ("F32", 1, np.dtype("<f4")), 8: ("Q8_0", 32, _Q8_0), 3: ("Q4_1", 32, _Q4_1)}
#: Types of entries.
_NUMBERS = {4: "<I", 5: "<i", 6: "<f"}
_BOOL, _STRING, _LIST = 7, 8, 9


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor as a file holds it.

    shape: its sizes, the outermost first, as torch has them.
    kind: "F32", "Q8_0" or "Q4_1".
    blocks: its blocks, in the file's own memory.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    blocks: np.ndarray

    def unpack(self) -> Tensor:
        """The weights: `shape`, float32, in memory of their own.

        Raises ValueError that names the tensor if a number of it is infinite or NaN.
        """
        numbers = [self.blocks] if self.kind == "F32" else [self.blocks["scale"]]
        if self.kind == "Q4_1":
            numbers.append(self.blocks["minimum"])
        if not all(np.isfinite(each).all() for each in numbers):
            raise ValueError(f"expected finite weights, got others in the tensor {self.name!r}")
        return torch.from_numpy(_unpacked(self.kind, self.blocks).reshape(self.shape))


def _unpacked(kind: str, blocks: np.ndarray) -> np.ndarray:
    if kind == "F32":
        return blocks.astype(np.float32)
    weights = np.empty((len(blocks), 32), np.float32)
    if kind == "Q8_0":
        weights[:] = blocks["numbers"]
    else:
        # A byte holds two numbers: of the block's first half in its low bits, of the second above.
        weights[:, :16], weights[:, 16:] = blocks["pairs"] & 15, blocks["pairs"] >> 4
    weights *= blocks["scale"].astype(np.float32)[:, None]
    if kind == "Q4_1":
        weights += blocks["minimum"].astype(np.float32)[:, None]
    return weights


@dataclass(frozen=True, eq=False)
class Gguf:
    """What a file holds. metadata: values of the entries; tensors: still packed; both by name."""

    metadata: dict[str, Any]
    tensors: dict[str, Packed]


def read(path: str | os.PathLike, sha256: str | None = None) -> Gguf:
    """Read a GGUF file. Its tensors are mapped into memory, not copied.

    sha256: the digest that the file must have, in hexadecimal.

    Raises FileNotFoundError, or ValueError that names the file for every fault in it: another
    digest, another version, types other than those above, a name twice, tensors that overlap or
    leave gaps, an end that comes too early or too late.

    >>> import struct, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     content = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    ...     content += struct.pack("<Q4sIi", 4, b"size", 4, 64)
    ...     _ = open(f"{folder}/tiny.gguf", "wb").write(content.ljust(64, b"\\0"))
    ...     read(f"{folder}/tiny.gguf").metadata
    {'size': 64}
    """
    try:
        # An empty file cannot be mapped.
        if not os.path.getsize(path):
            raise ValueError("expected a GGUF file, got an empty one")
        content: Any = np.memmap(path, np.uint8, "r")
        if sha256 is not None and (found := hashlib.sha256(content).hexdigest()) != sha256:
            raise ValueError(f"expected the SHA-256 digest {sha256}, got {found}")
        return _Reader(content).file()
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {brief(error)}") from error


class _Reader:
    """Reads a file from its beginning on.

    Every number is compared with what the file can hold before anything is done by it.
    """

    def __init__(self, content: Any):
        self.content, self.bytes = content, memoryview(content)
        self.at, self.left = 0, _MOST

    def file(self) -> Gguf:
        if (magic := self.take(4)) != MAGIC:
            raise ValueError(f"expected a GGUF file, got one that begins with {magic!r}")
        if (version := self.number("<I")) != VERSION:
            raise ValueError(f"expected version {VERSION} of GGUF, got {version}")
        tensors, entries = self.number("<Q"), self.number("<Q")
        self.count(tensors, "tensors", 28)
        self.count(entries, "entries", 13)
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self.new(metadata)
            if key == "general.alignment":
                raise ValueError(f"expected no {key!r}, so that it is {ALIGNMENT}, got one")
            metadata[key] = self.value(key)
        described: dict[str, tuple] = {}
        for _ in range(tensors):
            name = self.new(described)
            described[name] = self.description()
        return Gguf(metadata, self.tensors(described))

    # ---- parts ----------------------------------------------------------------------------------
    def take(self, size: int) -> bytes:
        if size > len(self.content) - self.at:
            raise ValueError(f"expected {size:,} bytes at byte {self.at:,}, got the file's end")
        self.at += size
        return self.bytes[self.at - size : self.at].tobytes()

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def count(self, number: int, what: str, bytes_each: int) -> None:
        """Refuse a number of things that cannot be, each of at least so many bytes."""
        most = min(self.left, (len(self.content) - self.at) // bytes_each)
        if number > most:
            raise ValueError(f"expected at most {most:,} {what} here, got {number:,}")
        self.left -= number

    def string(self) -> str:
        start, content = self.at, self.take(self.number("<Q"))
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise ValueError(f"expected UTF-8 at byte {start:,}, got {content[:40]!r}") from None

    def new(self, known: dict) -> str:
        if (name := self.string()) in known:
            raise ValueError(f"expected each name once, got {brief(repr(name), 80)} twice")
        return name

    def value(self, key: str) -> Any:
        kind = self.number("<I")
        if kind == _LIST:
            return self.items(key)
        if kind == _STRING:
            return self.string()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _BOOL:
            expected = "text, a number of 32 bits, a boolean or a list"
            raise ValueError(f"expected {expected}, got the type {kind} {_of(key)}")
        if (value := self.number("B")) > 1:
            raise ValueError(f"expected the boolean 0 or 1, got {value} {_of(key)}")
        return bool(value)

    def items(self, key: str) -> list:
        kind, size = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            self.count(size, f"texts {_of(key)}", 8)
            return [self.string() for _ in range(size)]
        if kind not in _NUMBERS:
            raise ValueError(f"expected a list of texts or numbers, got the type {kind} {_of(key)}")
        self.count(size, f"numbers {_of(key)}", 4)
        return [number for (number,) in struct.iter_unpack(_NUMBERS[kind], self.take(4 * size))]

    def description(self) -> tuple:
        """Sizes, type and place of a tensor."""
        if not 1 <= (number := self.number("<I")) <= _SIZES:
            raise ValueError(f"expected 1 to {_SIZES} sizes of a tensor, got {number:,}")
        sizes = [self.number("<Q") for _ in range(number)]
        return sizes, self.number("<I"), self.number("<Q")

    # ---- contents -------------------------------------------------------------------------------
    def tensors(self, described: dict[str, tuple]) -> dict[str, Packed]:
        found, start = {}, _aligned(self.at)
        end = start
        for name, (sizes, code, place) in described.items():
            if code not in _KINDS:
                known = ", ".join(kind for kind, *_ in _KINDS.values())
                raise ValueError(f"expected weights of type {known}, got type {code} {_of(name)}")
            if place != end - start:
                raise ValueError(f"expected the place {end - start:,}, got {place:,} {_of(name)}")
            kind, each, block = _KINDS[code]
            weights = math.prod(sizes)
            # Python's integers have no end, so that no product of sizes is taken for a small one.
            if not weights or sizes[0] % each:
                raise ValueError(f"expected rows of {each}, 2*{each}, ... weights {_of(name)}")
            size = weights // each * block.itemsize
            if size > len(self.content) - end:
                raise ValueError(f"expected {size:,} bytes {_of(name)}, got the file's end")
            blocks = self.content[end : end + size].view(block)
            found[name] = Packed(name, tuple(reversed(sizes)), kind, blocks)
            end = _aligned(end + size)
        if end != len(self.content):
            raise ValueError(f"expected a file of {end:,} bytes, got {len(self.content):,}")
        return found


def _aligned(place: int) -> int:
    """The next multiple of the alignment."""
    return -(-place // ALIGNMENT) * ALIGNMENT


def _of(name: str) -> str:
    return f"for {brief(repr(name), 80)}"
