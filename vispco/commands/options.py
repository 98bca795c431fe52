"""What the command line's options look like: numbers, budgets, names; and the groups that several commands share."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable

import torch

from ..budget import check_budget, parse_budget
from ..data.conversation import KEYS
from ..data.pictures import MAX_PIXELS

DTYPES = ("auto", "float32", "bfloat16", "float16")


# ---- what a value looks like ----------------------------------------------------------------------------
def budgets(text: str) -> list[float | str | dict]:
    """`0.2,50%`, `0.1:0.9:9`, `1.8TFLOPs` -> shares as numbers, absolute budgets as they are; each once.

    Several limits at once are joined by a plus: `flops=0.5+kv_cache=40%`.
    """
    found: dict[tuple, float | str | dict] = {}
    for item in text.split(","):
        try:
            if "=" in item:
                limits = _limits(item)
                found[tuple(limits.items())] = limits
                continue
            for budget in _range(item) if ":" in item else [item.strip()]:
                budget = _bare(budget)
                value, absolute = parse_budget(budget)
                value = value if absolute else round(value, 10)
                found[value, absolute] = budget if absolute else value
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return list(found.values())


def _limits(text: str) -> dict[str, float | str]:
    """`flops=0.5+kv_cache=40%` as a dict."""
    pairs = [part.partition("=") for part in re.split(r"\+(?=\s*[a-zA-Z_]+\s*=)", text)]
    limits = {name.strip(): _bare(value.strip()) for name, _, value in pairs}
    if len(limits) < len(pairs):
        raise ValueError(f"budget {text!r} limits the same twice")
    check_budget(limits)
    return limits


def _bare(text: str | float) -> float | str:
    """A number where the text is one: `parse_budget` takes both, files read better with numbers."""
    try:
        return float(text)
    except ValueError:
        return text


def _range(text: str) -> list[float]:
    parts = text.split(":")
    if len(parts) != 3 or not 2 <= int(parts[2] if parts[2].isdigit() else 0) <= 1000:
        raise ValueError(f"range {text!r} is not understood: expected start:stop:count, such as 0.1:0.9:9, "
                         "with a count of 2 to 1000")
    (start, absolute), (stop, other) = (parse_budget(_bare(p.strip())) for p in parts[:2])
    if absolute != other:
        raise ValueError(f"range {text!r} mixes a share with absolute FLOPs")
    step = (stop - start) / (int(parts[2]) - 1)
    return [round(start + i * step, 10) for i in range(int(parts[2]))]


def whole(least: int, most: int = 2**31) -> Callable[[str], int]:
    """A type: whole numbers within limits."""
    def number(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r}")

    return number


def positive(text: str) -> float:
    """A type: positive numbers."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")


def names(text: str) -> list[str]:
    """A type: names with commas between them."""
    return [name.strip() for name in text.split(",")]


def columns(text: str) -> dict[str, str]:
    """A type: `question=query,answer=label`, the data's own names for what we read."""
    pairs = [item.partition("=") for item in text.split(",")]
    if bad := [key for key, _, value in pairs if key.strip() not in KEYS or not value.strip()]:
        raise argparse.ArgumentTypeError(f"expected OURS=THEIRS such as question=query,answer=label, with OURS out of "
                                         f"{', '.join(KEYS)}; got {bad[0]!r}")
    return {key.strip(): value.strip() for key, _, value in pairs}


def device(text: str) -> str:
    """A type: a device of torch that this machine has, or `auto`."""
    if text == "auto":
        return text
    try:
        kind = torch.device(text).type
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected cpu, cuda, cuda:1, mps or auto, got {text!r}") from None
    if kind != "cpu" and getattr(torch, kind, None) is not None and not getattr(torch, kind).is_available():
        raise argparse.ArgumentTypeError(f"this machine has no {kind} device that torch can use; take cpu")
    return text


# ---- options that several commands have -----------------------------------------------------------------
def add_model(sub: argparse.ArgumentParser) -> None:
    """--model and how to load it."""
    add = sub.add_argument_group("model").add_argument
    add("--model", default="testbed", metavar="PATH_OR_NAME",
        help="a folder that save_pretrained wrote, a name such as llava-hf/llava-1.5-7b-hf, testbed-llava (or testbed) "
             "or testbed-qwen (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="auto", metavar="TYPE",
        help="of the weights: %(choices)s; auto is as stored (default: %(default)s)")
    add("--device", type=device, metavar="NAME",
        help="cpu, cuda, cuda:1; auto: spread over all there are, by accelerate (default: cuda if there is one, "
             "else cpu)")
    add("--trust-remote-code", action="store_true",
        help="run Python code that comes with the model, if it needs its own")


def add_data(sub: argparse.ArgumentParser, limit: int, what: str, split: str) -> None:
    """--data and how to read it."""
    add = sub.add_argument_group("data").add_argument
    add("--data", default="testbed", metavar="PATH_OR_NAME",
        help="JSON lines or LLaVA-Instruct JSON; a folder or a name for the datasets library; or testbed "
             "(default: %(default)s)")
    add("--images", metavar="FOLDER",
        help="where relative paths start, and what all must lie in (default: the data's own folder)")
    add("--columns", type=columns, metavar="LIST", help="the data's own names, such as question=query,answer=label")
    add("--split", metavar="NAME", help=f"of the testbed (default: {split}) or of a data set by name (default: train)")
    add("--tasks", type=names, metavar="LIST",
        help="of the testbed, such as count,digit; `vispco list tasks` has them (default: all)")
    add("--limit", type=whole(1), default=limit, metavar="N", help=f"{what}, drawn by seed (default: %(default)s)")
    add("--batch-size", type=whole(1), metavar="N", help="(default: 4; of the testbed 32)")
    add_reading(sub, add)
    add("--seed", type=whole(0), default=0, help="draws the questions, and orders the search (default: 0)")
    sub.add_argument("--quiet", "-q", action="store_true", help="no progress bar, no examples")


def add_reading(sub: argparse.ArgumentParser, add: Callable | None = None) -> None:
    """How pictures are read and questions written."""
    add = add or sub.add_argument
    add("--max-pixels", type=whole(1), default=MAX_PIXELS, metavar="N",
        help="refuse larger pictures (default: %(default)s)")
    add("--frames", type=whole(1), default=8, metavar="N", help="of each video, evenly spread (default: %(default)s)")
    add("--chat-template", metavar="FILE", help="a Jinja file, in place of the model's own")


def add_json(sub: argparse.ArgumentParser) -> None:
    """--json."""
    sub.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else")
