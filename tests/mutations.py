"""Hostile files: valid ones, damaged in ways that are drawn by seed.

Also what reading a hostile file may never do.
"""

import contextlib
import copy
import json
import random
import resource
import signal
import sys
from collections.abc import Iterator

#: In place of anything in a JSON file. A `Raw` is written as it stands.
VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    0.5,
    -0.5,
    1e-320,
    1e308,
    10**30,
    -(10**18),
    10**400,
    float("nan"),
    float("inf"),
    "",
    "0.5",
    "x",
    "nan",
    "\ud800",
    "\0",
    "\x1b[31m\n",
    "é\u202e",
    "../../etc/passwd",
    "/dev/zero",
    "file:///etc/passwd",
    "50%",
    "x" * 5000,
    [],
    {},
    [[]],
    [0.5],
    {"": None},
    {"__class__": "x"},
    [1.0] * 200,
    ["a", "b"],
)
_WRITTEN = (
    "1e999",
    "-1e999",
    "9" * 5000,
    "1" + "0" * 400 + ".5",
    "[" * 2000 + "]" * 2000,
    '{"a":' * 2000 + "1" + "}" * 2000,
    "NaN",
    '"\\ud800\\udc00\\ud800"',
    "[" * 100000,
    "01",
    "1_000",
    "'a'",
    "0x10",
    "-0",
    "-0.0",
    "1E400",
)
_MARK = "\ue123"


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One to four kinds of damage.

    Bits flipped, bytes inserted, deleted, repeated or overwritten, the end cut off.
    """
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 16, 100))
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.randbytes(size)
        elif kind == 3:
            del data[at : at + size]
        elif kind == 4:
            data[at:at] = data[at : at + size] * rng.choice((1, 3, 50))
        elif kind == 5:
            data[at : at + size] = (
                rng.choice((b"\0", b"\xff", b"\x7f", b'"', b"{", b"9", b"\xed\xa0\x80")) * size
            )
        else:
            number = rng.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 65536))
            data[at : at + 4] = number.to_bytes(4, rng.choice(("big", "little")))
    return bytes(data)


def altered(value, rng: random.Random):
    """A copy of a JSON value, altered in one or two places.

    Something else stands there, or a key is gone, new, or there twice.
    """
    value, written = copy.deepcopy(value), []
    for _ in range(rng.randint(1, 2)):
        places = list(_places(value))
        if not places:
            return rng.choice(VALUES), written
        holder, key = rng.choice(places)
        kind = rng.randrange(10)
        if kind < 4:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 4:
            holder[key] = f"{_MARK}{len(written)}"
            written.append(rng.choice(_WRITTEN))
        elif kind == 5:
            del holder[key]
        elif kind == 6:
            other, name = rng.choice(places)
            with contextlib.suppress(LookupError):
                holder[key] = copy.deepcopy(other[name])
        elif kind == 7 and isinstance(holder, dict):
            name = rng.choice(("", "x" * 3000, "\ud800", "__class__", "self", key + " "))
            holder[name] = holder[key]
        elif kind == 8 and isinstance(holder, dict):
            holder[f"{_MARK}{len(written)}"] = copy.deepcopy(rng.choice(VALUES))
            # The same key twice.
            written.append(json.dumps(key))
        elif isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
            holder[key] *= rng.choice((-1, 2, 10**6, 1000, 0))
        elif isinstance(holder, list):
            holder[key:key] = [holder[key]] * rng.choice((1, 2, 100))
    return value, written


def _places(value) -> Iterator[tuple]:
    """(list or dict, index or key) of everything inside, breadth first.

    No more than can be looked at in a moment.
    """
    queue = [value]
    for holder in queue[:2000]:
        if not isinstance(holder, (dict, list)):
            continue
        for key in list(holder if isinstance(holder, dict) else range(len(holder))):
            yield holder, key
            queue.append(holder[key])


def written(value, marks: list[str]) -> bytes:
    """As JSON, with `marks` where `altered` wants them."""
    text = json.dumps(value)
    for i, raw in enumerate(marks):
        text = text.replace(json.dumps(f"{_MARK}{i}"), raw)
    return text.encode()


def mutations(seeds: list, count: int, seed: int = 0, join=None) -> Iterator[bytes]:
    """`count` damaged files.

    seeds: valid files, as bytes, or as JSON values, which are altered half of the time.

    join: of a list of JSON values that make a file of lines; one of them is altered.
    """
    rng = random.Random(seed)
    for i in range(count):
        valid = seeds[i % len(seeds)]
        if isinstance(valid, bytes):
            yield damaged(valid, rng)
        elif join is not None:
            rows = [json.dumps(row).encode() for row in valid]
            place = rng.randrange(len(rows))
            rows[place] = (
                written(*altered(valid[place], rng)) if rng.random() < 0.6 else rows[place]
            )
            content = join(rows)
            yield damaged(content, rng) if rng.random() < 0.5 else content
        elif rng.random() < 0.5:
            yield damaged(json.dumps(valid, indent=rng.choice((None, 2))).encode(), rng)
        else:
            yield written(*altered(valid, rng))


# ---- what must not happen ------------------------------------------------------------------------
_FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "socket.getaddrinfo",
    "pickle.find_class",
    "shutil.rmtree",
)
_watching: list[str] | None = None


def _audit(event, arguments):
    if _watching is not None and event in _FORBIDDEN:
        _watching.append(f"{event} {arguments}"[:300])


# It stays for good: audit hooks cannot be taken away.
sys.addaudithook(_audit)


@contextlib.contextmanager
def harmless(megabytes: int = 300) -> Iterator[None]:
    """Fail if the block does what reading a file never may.

    It must not start a program, connect, unpickle or remove anything, or take more memory than
    `megabytes`.
    """
    global _watching
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _watching = found = []
    try:
        yield
    finally:
        _watching = None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit
    assert not found, found[:3]
    assert grown < megabytes, f"{grown:.0f} MB"


class TooSlow(BaseException):
    """Not an Exception, so that nobody takes it for a fault of the file."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block computes for longer, or waits twenty times as long."""

    def stop(*_):
        raise TooSlow(f"more than {seconds} s")

    timers = {
        signal.ITIMER_PROF: (signal.SIGPROF, seconds),
        signal.ITIMER_REAL: (signal.SIGALRM, 20 * seconds),
    }
    before = {number: signal.signal(number, stop) for number, _ in timers.values()}
    for timer, (_, limit) in timers.items():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer, (number, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
