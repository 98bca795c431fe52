"""A writer of GGUF files, byte by byte after the format's description, for tests of the reader."""

import struct

import numpy as np

#: For a test to break the rules with.
MAGIC, VERSION = b"GGUF", 3


def text(value):
    content = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(content)) + content


def value(content):
    """A value with its type. Bytes are taken as they are."""
    if isinstance(content, bytes):
        return content
    if isinstance(content, bool):
        return struct.pack("<I?", 7, content)
    if isinstance(content, int):
        return struct.pack("<II", 4, content)
    if isinstance(content, float):
        return struct.pack("<If", 6, content)
    if isinstance(content, str):
        return struct.pack("<I", 8) + text(content)
    kind, write = (8, text) if isinstance(content[0], str) else (5, lambda i: struct.pack("<i", i))
    return struct.pack("<IIQ", 9, kind, len(content)) + b"".join(map(write, content))


def document(entries, tensors, magic=MAGIC, version=VERSION, counts=None, places=None):
    """A file's bytes.

    entries: (key, value) pairs. tensors: (name, sizes as torch has them, code of the type, bytes).
    counts: numbers of tensors and entries to claim. places: of the tensors, if they shall be wrong.
    """
    head = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(entries))))
    head += b"".join(text(key) + value(content) for key, content in entries)
    contents = b""
    for i, (name, sizes, code, packed) in enumerate(tensors):
        place = places[i] if places else len(contents)
        head += text(name) + struct.pack("<I", len(sizes))
        head += b"".join(struct.pack("<Q", size) for size in reversed(sizes))
        head += struct.pack("<IQ", code, place)
        contents += padded(packed)
    return padded(head) + contents


def padded(content):
    return content + bytes(-len(content) % 32)


# ---- tensors: what is written, and what it means, from the same numbers -------------------------
def f32(name, weights):
    """A tensor in float32."""
    weights = np.asarray(weights)
    return name, weights.shape, 0, weights.astype("<f4").tobytes()


def q8_0(rng, name, *sizes):
    """A random tensor of type Q8_0, and its weights."""
    packed, weights = b"", []
    for _ in range(int(np.prod(sizes)) // 32):
        scale = _half(rng.uniform(-3, 3))
        numbers = [int(n) for n in rng.integers(-128, 128, 32)]
        packed += struct.pack("<e32b", scale, *numbers)
        weights += [scale * number for number in numbers]
    return (name, sizes, 8, packed), np.array(weights, np.float32).reshape(sizes)


def q4_1(rng, name, *sizes):
    """A random tensor of type Q4_1, and its weights."""
    packed, weights = b"", []
    for _ in range(int(np.prod(sizes)) // 32):
        scale, minimum = _half(rng.uniform(-3, 3)), _half(rng.uniform(-3, 3))
        numbers = [int(n) for n in rng.integers(0, 16, 32)]
        pairs = [numbers[i] + 16 * numbers[i + 16] for i in range(16)]
        packed += struct.pack("<ee16B", scale, minimum, *pairs)
        weights += [scale * number + minimum for number in numbers]
    return (name, sizes, 3, packed), np.array(weights, np.float32).reshape(sizes)


def _half(number):
    """The nearest number that two bytes hold."""
    return struct.unpack("<e", struct.pack("<e", number))[0]
