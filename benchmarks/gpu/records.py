"""What was measured so far, in one JSON file that is written anew after each part."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vispco.utils.files import read_json, write_json
from vispco.utils.journal import differences

#: Of the file's form.
FORMAT = 1
ROOT = Path(__file__).parent.parent.parent


def code() -> str:
    """A digest of the code that is measured and that measures."""
    files = sorted([*ROOT.glob("vispco/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


class Records:
    """The parts of one run, measured in one session or several.

    made_by: versions, machine and settings. Raises ValueError if the file is of others.
    parts: {name: {"code", "took", and "figures" or "failed"}}.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any], fresh: bool = False):
        self.path, self.made_by = path, dict(made_by)
        self.parts: dict[str, dict] = {}
        if path.exists() and not fresh:
            data = read_json(path, checked)
            if different := differences(_flat(data["made_by"]), _flat(self.made_by)):
                raise ValueError(
                    f"{path} is of another run: {different}; choose another folder, or begin anew "
                    "with --fresh"
                )
            self.parts = data["parts"]

    def known(self, name: str, digest: str | None, retry: bool = False) -> bool:
        """Whether a part need not be measured again.

        digest: of the code, if what other code measured does not count. retry: whether a part
        that failed is tried again.
        """
        found = self.parts.get(name)
        if found is None or (digest is not None and found["code"] != digest):
            return False
        return "figures" in found or not retry

    def add(self, name: str, found: dict) -> None:
        """Keep what came of a part, at once."""
        self.parts[name] = found
        write_json(self.path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """What the file holds."""
        return {"format": FORMAT, "made_by": self.made_by, "parts": self.parts}


def checked(data: Any) -> dict:
    """What a file holds. Raises ValueError if it is no such file."""
    known = isinstance(data, dict) and data.get("format") == FORMAT
    if not known or not all(isinstance(data.get(name), dict) for name in ("made_by", "parts")):
        raise ValueError(f"expected what this benchmark writes (format {FORMAT})")
    for part in data["parts"].values():
        if (
            not isinstance(part, dict)
            or "code" not in part
            or not {"figures", "failed"} & set(part)
        ):
            raise ValueError("a part has neither figures nor why it failed")
    return data


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= (
            _flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
        )
    return found
