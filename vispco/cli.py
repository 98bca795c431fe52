"""The `vispco` command. Thin: each command reads its options, calls the library and prints.

Exit codes: 0; 2 with one line on stderr for everything a user can get wrong; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .budget import parse_budget
from .config import PruningConfig
from .console import Progress, flops, output_folder, percent, standard_error, table, tokens, wilson
from .evaluate import Record, evaluate
from .frontier import Frontier, FrontierPoint
from .registry import ADAPTERS, KERNELS, METHODS, adapter_for
from .search import search
from .teacher import prepare, teach
from .version import __version__

_DEFAULTS = {name: p.default for name, p in inspect.signature(search).parameters.items()}
_LISTS = ("methods", "kernels", "adapters", "models", "tasks")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        options = _parser().parse_args(argv)
        with _quiet_transformers():
            options.run(options)
        sys.stdout.flush()
        return 0
    except SystemExit as stop:  # --help and --version
        return stop.code or 0
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}")
    except (ValueError, ImportError, FloatingPointError) as error:
        return _complain(str(error))


def _complain(message: str, code: int = 2) -> int:
    line = " ".join(message.split())
    print(f"vispco: error: {line}" if code == 2 else f"vispco: {line}", file=sys.stderr)
    return code


# ---- commands -------------------------------------------------------------------------------------------
def _search(options: argparse.Namespace) -> None:
    METHODS.get(options.method), KERNELS.get(options.kernel)
    with output_folder(options.output) as folder:
        if (folder / "frontier.json").exists() and not options.overwrite:
            raise ValueError(f"{folder} holds a frontier.json: choose another --output, or --overwrite it")
        batches = _batches(options, "calibration")
        model, _ = _model(options.model)
        with Progress(len(options.budgets) * options.steps, "search", options.quiet) as bar, \
                _StepLog(folder / "log.jsonl") as log:
            frontier = search(model, batches, options.method, options.kernel, options.budgets,
                              seed=options.seed, steps=options.steps, learning_rate=options.learning_rate,
                              callback=lambda record: (bar(record), log(record)))
        frontier.meta |= {"model": options.model, "data": options.data}
        files = [f"config-{_slug(p.budget)}.json" for p in frontier.points]
        for point, name in zip(frontier.points, files):
            point.config.save(folder / name)
        frontier.save(folder / "frontier.json")
    rows = [{**_summary(p), "file": str(folder / name)} for p, name in zip(frontier.points, files)]
    if options.json:
        return _print_json({"frontier": str(folder / "frontier.json"), "log": str(folder / "log.jsonl"),
                            "configurations": rows, "meta": frontier.meta})
    print(table(["budget", "FLOPs", "share", "visual tokens entering each layer", "KL", "file"],
                [[r["budget"], flops(r["flops"]), percent(r["share"]), tokens(r["tokens"]), f"{r['kl']:.4f}",
                  r["file"]] for r in rows]))
    print(f"\nshare: of the prunable compute. All of it is in {folder / 'frontier.json'}")


def _evaluate(options: argparse.Namespace) -> None:
    frontier = Frontier.load(options.frontier) if options.frontier else None
    if options.output:
        if frontier is None:
            raise ValueError("--output writes a frontier with its metrics: give it together with --frontier")
        _check_file(options.output)
    named = [(str(p.budget), p.config) for p in frontier.points] if frontier else \
        [(path, PruningConfig.load(path)) for path in options.config]
    examples = _examples(options, options.split)
    model, _ = _model(options.model)
    with Progress(len(named) + 1, "evaluate", options.quiet) as bar:
        lessons = teach(model, prepare(model, _batches(options, options.split)))
        records = {}
        for name, config in [("full", None), *named]:
            records[name] = evaluate(model, lessons, config)
            bar.update()
    tasks = [e.task for e in examples]
    rows = [{"name": name, **_measured(record, tasks)} for name, record in records.items()]
    if options.output:
        _with_metrics(frontier, rows).save(options.output)
    if options.json:
        return _print_json({"split": options.split, "seed": options.seed, "n": rows[0]["n"], "full": rows[0],
                            "configurations": rows[1:]})
    columns = sorted(set(tasks), key=tasks.index) if options.per_task else []
    print(table(["configuration", "accuracy", "95 % interval", "KL", "FLOPs", "share", *columns],
                [[r["name"], percent(r["accuracy"]), " – ".join(percent(v) for v in r["interval"]),
                  f"{r['kl']:.4f}", flops(r["flops"]), percent(r["share"]),
                  *(percent(r["tasks"][t]) for t in columns)] for r in rows]))
    print(f"\n{rows[0]['n']} questions of split {options.split!r}; share: of the prunable compute")


def _plot(options: argparse.Namespace) -> None:
    from .plot import picture_kind, plot_frontier

    for path in options.output:
        picture_kind(path)
        _check_file(path)
    frontiers = {path: Frontier.load(path) for path in options.frontiers}
    named = frontiers if len(frontiers) > 1 else list(frontiers.values())
    for path in options.output:
        plot_frontier(named, path, x=options.x, y=options.y)
        print(path)


def _apply(options: argparse.Namespace) -> None:
    from .demo import answer, side_by_side

    if (options.image is None) != (options.question is None):
        raise ValueError("--image and --question belong together: give both, or --index for a test question")
    config = PruningConfig.load(options.config)
    if options.image is None:
        from . import testbed

        example = testbed.examples(options.split, options.index + 1, options.seed)[options.index]
        question, expected, image = example.question + "?", example.answer, example.image
    else:
        question, expected, image = options.question, None, _image(options.image)
    model, processor = _model(options.model)
    inputs = _prompt(processor, image, question)
    if options.json:
        both = {"full": answer(model, processor, inputs), "pruned": answer(model, processor, inputs, config)}
        return _print_json({"question": question, "expected": expected, **both})
    print(side_by_side(model, processor, config, inputs, question, expected))


def _list(options: argparse.Namespace) -> None:
    lists = {what: _LISTERS[what]() for what in ([options.what] if options.what else _LISTS)}
    if options.json:
        return _print_json(lists[options.what] if options.what else lists)
    blocks = [table([what, ""], lines.items()) for what, lines in lists.items()]
    print("\n\n".join(blocks))


def _demo(options: argparse.Namespace) -> None:
    from . import demo

    demo.run(options.output, options.seed, options.quiet, **(demo.FAST if options.fast else {}))


# ---- models and data: the one place that knows what there is --------------------------------------------
def _model(name: str) -> tuple[Any, Any]:
    """(model, processor): a testbed model by name, or a local folder."""
    from . import testbed

    if name == "testbed" or name in testbed.MODELS:
        return testbed.load(name)
    if not Path(name).is_dir():
        raise ValueError(f"unknown model {name!r}: expected testbed, {', '.join(testbed.MODELS)} or a local "
                         "folder with a Hugging Face model")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        model = AutoModelForImageTextToText.from_pretrained(name, local_files_only=True).eval()
        processor = AutoProcessor.from_pretrained(name, local_files_only=True)
    except Exception as error:  # anything may be wrong with a folder
        raise ValueError(f"{name}: no image-text-to-text model could be loaded: {error}") from error
    adapter_for(model)
    return model, processor


def _examples(options: argparse.Namespace, split: str) -> list:
    from . import testbed

    if options.data != "testbed":
        raise ValueError(f"unknown data {options.data!r}: the command line knows `testbed` so far; for data "
                         "of your own, pass batches with labels to vispco.search() in Python")
    _check_words(options.model)
    return testbed.examples(split, options.limit, options.seed, options.tasks)


def _batches(options: argparse.Namespace, split: str) -> list[dict]:
    from . import testbed

    examples, size = _examples(options, split), options.batch_size
    return [testbed.collate(examples[i:i + size]) for i in range(0, len(examples), size)]


def _check_words(model: str) -> None:
    """The testbed's questions are written in its own few words: another tokenizer would get other ids."""
    from .testbed import MODELS
    from .testbed.vocab import ID

    tokenizer = Path(model) / "tokenizer.json"
    if model != "testbed" and model not in MODELS and Path(model).is_dir():
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            if json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"] == ID:
                return
        raise ValueError(f"{model} does not speak the testbed's vocabulary, and the command line has no "
                         "other data so far: pass batches of your own to vispco.search() in Python")


def _image(path: str):
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def _prompt(processor, image, question: str) -> dict:
    """Model inputs for one question, in the model's chat format if it has one."""
    text = processor.image_token + question
    if getattr(processor, "chat_template", None):
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        text = processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = dict(processor(images=[image], text=[text], return_tensors="pt"))
    unknown = processor.tokenizer.unk_token_id
    if unknown is not None and bool((inputs["input_ids"] == unknown).any()):
        raise ValueError(f"the model does not know every word of {question!r}: see `vispco list tasks` for "
                         "what it is asked")
    return inputs


def _first_lines(registry) -> dict[str, str]:
    return {name: (inspect.getdoc(registry.get(name)) or "").split("\n")[0] for name in registry.names()}


def _list_models() -> dict[str, str]:
    from . import testbed

    return {**dict.fromkeys(testbed.MODELS, "embedded, trained on the tasks below; `testbed` for short"),
            "FOLDER": "a local Hugging Face model of a family that has an adapter"}


def _list_tasks() -> dict[str, str]:
    from . import testbed

    samples = {task: testbed.examples("test", 1, 0, (task,))[0] for task in testbed.TASKS}
    return {task: f"such as: {sample.question}? {sample.answer}" for task, sample in samples.items()}


_LISTERS: dict[str, Callable[[], dict[str, str]]] = {
    "methods": lambda: _first_lines(METHODS), "kernels": lambda: _first_lines(KERNELS),
    "adapters": lambda: _first_lines(ADAPTERS), "models": _list_models, "tasks": _list_tasks}


# ---- results --------------------------------------------------------------------------------------------
def _summary(point: FrontierPoint) -> dict:
    config = point.config
    return {"budget": point.budget, "flops": point.flops, "share": point.share, "kl": point.loss,
            "keep_ratios": list(config.keep_ratios), "tokens": config.tokens(config.n_visual)}


def _measured(record: Record, tasks: list[str]) -> dict:
    """A record with its interval and its accuracy by task; `share` is of the prunable compute."""
    right: dict[str, list[bool]] = {task: [] for task in tasks}
    for task, correct in zip(tasks, record.correct.tolist()):
        right[task].append(correct)
    return {"accuracy": record.accuracy, "standard_error": standard_error(record.accuracy, record.n),
            "interval": list(wilson(int(record.correct.sum()), record.n)), "kl": record.kl,
            "flops": record.flops, "share": record.prunable_share, "n": record.n,
            "tasks": {task: sum(c) / len(c) for task, c in right.items()}}


def _with_metrics(frontier: Frontier, rows: list[dict]) -> Frontier:
    full, *rest = [{k: v for k, v in row.items() if k != "name"} for row in rows]
    points = [FrontierPoint(**{**vars(p), "metrics": m}) for p, m in zip(frontier.points, rest)]
    return Frontier(points, {**frontier.meta, "full_accuracy": full["accuracy"]})


def _check_file(path: str) -> None:
    """Raise, before any work is done, unless a file can be written there."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: --output needs a file here")
    with tempfile.TemporaryFile(dir=os.path.dirname(os.path.abspath(path))):
        pass


class _StepLog:
    """One JSON object per step, written as it happens."""

    def __init__(self, path: Path):
        self._path, self._file = path, None

    def __enter__(self) -> _StepLog:
        return self

    def __call__(self, record: dict) -> None:
        self._file = self._file or open(self._path, "w", encoding="utf-8")
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, allow_nan=False))


def _slug(budget: float | str) -> str:
    return re.sub(r"[^\w.+-]", "", f"{budget:g}" if isinstance(budget, float) else budget)


@contextlib.contextmanager
def _quiet_transformers():
    """No loading bars and hints from transformers: stderr is for our progress and errors."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# ---- options --------------------------------------------------------------------------------------------
class _Parser(argparse.ArgumentParser):
    """One-line errors, and help texts that keep their line breaks."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False,
                            **options})

    def error(self, message: str):
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def _budgets(text: str) -> list[float | str]:
    """`0.2,50%`, `0.1:0.9:9`, `1.8TFLOPs` -> shares as numbers, absolute budgets as they are; each once."""
    found: dict[tuple, float | str] = {}
    for item in text.split(","):
        try:
            for budget in _range(item) if ":" in item else [item.strip()]:
                budget = _bare(budget)
                value, absolute = parse_budget(budget)
                value = value if absolute else round(value, 10)
                found[value, absolute] = budget if absolute else value
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return list(found.values())


def _bare(text: str | float) -> float | str:
    """A number where the text is one: `parse_budget` takes both, files read better with numbers."""
    try:
        return float(text)
    except ValueError:
        return text


def _range(text: str) -> list[float]:
    parts = text.split(":")
    if len(parts) != 3 or not parts[2].strip().isdigit() or int(parts[2]) < 2:
        raise ValueError(f"range {text!r} is not understood: expected start:stop:count, such as 0.1:0.9:9")
    (start, absolute), (stop, other) = (parse_budget(_bare(p.strip())) for p in parts[:2])
    if absolute != other:
        raise ValueError(f"range {text!r} mixes a share with absolute FLOPs")
    step = (stop - start) / (int(parts[2]) - 1)
    return [round(start + i * step, 10) for i in range(int(parts[2]))]


def _whole(least: int, most: int = 2**31) -> Callable[[str], int]:
    def number(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r}")

    return number


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vispco", description=_INTRODUCTION,
                     epilog="`vispco COMMAND --help` tells the options of each, with an example.")
    parser.add_argument("--version", action="version", version=f"vispco {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable, summary: str, example: str, *, json_too: bool = True) -> _Parser:
        sub = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.",
                                  epilog=f"example:\n  {example}")
        sub.set_defaults(run=run)
        if json_too:
            sub.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else")
        return sub

    _search_options(command("search", _search, "find one configuration per budget by gradient",
                            "vispco search --model testbed --budgets 0.2,0.5,0.8 --output run"))
    _evaluate_options(command("evaluate", _evaluate, "measure configurations on labelled questions",
                              "vispco evaluate --model testbed --frontier run/frontier.json --per-task"))
    _plot_options(command("plot", _plot, "draw frontiers and their schedules", json_too=False,
                          example="vispco plot run/frontier.json -o frontier.svg -o frontier.png"))
    _apply_options(command("apply", _apply, "answer one question in full and pruned, side by side",
                           "vispco apply --model testbed --config run/config-0.5.json --index 3"))
    sub = command("list", _list, "list what there is to choose from", "vispco list kernels")
    sub.add_argument("what", nargs="?", choices=_LISTS, help="one of %(choices)s; everything without it",
                     metavar="WHAT")
    _demo_options(command("demo", _demo, "run everything on the embedded testbed, in minutes on a CPU",
                          "vispco demo --output vispco-demo", json_too=False))
    return parser


def _search_options(sub: _Parser) -> None:
    add = sub.add_argument
    add("--method", default=_DEFAULTS["method"], help="who ranks the tokens (default: %(default)s)")
    add("--kernel", default=_DEFAULTS["kernel"], help="the family of schedules (default: %(default)s)")
    add("--budgets", type=_budgets, default=[0.2, 0.3, 0.5, 0.7, 0.9], metavar="LIST",
        help="shares of the prunable compute (0.2,0.5 or 50%%), a range start:stop:count (0.1:0.9:9), or "
             "absolute (1.8TFLOPs); default: 0.2,0.3,0.5,0.7,0.9")
    add("--steps", type=_whole(1), default=_DEFAULTS["steps"], metavar="N",
        help="gradient steps per budget (default: %(default)s)")
    add("--learning-rate", type=_positive, default=_DEFAULTS["learning_rate"], metavar="RATE",
        help="of Adam, on the kernel's parameters (default: %(default)s)")
    add("--output", "-o", default="vispco-run", metavar="FOLDER",
        help="for frontier.json, config-<budget>.json and log.jsonl (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace an earlier frontier in that folder")
    _model_and_data(sub, limit=256, what="calibration questions")


def _evaluate_options(sub: _Parser) -> None:
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", nargs="+", metavar="FILE", help="pruning configurations")
    what.add_argument("--frontier", metavar="FILE", help="a frontier: all of its configurations")
    sub.add_argument("--per-task", action="store_true", help="a column of accuracy for every task")
    sub.add_argument("--output", "-o", metavar="FILE",
                     help="write the frontier with what was measured, ready to plot")
    sub.add_argument("--split", default="test", help="train, calibration or test (default: %(default)s)")
    _model_and_data(sub, limit=512, what="questions")


def _plot_options(sub: _Parser) -> None:
    sub.add_argument("frontiers", nargs="+", metavar="FRONTIER", help="frontier.json files, drawn together")
    sub.add_argument("--output", "-o", action="append", required=True, metavar="FILE",
                     help="picture to write, .svg or .png; may be given several times")
    sub.add_argument("--x", choices=("share", "flops"), default="share", help="(default: %(default)s)")
    sub.add_argument("--y", choices=("accuracy", "kl"), help="(default: accuracy if measured, else kl)")


def _apply_options(sub: _Parser) -> None:
    sub.add_argument("--model", default="testbed", help="testbed or a local folder (default: %(default)s)")
    sub.add_argument("--config", required=True, metavar="FILE", help="a pruning configuration")
    sub.add_argument("--index", type=_whole(0, 9999), default=0,
                     help="which question of the testbed (default: the first, 0)")
    sub.add_argument("--split", default="test", help="of which split (default: %(default)s)")
    sub.add_argument("--seed", type=_whole(0), default=0, help="of the questions (default: %(default)s)")
    sub.add_argument("--image", metavar="PATH", help="a picture of your own, with --question")
    sub.add_argument("--question", metavar="TEXT", help="what to ask about it")


def _demo_options(sub: _Parser) -> None:
    sub.add_argument("--output", "-o", default="vispco-demo", metavar="FOLDER", help="(default: %(default)s)")
    sub.add_argument("--seed", type=_whole(0), default=0, help="(default: %(default)s)")
    sub.add_argument("--fast", action="store_true", help="a smoke test with tiny sizes")
    sub.add_argument("--quiet", "-q", action="store_true", help="no progress on stderr")


def _model_and_data(sub: _Parser, limit: int, what: str) -> None:
    add = sub.add_argument
    add("--model", default="testbed",
        help="testbed, or a local folder of a model with its vocabulary (default: %(default)s)")
    add("--data", default="testbed", help="nothing but testbed so far (default: %(default)s)")
    add("--tasks", type=_names, metavar="LIST",
        help="such as count,digit; `vispco list tasks` has them (default: all)")
    add("--limit", type=_whole(1), default=limit, metavar="N", help=f"{what} (default: %(default)s)")
    add("--batch-size", type=_whole(1), default=32, metavar="N", help="(default: %(default)s)")
    add("--seed", type=_whole(0), default=0, help="draws the questions, and orders the search (default: 0)")
    add("--quiet", "-q", action="store_true", help="no progress bar")


_INTRODUCTION = """\
Find by gradient which fraction of the visual tokens each layer of a
vision-language model needs, for any compute budget; measure it, draw it, try it."""

if __name__ == "__main__":
    sys.exit(main())
