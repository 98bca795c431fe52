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
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import PruningConfig
from .console import Progress, flops, output_folder, percent, standard_error, table, tokens, wilson
from .evaluate import Record, evaluate
from .frontier import Frontier, FrontierPoint
from .options import LISTS, build_parser
from .presets import presets
from .registry import ADAPTERS, KERNELS, METHODS, adapter_for
from .search import search
from .teacher import prepare, teach


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        options = build_parser(_COMMANDS).parse_args(argv)
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
    columns = sorted(set(tasks)) if options.per_task else []
    print(table(["configuration", "accuracy", "95 % interval", "KL", "FLOPs", "share", *columns],
                [[r["name"], percent(r["accuracy"]), " – ".join(percent(v) for v in r["interval"]),
                  f"{r['kl']:.4f}", flops(r["flops"]), percent(r["share"]),
                  *(percent(r["tasks"][t], 0) for t in columns)] for r in rows]))
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
    lists = {what: _LISTERS[what]() for what in ([options.what] if options.what else LISTS)}
    if options.json:
        return _print_json(lists[options.what] if options.what else lists)
    blocks = [table([what, ""], lines.items()) for what, lines in lists.items()]
    print("\n\n".join(blocks))


def _demo(options: argparse.Namespace) -> None:
    from . import demo

    demo.run(options.output, options.seed, options.quiet, model_name=options.model, **(demo.FAST if options.fast else {}))


_COMMANDS = {"search": _search, "evaluate": _evaluate, "plot": _plot, "apply": _apply, "list": _list,
             "demo": _demo}


# ---- models and data: the one place that knows what there is --------------------------------------------
def _model(name: str) -> tuple[Any, Any]:
    """(model, processor): a testbed model by name, or a local folder."""
    from . import testbed

    if name == "testbed" or name in testbed.MODELS:
        return testbed.load(name)
    if not Path(name).is_dir():
        raise ValueError(_unknown(name))
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        model = AutoModelForImageTextToText.from_pretrained(name, local_files_only=True).eval()
        processor = AutoProcessor.from_pretrained(name, local_files_only=True)
    except Exception as error:  # anything may be wrong with a folder
        raise ValueError(f"{name}: no image-text-to-text model could be loaded: {error}") from error
    adapter_for(model)
    return model, processor


def _unknown(model: str) -> str:
    from .testbed import MODELS

    return f"unknown model {model!r}: expected testbed, {', '.join(MODELS)} or a local folder with a Hugging Face model"


def _examples(options: argparse.Namespace, split: str) -> list:
    from . import testbed

    if options.data != "testbed":
        raise ValueError(f"unknown data {options.data!r}: the command line knows `testbed` so far; for data "
                         "of your own, pass batches with labels to vispco.search() in Python")
    _testbed_kind(options.model)  # refuses models that these questions are not for, before anything is made
    return testbed.examples(split, options.limit, options.seed, options.tasks)


def _batches(options: argparse.Namespace, split: str) -> list[dict]:
    from . import testbed

    examples, size = _examples(options, split), options.batch_size
    kind = _testbed_kind(options.model)
    return [testbed.collate(examples[i:i + size], model=kind) for i in range(0, len(examples), size)]


def _testbed_kind(model: str) -> str:
    """The testbed model whose inputs `model` takes: it must know the testbed's few words by the same numbers."""
    from .testbed import MODELS
    from .testbed.vocab import ID, QWEN_ID

    if model == "testbed" or model in MODELS:
        return model
    if not Path(model).is_dir():
        raise ValueError(_unknown(model))
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        words = json.loads((Path(model) / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        return {len(ID): "testbed-llava", len(QWEN_ID): "testbed-qwen"}[len({w for w in words if words[w] == QWEN_ID[w]})]
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


def _list_presets() -> dict[str, str]:
    """Published configurations, for 32 layers."""
    return {f"{method} {name}": preset.config.describe().split(": ", 1)[1]
            for method in METHODS.names() for name, preset in presets(method).items()}


def _list_models() -> dict[str, str]:
    return {"testbed-llava": "embedded, trained on the tasks below: 8 layers; `testbed` for short",
            "testbed-qwen": "embedded, trained on the tasks below: 16 layers, any resolution",
            "FOLDER": "a local Hugging Face model of a family that has an adapter"}


def _list_tasks() -> dict[str, str]:
    from . import testbed

    samples = {task: testbed.examples("test", 1, 0, (task,))[0] for task in testbed.TASKS}
    return {task: f"such as: {sample.question}? {sample.answer}" for task, sample in samples.items()}


_LISTERS: dict[str, Callable[[], dict[str, str]]] = {
    "methods": lambda: _first_lines(METHODS), "presets": _list_presets, "kernels": lambda: _first_lines(KERNELS),
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
    points = [replace(p, metrics=m) for p, m in zip(frontier.points, rest)]
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


if __name__ == "__main__":
    sys.exit(main())
