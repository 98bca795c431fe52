"""Results as files: one JSON per claim, and one page that puts them beside the paper's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vispco.utils.digest import key
from vispco.utils.files import SCHEMA_VERSION, read_json, write_json, write_text
from vispco.utils.version import versions

from . import beside, figures, paper, tables
from .claims import CLAIMS
from .markdown import markdown
from .sizes import SIZES, Size

PAGE = "README.md"
CHECK = "sha256"  # of the rest of a result: no number of ours is written by hand
ORDER = (
    "winner",
    "hypervolume",
    "percentile",
    "cost",
    "depth",
    "kernels",
    "transfer",
    "convergence",
    "estimators",
)
MACHINE = f"{os.cpu_count()} CPU cores, one thread a process"


def conclude(name: str, rows: list, size: Size) -> dict:
    """A claim's result, JSON-ready."""
    claim = CLAIMS[name]
    seeds = {s.seeds for s in size.settings}
    return {
        "schema_version": SCHEMA_VERSION,
        "claim": name,
        "title": claim.TITLE,
        "target": claim.TARGET,
        "size": size.name,
        "seeds": sorted(seeds),
        "calibration": size.calibration,
        "test": size.test,
        "machine": MACHINE,
        "command": command(name, size),
        "versions": versions(),
        **claim.conclude(rows, size),
    }


def command(name: str, size: Size) -> str:
    """The command that makes a claim's result."""
    seeds = "" if size == SIZES[size.name] else f" --seeds {size.depth_seeds}"
    return f"python -m tests.reproduction --size {size.name} --claims {name}{seeds}"


def write(results: Mapping[str, dict], folder: Path) -> None:
    """The results' JSON and figures, then the page about all results that the folder holds."""
    for name, result in results.items():
        plain = json.loads(json.dumps(result))  # as it will be read
        write_json(folder / f"{name}.json", {**plain, CHECK: key(**plain)})
    known = load(folder)
    for name, draw in figures.FIGURES.items():
        if name in results or name == "hypervolume":  # its figure shows the competitors too
            _draw(name, draw, known, folder)
    write_text(folder / PAGE, page(known, pictures(folder)))


def _draw(name: str, draw: figures.Drawing, results: Mapping[str, dict], folder: Path) -> None:
    """A claim's figures, in place of those that it had."""
    made = {
        f"{stem}.{kind}": figures.render(make, kind)
        for stem, make in draw(results)
        for kind in ("svg", "png")
    }
    for file, picture in made.items():
        write_text(folder / file, picture)
    for stem in pictures(folder)[name]:
        for kind in ("svg", "png"):
            if f"{stem}.{kind}" not in made:
                (folder / f"{stem}.{kind}").unlink(missing_ok=True)


def pictures(folder: Path) -> dict[str, list[str]]:
    """{claim: names of its figures in a folder, without their suffix}."""
    stems = sorted(path.stem for path in folder.glob("*.svg"))
    return {name: [s for s in stems if s == name or s.startswith(f"{name}-")] for name in ORDER}


def load(folder: Path) -> dict[str, dict]:
    """{claim: result} of a folder. Raises ValueError that names a broken file."""
    paths = {name: folder / f"{name}.json" for name in ORDER}
    return {name: read_json(path, _result) for name, path in paths.items() if path.exists()}


def _result(data: Any) -> dict:
    if (
        not isinstance(data, dict)
        or data.get("schema_version") != SCHEMA_VERSION
        or CHECK not in data
    ):
        raise ValueError(
            "this is not a result of tests.reproduction; delete it, or choose another folder"
        )
    if data.pop(CHECK) != key(**data):
        raise ValueError(
            "this is not what was measured: its checksum differs; run its command again, or delete "
            "it"
        )
    return data


# ---- the page
# -------------------------------------------------------------------------------------------
def page(results: Mapping[str, dict], pictures: Mapping[str, list[str]]) -> str:
    """Everything as Markdown. pictures: names of figures, by claim."""
    summary = [[r["title"], r["verdict"], r["measured"]] for r in results.values()]
    parts = [
        "# Results",
        "Made by the commands below; no number here was written by hand. Costs are forward passes "
        "of one "
        "question, a backward pass counts 2 more. Seeds vary the searches; the calibration and the "
        "held-out questions are "
        "the same for everybody.",
        markdown(["claim", "verdict", "measured"], summary),
    ]
    for name, result in results.items():
        parts += [
            f"## {result['title']}",
            f"**Target.** {result['target']}",
            f"**{result['verdict'].capitalize()}.** {result['measured']}.",
            _how(result),
            *tables.TABLES[name](result, markdown),
        ]
        parts += [f"![{result['title']}]({stem}.svg)" for stem in pictures.get(name, [])]
    parts += [
        "## The paper's claims",
        f"The paper's numbers are from {paper.SOURCE}; ours from the results above. The models are "
        "not the same (7 and 3 billion parameters there, two small trained ones here), so what can "
        "be reproduced is a "
        "comparison, not an accuracy.",
        markdown(
            ["claim of the paper", "the paper", "ours", "verdict", "why"], beside.claims(results)
        ),
        *beside.tables(results, markdown),
    ]
    return "\n\n".join(parts) + "\n"


def _how(result: dict) -> str:
    seeds = " to ".join(map(str, sorted({min(result["seeds"]), max(result["seeds"])})))
    held_out = f" and {result['test']} held-out" if result["test"] else ""
    return (
        f"`{result['command']}`: seeds: {seeds}; {result['calibration']} calibration{held_out} "
        "questions; "
        f"{result['machine']}; torch {result['versions']['torch']}, transformers "
        f"{result['versions']['transformers']}."
    )
