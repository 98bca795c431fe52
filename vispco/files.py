"""Files: JSON read strictly, everything written atomically, and one that is locked while a process works on it."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import warnings
from collections.abc import Set
from typing import Any, BinaryIO

SCHEMA_VERSION = 1


def checked_keys(data: Any, what: str, *, required: Set[str], optional: Set[str] = frozenset()) -> dict:
    """`data` as a dict with exactly these keys (and the right schema version), or ValueError."""
    if not isinstance(data, dict):
        raise ValueError(f"{what} must be a JSON object, got {type(data).__name__}")
    data = dict(data)
    version = data.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ValueError(f"{what} has schema_version {version!r}, this vispco reads {SCHEMA_VERSION}")
    if missing := required - data.keys():
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}")
    if unknown := data.keys() - required - optional - {"num_layers"}:
        raise ValueError(f"{what} has unknown keys: {', '.join(sorted(map(str, unknown)))}")
    return data


def read_json(path: str | os.PathLike, build):
    """`build(json)`, with every fault of the file reported as one ValueError that names the file."""
    with open(path, encoding="utf-8") as file:
        try:
            return build(json.load(file))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


def write_json(path: str | os.PathLike, data: Any) -> None:
    """Write JSON next to `path` and rename it there: a reader never sees half a file."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike, text: str | bytes) -> None:
    """Atomic write of text or bytes."""
    folder = os.path.dirname(os.path.abspath(os.fspath(path)))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".vispco-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


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
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
                warnings.warn(f"{os.fspath(path)} cannot be locked ({error.strerror}): let no other process work here",
                              stacklevel=2)
                return file
            file.close()
            raise ValueError(f"{os.fspath(path)}: another process is at work here; wait for it, or choose another place") from None
        file.close()  # who had it has taken it away meanwhile


def _lock(file: BinaryIO) -> None:
    try:
        import fcntl
    except ImportError:  # Windows, where a locked byte cannot be read: one far behind the end
        import msvcrt
        os.lseek(file.fileno(), 1 << 30, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
