"""The reader of GGUF files: what an independent writer wrote is read, all else is refused."""

import hashlib
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from gguf_writer import document, f32, q4_1, q8_0, text, value
from vispco.testbed import gguf

ENTRIES = [
    ("general.architecture", "llama"),
    ("count", 2**32 - 1),
    ("base", 0.5),
    ("flag", True),
    ("other flag", False),
    ("words", ["Ġa", "", "漢字"]),
    ("kinds", [3, -1, 1]),
]


@pytest.fixture
def read(tmp_path):
    """Reads bytes as a file."""

    def reading(content, **options):
        path = tmp_path / "a.gguf"
        path.write_bytes(content)
        return gguf.read(path, **options)

    return reading


def written():
    """One tensor of each type, and the weights of each."""
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(3, 5)).astype(np.float32)
    made = [(f32("plain", plain), plain), q8_0(rng, "bytes", 4, 64), q4_1(rng, "nibbles", 2, 3, 32)]
    return [tensor for tensor, _ in made], {tensor[0]: weights for tensor, weights in made}


def test_metadata_and_every_type_of_tensor_are_read(read):
    tensors, weights = written()
    file = read(document(ENTRIES, tensors))
    assert file.metadata == dict(ENTRIES) and list(file.metadata) == [key for key, _ in ENTRIES]
    assert {name: packed.kind for name, packed in file.tensors.items()} == {
        "plain": "F32",
        "bytes": "Q8_0",
        "nibbles": "Q4_1",
    }
    for name, packed in file.tensors.items():
        found = packed.unpack()
        assert found.dtype == torch.float32 and found.shape == packed.shape == weights[name].shape
        assert np.array_equal(found.numpy(), weights[name]), name
        # The weights are the caller's: to change them changes no file.
        found.zero_()
        assert np.array_equal(packed.unpack().numpy(), weights[name])


def test_a_file_may_hold_nothing(read):
    file = read(document([], []))
    assert file.metadata == {} == file.tensors


def test_tensors_are_mapped_and_not_copied(read, tmp_path):
    (tmp_path / "a.gguf").write_bytes(document([], [f32("w", np.ones((2048, 1024)))]))
    assert peak(lambda: gguf.read(tmp_path / "a.gguf")) < 2**18


def test_the_digest_must_be_the_one_expected(read):
    content = document(ENTRIES, written()[0])
    digest = hashlib.sha256(content).hexdigest()
    assert read(content, sha256=digest).metadata == dict(ENTRIES)
    with pytest.raises(ValueError, match=f"a.gguf: expected the SHA-256 digest 0*, got {digest}$"):
        read(content, sha256="0" * 64)


def test_no_beginning_of_a_file_passes_for_one(read):
    content = document(ENTRIES, written()[0])
    for size in range(len(content)):
        with pytest.raises(ValueError, match="a.gguf: expected "):
            read(content[:size])


def peak(call):
    """Most bytes that Python and numpy hold during a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def entry(kind, content=b""):
    """A file of one entry of a type."""
    return document([("key", struct.pack("<I", kind) + content)], [])


def one(*sizes, code=0, content=bytes(128)):
    """A file of one tensor."""
    return document([], [("w", sizes, code, content)])


HUGE = 2**63
SMALL = [f32("a", np.zeros(4)), f32("b", np.zeros(8))]
BAD = {
    "empty": (b"", "got an empty one"),
    "JSON": (b'{"a": 1}', "begins with b'{\"a\"'"),
    "an older version": (document([], [], version=2), "expected version 3 of GGUF, got 2"),
    "of the other byte order": (document([], [], version=3 << 24), "got 50331648"),
    "tensors without end": (document([], [], counts=(HUGE, 0)), "expected at most 0 tensors"),
    "entries without end": (document([], [], counts=(0, HUGE)), "expected at most 0 entries"),
    "text without end": (entry(8, struct.pack("<Q", HUGE)), "expected 9,223,372,036,854,775,808 b"),
    "texts without end": (entry(9, struct.pack("<IQ", 8, HUGE)), "at most 1 texts for 'key'"),
    "numbers without end": (entry(9, struct.pack("<IQ", 5, HUGE)), "at most 3 numbers for 'key'"),
    "a float64": (entry(12, bytes(8)), "got the type 12 for 'key'"),
    "a boolean of 2": (entry(7, b"\2"), "expected the boolean 0 or 1, got 2"),
    "a list of lists": (entry(9, struct.pack("<IQ", 9, 1)), "got the type 9 for 'key'"),
    "a text in Latin 1": (entry(8, text(b"caf\xe9")), "expected UTF-8 at byte"),
    "a key twice": (document([("k", 1), ("k", 2)], []), "expected each name once, got 'k'"),
    "a tensor twice": (document([], SMALL[:1] * 2), "expected each name once, got 'a'"),
    "another alignment": (document([("general.alignment", 64)], []), "'general.alignment'"),
    "a tensor without sizes": (one(), "expected 1 to 4 sizes of a tensor, got 0"),
    "of five sizes": (one(1, 1, 1, 1, 32), "expected 1 to 4 sizes of a tensor, got 5"),
    "of no weights": (one(4, 0), "expected rows of 1, "),
    "half a block": (one(3, 48, code=8, content=bytes(153)), "expected rows of 32, "),
    "sizes without end": (one(HUGE, HUGE), "file's end"),
    # In 64 bits the product of its sizes is 0.
    "sizes that overflow": (one(2**32, 2**32), "expected 73,786,976,294,838,206,464 bytes"),
    "larger than the file": (one(33), "expected 132 bytes for 'w', got the file's end"),
    "weights of another type": (one(32, code=2), "expected weights of type F32, Q8_0, Q4_1, got"),
    "overlapping tensors": (document([], SMALL, places=(0, 0)), "expected the place 32, got 0"),
    "a gap": (document([], SMALL, places=(0, 64)), "expected the place 32, got 64 for 'b'"),
    "a tensor elsewhere": (document([], SMALL, places=(HUGE, 32)), "expected the place 0, got"),
    "more at its end": (document([], SMALL) + bytes(32), "expected a file of"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_told_and_costs_nothing(name, read):
    content, message = BAD[name]

    def refused():
        with pytest.raises(ValueError, match="a.gguf: expected ") as error:
            read(content)
        assert message in str(error.value)

    refused()
    assert peak(refused) < 2**20


def test_long_lists_end_somewhere(read, monkeypatch):
    """A file of a gigabyte may hold a million items, and no more."""
    monkeypatch.setattr(gguf, "_MOST", 6)
    content = document([("a", [1, 2, 3]), ("b", ["x"])], [])
    assert len(read(content).metadata) == 2
    with pytest.raises(ValueError, match="expected at most 0 texts for 'b' here, got 2"):
        read(document([("a", [1, 2, 3, 4]), ("b", ["x", "y"])], []))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_are_finite(read, bad):
    rng = np.random.default_rng(0)
    half = struct.pack("<e", bad)
    (_, sizes, _, eights), (*_, fours) = q8_0(rng, "w", 1, 32)[0], q4_1(rng, "w", 1, 32)[0]
    for code, packed in (
        (0, struct.pack("<31f", *range(31)) + struct.pack("<f", bad)),
        (8, half + eights[2:]),
        (3, half + fours[2:]),
        (3, fours[:2] + half + fours[4:]),
    ):
        with pytest.raises(ValueError, match="expected finite weights, .* the tensor 'w'"):
            read(document([], [("w", sizes, code, packed)])).tensors["w"].unpack()


def test_the_writer_writes_what_is_published():
    """The oracle itself: the beginning of a file, by hand."""
    assert value("ab") == b"\x08\0\0\0" + b"\2\0\0\0\0\0\0\0ab"
    assert document([("k", 7)], [])[:41] == (
        b"GGUF\3\0\0\0" + bytes(8) + b"\1" + bytes(7) + b"\1" + bytes(7) + b"k\4\0\0\0\7\0\0\0"
    )
