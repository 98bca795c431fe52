"""Files: JSON read strictly, everything written atomically, and one that is locked while a process works on it."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Set
from typing import Any, BinaryIO

SCHEMA_VERSION = 1
#: Of a JSON file: characters, levels of nesting, and digits of a whole number (a float holds 308).
_LONGEST, _DEEPEST, _DIGITS = 1 << 25, 64, 300


def checked_keys(data: Any, what: str, *, required: Set[str], optional: Set[str] = frozenset()) -> dict:
    """`data` as a dict with exactly these keys (and the right schema version), or ValueError."""
    if not isinstance(data, dict):
        raise ValueError(f"{what} must be a JSON object, got {type(data).__name__}")
    data = dict(data)
    version = data.pop("schema_version", None)
    if type(version) is not int or version != SCHEMA_VERSION:
        raise ValueError(f"{what} has schema_version {version!r}, this vispco reads {SCHEMA_VERSION}")
    if missing := required - data.keys():
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}")
    if unknown := data.keys() - required - optional:
        raise ValueError(f"{what} has unknown keys: {', '.join(sorted(map(str, unknown)))}")
    return data


def read_json(path: str | os.PathLike, build):
    """`build(json)`, with every fault of the file reported as one ValueError that names the file.

    Refused are files that could not be written again as they are: with NaN, infinity or numbers beyond a float, with a key
    twice in one object, nested deeper than 64 levels, or longer than 32 Mi characters.
    """
    with open(path, encoding="utf-8") as file:
        try:
            text = file.read(_LONGEST + 1)
            if len(text) > _LONGEST:
                raise ValueError(f"expected at most {_LONGEST:,} characters, got more; is it the right file?")
            data = json.loads(text, parse_constant=_finite, parse_float=_finite, parse_int=_whole, object_pairs_hook=_object)
            _check_depth(data)
            return build(data)
        except UnicodeDecodeError as error:
            raise ValueError(f"{os.fspath(path)}: expected JSON in UTF-8, got the byte 0x{error.object[error.start]:02x}; is it "
                             "the right file?") from error
        except json.JSONDecodeError as error:
            raise ValueError(f"{os.fspath(path)}: this is no JSON ({brief(error)}); is the file whole?") from error
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{os.fspath(path)}: {brief(error)}") from error
        except RecursionError as error:
            raise ValueError(f"{os.fspath(path)}: {_TOO_DEEP}") from error


_TOO_DEEP = f"expected JSON nested at most {_DEEPEST} levels deep, got more"


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"expected finite numbers, got {brief(text, 40)}")
    return value


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"expected numbers of at most {_DIGITS} digits, got {brief(text, 40)}")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"expected each key once, got {key!r} twice in one object")
        found[key] = value
    return found


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(_DEEPEST + 1):
        level = [v for x in level if isinstance(x, (dict, list)) for v in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def brief(text: object, longest: int = 400) -> str:
    """A text on one line; both ends of one that is too long for a message.

    >>> brief("0123456789" * 3, 14), brief("a\\nb")
    ('0123456...6789', 'a b')
    """
    text, head = " ".join(str(text).splitlines()), longest // 2
    return text if len(text) <= longest else f"{text[:head]}...{text[head + 3 - longest:]}"


def printable(text: object) -> str:
    """A text with `?` for line breaks, escape sequences and all else that a terminal would obey or cannot show.

    >>> printable("\x1b[31mred")
    '?[31mred'
    """
    return "".join(c if c.isprintable() else "?" for c in str(text))


def write_json(path: str | os.PathLike, data: Any) -> None:
    """Write JSON next to `path` and rename it there: a reader never sees half a file."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike, text: str | bytes) -> None:
    """Atomic write of text or bytes. What a process that was killed during one has left in the folder goes with the next."""
    folder = os.path.dirname(os.path.abspath(os.fspath(path)))
    _clear(folder)
    file = _temporary(folder)
    try:
        with file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            if os.name == "nt":  # which renames and removes no open file, so that `_clear` finds nothing to do there
                file.close()
            os.replace(file.name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # Ctrl-C after it was renamed
            os.unlink(file.name)
        raise


_BUSY = errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK


def _temporary(folder: str) -> Any:
    """A new file, with a lock that says that its process is alive."""
    for attempt in range(100):
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=".vispco-", delete=False)
        try:
            _lock(file)
        except OSError as error:
            if error.errno not in _BUSY or attempt == 99:
                return file  # no locks, nothing is cleared
        else:
            if os.path.exists(file.name):
                return file
        file.close()  # before it was locked, `_clear` of another process took it, or is about to
        with contextlib.suppress(OSError):
            os.unlink(file.name)


def _clear(folder: str) -> None:
    """Remove temporary files that no living process has locked."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if re.fullmatch(r"\.vispco-[a-z0-9_]{8}", entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError), open(entry.path, "rb") as file:
                    _lock(file)
                    os.unlink(entry.path)


def locked(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading and appending, made if it is not there, that no other process can open so until it is closed
    or its process has ended, however that ended.

    Raises ValueError if another process has it. Warns on a file system that has no locks.
    """
    while True:
        file = open(path, "a+b")
        try:
            _lock(file)
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except OSError as error:
            if error.errno not in _BUSY:
                warnings.warn(f"{os.fspath(path)} cannot be locked ({error.strerror}): let no other process work here",
                              stacklevel=2)
                return file
            file.close()
            raise ValueError(f"{os.fspath(path)}: another process is at work here; wait for it, or choose another place") from None
        file.close()  # who had it has taken it away meanwhile


def _lock(file: Any) -> None:
    try:
        import fcntl
    except ImportError:  # Windows, where a locked byte cannot be read: one far behind the end
        import msvcrt
        os.lseek(file.fileno(), 1 << 30, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
