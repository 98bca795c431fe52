"""Types of options, such as numbers and budgets, and groups of options that commands share."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import testbed
from ..budget import LIMITS, check_budget, limited, parse_budget
from ..data.conversation import KEYS
from ..data.pictures import MAX_PIXELS
from ..registry import did_you_mean


# ---- types ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Integer:
    """A type for argparse: whole numbers from `least` to `most`."""

    least: int
    most: int = 2**31

    def __call__(self, text: str) -> int:
        with contextlib.suppress(ValueError):
            if self.least <= int(text) <= self.most:
                return int(text)
        to = f"to {self.most:,}" if self.most < 2**31 else "on"
        expected = f"a whole number from {self.least} {to}"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")


positive_int = Integer(1)
non_negative_int = Integer(0)


def positive_float(text: str) -> float:
    """A type for argparse: positive, finite numbers."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")


def comma_list(text: str) -> list[str]:
    """A type for argparse: names with commas between them."""
    return [name.strip() for name in text.split(",")]


def columns(text: str) -> dict[str, str]:
    """A type for argparse: `question=query,answer=label`, {our name: the data's own name}."""
    found = {}
    for item in text.split(","):
        ours, _, theirs = (
            part.strip() for part in re.sub("^([^=]*):", r"\1=", item).partition("=")
        )
        if ours not in KEYS or not theirs or "=" not in item:
            names = ours, theirs
            turned = next((f"{a}={b}" for a, b in (names, names[::-1]) if a in KEYS and b), "")
            hint = f"; did you mean {turned}?" if turned else ""
            raise argparse.ArgumentTypeError(
                "expected OURS=THEIRS such as question=query,answer=label, with OURS out of "
                f"{', '.join(KEYS)}; got {item!r}{hint}"
            )
        found[ours] = theirs
    return found


def device(text: str) -> str:
    """A type for argparse: a device of torch that this machine has, or `auto`."""
    if text == "auto":
        return text
    try:
        kind = torch.device(text).type
    except RuntimeError:
        expected = "cpu, cuda, cuda:1, mps or auto"
        meant = (
            "cuda" if text.lower() == "gpu" else f"cuda:{text}" if text.isdigit() else text.lower()
        )
        hint = f": did you mean {meant}?" if meant != text else ""
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}{hint}") from None
    backend = getattr(torch, kind, None)
    if kind != "cpu" and backend is not None and not backend.is_available():
        missing = f"this machine has no {kind} device that torch can use"
        raise argparse.ArgumentTypeError(f"{missing}; take cpu")
    return text


_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SHORT = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SHORT |= {"half": "float16", "f32": "float32", "f16": "float16"}


def dtype(text: str) -> str:
    """A type for argparse: a type of weights by its name in torch, or `auto`."""
    if text in _DTYPES:
        return text
    short = text.lower().removeprefix("torch.")
    hint = f"did you mean {_SHORT[short]!r}? " if short in _SHORT else did_you_mean(short, _DTYPES)
    expected = f"choose from {', '.join(_DTYPES)}"
    raise argparse.ArgumentTypeError(f"invalid choice: {text!r}: {hint}{expected}")


def methods(text: str) -> str | list[str]:
    """A type for argparse: a method, several as `fastv,pdrop`, or `auto`."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        expected = "the name of a method, several with commas between them, or auto"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    if names == ["all"]:
        raise argparse.ArgumentTypeError("'all' is no method: did you mean 'auto'?")
    return names if len(names) > 1 else names[0]


def budgets(text: str) -> list[float | str | dict]:
    """A type for argparse: `0.2,50%`, `0.1:0.9:9`, `1.8TFLOPs`, `192tokens`. Each is listed once.

    Shares become numbers, absolute budgets stay as they are. A plus joins several limits at once:
    `flops=0.5+kv_cache=40%`.
    """
    if hint := _meant(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not understood: did you mean {hint}?")
    found: dict[tuple, float | str | dict] = {}
    for item in text.split(","):
        try:
            if "=" in item:
                limits = _limits(item)
                found[tuple(limits.items())] = limits
                continue
            for budget in _range(item) if ":" in item else [_number_or_text(item.strip())]:
                value, absolute = parse_budget(budget, LIMITS[limited(budget)])
                value = value if absolute else round(value, 10)
                found[value, absolute] = budget if absolute else value
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return list(found.values())


def _meant(text: str) -> str:
    """What was probably meant by numbers that are no budgets, else nothing."""
    number = r"\d*\.?\d+%?"
    if ends := re.fullmatch(rf"\s*({number})\s*(?:-|\.\.+|to|:)\s*({number})\s*", text):
        low, high = map(_percent, ends.groups())
        return f"{low}:{high}:5, which is five budgets from {low} to {high}"
    if wide := re.fullmatch(rf"\s*({number}):({number}):(\d*\.?\d+)\s*", text):
        low, high, count = _percent(wide[1]), _percent(wide[2]), wide[3]
        if 0 < (step := float(count)) < 1:
            # A step instead of a count.
            count = f"{round(abs(_share(high) - _share(low)) / step) + 1}"
        meant = f"{low}:{high}:{count}"
        return "" if meant == text.strip() else meant
    if re.fullmatch(r"\s*0,\d+\s*", text):
        # A decimal comma.
        return text.strip().replace(",", ".")
    items = re.split(r"[\s,;]+", text.strip(" ,;[]()"))
    if not all(re.fullmatch(number, item) for item in items):
        return text.replace(";", ",") if ";" in text else ""
    shares = any(item.endswith("%") or float(item) <= 1 for item in items)
    tokens = not shares and any(100 < float(item) < 1e6 for item in items)
    meant = ",".join(f"{item}tokens" if tokens else _percent(item) for item in items)
    return "" if meant == re.sub(r"\s*,\s*", ",", text.strip()) else meant


def _percent(item: str) -> str:
    """A number that can only be meant as a percentage, with its sign: `20` -> `20%`."""
    return f"{item}%" if not item.endswith("%") and 5 <= float(item) <= 100 else item


def _share(text: str) -> float:
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def _limits(text: str) -> dict[str, float | str]:
    """`flops=0.5+kv_cache=40%` as a dict."""
    pairs = [part.partition("=") for part in re.split(r"\+(?=\s*[a-zA-Z_]+\s*=)", text)]
    limits = {name.strip(): _number_or_text(value.strip()) for name, _, value in pairs}
    if len(limits) < len(pairs):
        raise ValueError(f"budget {text!r} limits the same twice")
    check_budget(limits)
    return limits


def _range(text: str) -> list[float | str]:
    """`start:stop:count` as budgets: numbers, or texts such as `35tokens`."""
    start, _, rest = text.partition(":")
    stop, _, number = rest.partition(":")
    count = int(number) if number.isdigit() else 0
    if not 2 <= count <= 1000:
        raise ValueError(
            f"range {text!r} is not understood: expected start:stop:count, such as 0.1:0.9:9, "
            "with a count of 2 to 1000"
        )
    ends = [_number_or_text(end.strip()) for end in (start, stop)]
    names = {limited(end) for end in ends}
    (first, absolute), (last, other) = (parse_budget(end, LIMITS[limited(end)]) for end in ends)
    if absolute != other or len(names) > 1:
        raise ValueError(f"range {text!r} mixes a share with an absolute number, or two units")
    step = (last - first) / (count - 1)
    found = [round(first + i * step, 10) for i in range(count)]
    return [f"{value:g}tokens" for value in found] if "tokens" in names else [*found]


def _number_or_text(text: str) -> float | str:
    """`parse_budget` takes both; files read better with numbers."""
    try:
        return float(text)
    except ValueError:
        return text


# ---- groups of options ----------------------------------------------------------------------
def add_model(sub: argparse.ArgumentParser) -> None:
    """--model and how to load it."""
    add = sub.add_argument_group("model").add_argument
    add(
        "--model",
        default="testbed",
        help="a folder that save_pretrained wrote, a name such as llava-hf/llava-1.5-7b-hf, "
        f"{', '.join(testbed.MODELS)}, or testbed for testbed-llava",
    )
    types = f"of the weights: {', '.join(_DTYPES)}; auto: as stored"
    add("--dtype", type=dtype, default="auto", help=types)
    places = "cpu, cuda, cuda:1, or auto: spread over all devices (default: cuda, else cpu)"
    add("--device", type=device, help=places)
    add("--trust-remote-code", action="store_true", help="run Python code that the model brings")


def add_data(sub: argparse.ArgumentParser, limit: int, split: str) -> None:
    """--data and how to read it. limit, split: defaults."""
    add = sub.add_argument_group("data").add_argument
    add(
        "--data",
        default="testbed",
        help="JSON lines, LLaVA-Instruct JSON, testbed, or a folder or name for datasets",
    )
    add("--images", metavar="FOLDER", help="holds all pictures (default: the data's own folder)")
    add("--columns", type=columns, help="the data's own names: question=query,answer=label")
    add("--split", help=f"default: {split} of the testbed, train of a data set by name")
    add("--tasks", type=comma_list, help="of the testbed; see `vispco list tasks` (default: all)")
    add("--limit", type=positive_int, default=limit, help="most questions, drawn by seed")
    add("--batch-size", type=positive_int, help="default: 4, of the testbed 32")
    add_reading(add)
    add("--seed", type=non_negative_int, default=0, help="draws the questions, orders the search")
    sub.add_argument("--quiet", "-q", action="store_true", help="no progress bar, no examples")


def add_reading(add: Callable) -> None:
    """How pictures are read and prompts are written. add: adds an option."""
    add("--max-pixels", type=positive_int, default=MAX_PIXELS, help="refuse larger pictures")
    add("--frames", type=positive_int, default=8, help="of each video, evenly spread")
    rate = "frames per second of videos that come as pictures, if the data do not say it"
    add("--fps", type=positive_float, help=rate)
    add("--chat-template", metavar="FILE", help="a Jinja file, in place of the model's own")


def add_folder(sub: argparse.ArgumentParser, work: str, default: str, files: str) -> None:
    """--output, --overwrite and --resume of work that a journal lets go on.

    work: what it is called. default: the folder. files: what it gets, for the help.
    """
    sub.add_argument("--output", "-o", default=default, metavar="FOLDER", help=f"for {files}")
    again = sub.add_mutually_exclusive_group().add_argument
    again("--overwrite", action="store_true", help=f"replace an earlier {work} in that folder")
    resume = f"go on with a {work} that was interrupted there, with the same options; else start"
    again("--resume", action="store_true", help=resume)


def add_json(sub: argparse.ArgumentParser) -> None:
    """--json."""
    sub.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else")
