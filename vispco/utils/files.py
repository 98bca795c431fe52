"""Files: JSON read strictly, atomic writes, and a file that one process holds locked."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Set
from typing import Any, BinaryIO, TypeVar

SCHEMA_VERSION = 1
#: Limits of a JSON file: characters, levels of nesting, digits of a whole number (a float has 308).
_LONGEST, _DEEPEST, _DIGITS = 1 << 25, 64, 300
#: What each kind of file has alone.
_KINDS = {
    "keep_ratios": "a pruning configuration",
    "points": "a frontier",
    "rows": "a profile",
    "lengths": "a latency table",
}
_TOO_DEEP = f"expected JSON nested at most {_DEEPEST} levels deep, got more"
#: What the system says of a file that another process has locked.
_BUSY = errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK

Built = TypeVar("Built")
Loaded = TypeVar("Loaded", bound="JsonFile")


# ---- reading ----------------------------------------------------------------------------------
def read_json(path: str | os.PathLike, build: Callable[[Any], Built]) -> Built:
    """`build(data)` of a JSON file's data.

    Raises FileNotFoundError, or one ValueError that names the file for every other fault in it.
    A file is refused if it could not be written again as it is: with NaN, infinity or numbers
    beyond a float, with a key twice in one object, nested deeper than 64 levels, or longer than
    32 Mi characters.
    """
    if os.path.isdir(path):
        raise ValueError(f"{os.fspath(path)} is a folder: give a file{_files_in(path)}")
    with open(path, encoding="utf-8") as file:
        try:
            return build(_parsed(file.read(_LONGEST + 1)))
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)}: {_fault(error)}") from error


def _files_in(folder: str | os.PathLike) -> str:
    """The files of JSON in a folder, for an error message."""
    found = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    found = [path for path in found if path.endswith(".json")]
    return f" of it, such as {', '.join(found[:4])}" if found else "; it holds none of JSON"


def _fault(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        byte = f"0x{error.object[error.start]:02x}"
        return f"expected JSON in UTF-8, got the byte {byte}; is it the right file?"
    if isinstance(error, json.JSONDecodeError):
        return f"this is no JSON ({brief(error)}); is the file whole?"
    return _TOO_DEEP if isinstance(error, RecursionError) else brief(error)


def _parsed(text: str) -> Any:
    if len(text) > _LONGEST:
        limit = f"{_LONGEST:,} characters"
        raise ValueError(f"expected at most {limit}, got more; is it the right file?")
    numbers: Any = {"parse_constant": _finite, "parse_float": _finite, "parse_int": _whole}
    data = json.loads(text, object_pairs_hook=_object, **numbers)
    level = [data]
    for _ in range(_DEEPEST + 1):
        level = [inner for outer in level for inner in _children(outer)]
    if level:
        raise ValueError(_TOO_DEEP)
    return data


def _children(data: Any) -> list:
    if isinstance(data, dict):
        return list(data.values())
    return data if isinstance(data, list) else []


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


def checked_keys(
    data: Any, what: str, *, required: Set[str], optional: Set[str] = frozenset()
) -> dict:
    """A copy of `data` without its schema version.

    what: the thing that `data` describes, for error messages.
    Raises ValueError unless `data` is a dict of this schema version with all `required` keys, and
    no others than these and the `optional` ones.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{what} must be a JSON object, got {type(data).__name__}")
    data = dict(data)
    version = data.pop("schema_version", None)
    if version is None:
        raise ValueError(f"this is not {what}: it has no schema_version, which vispco's files have")
    if type(version) is not int or version != SCHEMA_VERSION:
        newer = type(version) is int and version > SCHEMA_VERSION
        advice = "pip install --upgrade vispco" if newer else "make it again with this one"
        raise ValueError(
            f"{what} has schema_version {version!r}, this vispco reads {SCHEMA_VERSION}: {advice}"
        )
    other = next((kind for key, kind in _KINDS.items() if key in data and key not in required), "")
    if required - data.keys() and other:
        raise ValueError(f"expected {what}, got {other}; is it the right file?")
    if missing := required - data.keys():
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}")
    if unknown := data.keys() - required - optional:
        raise ValueError(f"{what} has unknown keys: {', '.join(sorted(map(str, unknown)))}")
    return data


class JsonFile:
    """Base of classes that are saved as a JSON file.

    A subclass defines `to_dict`, and the classmethod `from_dict`, its inverse, which raises
    ValueError for anything that `to_dict` cannot have returned.
    """

    def to_dict(self) -> dict:
        """A JSON-ready dict, with the schema version."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls: type[Loaded], data: Any) -> Loaded:
        """The inverse of `to_dict`."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike) -> None:
        """Write a JSON file, atomically: a reader sees the whole file or none."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls: type[Loaded], path: str | os.PathLike) -> Loaded:
        """Read what `save` wrote.

        Raises FileNotFoundError, or ValueError that names the file and the fault.
        """
        return read_json(path, cls.from_dict)


# ---- texts in messages ------------------------------------------------------------------------
def brief(text: object, longest: int = 400) -> str:
    """A text on one line; both ends of one that is too long for a message.

    >>> brief("0123456789" * 3, 14), brief("a\\nb")
    ('0123456...6789', 'a b')
    """
    text, head = " ".join(str(text).splitlines()), longest // 2
    return text if len(text) <= longest else f"{text[:head]}...{text[head + 3 - longest :]}"


def printable(text: object) -> str:
    """A text with `?` for everything that a terminal would obey or cannot show.

    >>> printable("\x1b[31mred")
    '?[31mred'
    """
    return "".join(c if c.isprintable() else "?" for c in str(text))


# ---- writing ----------------------------------------------------------------------------------
def write_json(path: str | os.PathLike, data: Any) -> None:
    """Write JSON, atomically: a reader sees the whole file or none."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike, text: str | bytes) -> None:
    """Write text or bytes, atomically: a reader sees the whole file or none.

    The text goes to a temporary file beside `path`, which is then renamed. Temporary files that
    killed processes left in the folder are removed.
    """
    folder = os.path.dirname(os.path.abspath(os.fspath(path)))
    _clear(folder)
    try:
        file = _temporary(folder)
    except OSError as error:
        # Of the temporary file, whose name says nothing to a user.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
    try:
        with file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            # Windows renames no open file. It removes none either, so that `_clear` cannot harm.
            if os.name == "nt":
                file.close()
            os.replace(file.name, path)
    except BaseException:
        # After Ctrl-C the file may have been renamed already.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name)
        raise


def _temporary(folder: str) -> Any:
    """A new file, locked so that others know that its process is alive."""
    for attempt in range(100):
        with contextlib.ExitStack() as closing:
            file = closing.enter_context(
                tempfile.NamedTemporaryFile(dir=folder, prefix=".vispco-", delete=False)
            )
            try:
                _lock(file)
                found = os.path.exists(file.name)
            except OSError as error:
                # Without locks, nothing is ever cleared.
                found = error.errno not in _BUSY or attempt == 99
            if found:
                closing.pop_all()
                return file
        # Before the file was locked, `_clear` of another process took it, or is about to.
        with contextlib.suppress(OSError):
            os.unlink(file.name)
    raise OSError(errno.EBUSY, "cannot lock a new file", folder)


def _clear(folder: str) -> None:
    """Remove temporary files that no living process has locked."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            ours = re.fullmatch(r"\.vispco-[a-z0-9_]{8}", entry.name)
            if ours and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError), open(entry.path, "rb") as file:
                    _lock(file)
                    os.unlink(entry.path)


def locked(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading and appending, and lock it until it is closed or the process ends.

    The file is made if it does not exist. Raises ValueError if another process has it locked.
    Warns if the file system has no locks.
    """
    place = os.fspath(path)
    while True:
        with contextlib.ExitStack() as closing:
            file = closing.enter_context(open(path, "a+b"))
            try:
                _lock(file)
                # The process that had it locked may have removed it meanwhile: open a new one.
                opened = os.fstat(file.fileno())
                if not (os.path.exists(path) and os.path.samestat(opened, os.stat(path))):
                    continue
            except OSError as error:
                if error.errno in _BUSY:
                    fault = "another process is at work here; wait for it, or choose another place"
                    raise ValueError(f"{place}: {fault}") from None
                fault = f"{place} cannot be locked ({error.strerror})"
                warnings.warn(f"{fault}: let no other process work here", stacklevel=2)
            closing.pop_all()
            return file


def _lock(file: Any) -> None:
    """Lock an open file. Raises OSError if another process has, or if the system has no locks."""
    try:
        import fcntl
    except ImportError:
        # Windows. A locked byte cannot be read: lock one far behind the end.
        import msvcrt

        os.lseek(file.fileno(), 1 << 30, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
