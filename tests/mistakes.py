"""What users get wrong, and what they are told: docs/mistakes.md is made of these cases.

    python tests/mistakes.py --write

A mistake is a line of Python, or a command. Its message is whatever it says when it is run here, in
a folder of FILES. It may use `model` (a random LLaVA of 6 decoder layers, 16 visual tokens a
picture), `batch` (two questions with answers) and `config`. `test_mistakes.py` makes each of them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import io
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PAGE = ROOT / "docs" / "mistakes.md"
INTRODUCTION = """\
# Mistakes, and what they are told

Every message says what was expected, what came, and what to do. The messages below are raised by
the tests, word for word: this page is made by `python tests/mistakes.py --write` and compared with
them. In Python they are `ValueError` unless the table says otherwise. On the command line they are
one line, with exit code 2, and nothing is written. Here `model` is a LLaVA of 6 decoder layers, and
`batch` two questions with answers.
"""


@dataclass(frozen=True)
class Mistake:
    """A mistake.

    did: a command if it begins with `vispco`, else Python.
    without: a package that is not installed.
    """

    area: str
    did: str
    without: str = ""


AREAS = {
    "Configurations": """
PruningConfig("fastv", [1, 1, 0.5, 0.7])
PruningConfig("fastv", [1, 1, 50, 25])
PruningConfig("fastv", [1, 1, float("nan")])
PruningConfig("fastv", [1, True, 0.5])
PruningConfig("fastv", [1, "0.5", 0.5])
PruningConfig("fastv", [1, 0.5], {"stride": 0})
PruningConfig("fastv", [1, 0.5], {"rotary": "no"})
PruningConfig("hiprune", [0.5, 0.5], {"alpha": 2})
PruningConfig("pact", [1, 0.5], {"cutoff": 0})
PruningConfig("fastv", 0.5)
PruningConfig("fastv", [])
PruningConfig("fastv", {0: 1.0, 2: 0.5})
PruningConfig("fastvv", [1, 0.5])
PruningConfig("fastv", [1, 0.5], {"seed": 3})
PruningConfig("fastv+pdrop", [1, 0.5])
PruningConfig("visionzip+pdrop+fastv", [1, 0.5])
PruningConfig("visionzip+pdrop", [1, 0.5], {"contextual": 0.2})
PruningConfig("fastv", [1, 0.5], method_options=3)
PruningConfig("fastv", [1, 0.5], n_visual=57.6)
PruningConfig("fastv", [1, 0.5], flops=-1)
PruningConfig.from_fastv(k=40, num_layers=32)
PruningConfig.from_pdrop([8, 16], [0.5, 0.25, 0.125], num_layers=32)
PruningConfig.from_sparsevlm((600, 200, 110), num_layers=32)
presets("fast")
presets("fastv", num_layers=0)
PruningConfig.from_sparsevlm(192)
PruningConfig.from_fastv(2, 50, num_layers=32)
PruningConfig.from_fastv("2", num_layers=32)
PruningConfig.load("pictures")
Frontier.load("config.json")
Frontier([config])
frontier.at(0.01)
frontier.at(50)
frontier.at("192tokens")
frontier.at("2 TFLOPs")
frontier[0.5]
""",
    "Methods and their options": """
PruningConfig("random", [0.5], {"seed": "x"})
PruningConfig("sparsevlm", [1, 0.5], {"adaptive": 0})
PruningConfig("sparsevlm", [1, 0.5], {"recycle": 30})
PruningConfig("visionzip", [0.5], {"contextual": 10})
PruningConfig("vispruner", [0.5], {"step": 0})
PruningConfig("vispruner", [0.5], {"important": 1.5})
PruningConfig("dart", [1, 0.5], {"visual": -1})
PruningConfig("dart", [1, 0.5], {"visual": 0, "text": 0})
register_method("fastv", type("Mine", (Method,), {}))
register_method("mine", type("Mine", (), {}))
register_method("mine", type("Mine", (Method,), {}))
register_method("mine", lambda context: context.visual)
register_method("")(object)
fitprune_schedule(model, [], 0.5)
vtw_schedule(model, [])
""",
    "Kernels, budgets and estimators": """
search(model, [batch], kernel="monoton")
kernels.MultiStep(8, steps=0)
kernels.MultiStep(8, step=2)
kernels.Linear(8, first_layer=8)
kernels.Linear(0)
kernels.Linear("8")
type("Mine", (Kernel,), {"initial": lambda self: torch.zeros(1), \
"ratios": lambda self, i, theta: theta.sum().sigmoid().expand(len(i))})(8)
search(model, [batch], budgets=0.5)
search(model, [batch], budgets=[1.5])
search(model, [batch], budgets=["half"])
search(model, [batch], budgets=[-0.1])
search(model, [batch], budgets=[0.0001])
search(model, [batch], budgets=["10 FLOPs"])
search(model, [batch], budgets=[{"flop": 0.5}])
search(model, [batch], budgets=[{"latency": "20ms"}])
search(model, [batch], budgets=[{"kv_cache": "20ms"}])
search(model, [batch], budgets=[{"tokens": 32}])
search(model, [batch], budgets=[{}])
search(model, [batch], options={"relative_to": "all"})
search(model, [batch], start={"name": "gradient", "estimator": "papers"})
search(model, [batch], options={"objective": "accuracy"})
search(model, [batch], start="gradients")
search(model, [batch], start={"name": "ramp", "steps": 3})
search(model, [batch], start={"name": "gradient", "steps": -1})
search(model, [batch], refinement=-1)
search(model, [batch], seed="x")
search(model, [batch], options=3)
search(model, [batch], options={"object": "kl"})
search(model, [batch], callback=3)
search(model, [batch], kernel=kernels.Linear)
search(model, [batch], start={"name": "shared", "between": (0.9, 0.2)})
LatencyTable.measure(model, lengths=64)
LatencyTable.measure(model, lengths=[64])
LatencyTable.measure(model, lengths=[64, 32])
count_flops(model, config, n_visual=2.5, n_text=8)
count_flops(model, config, n_visual=16, n_text=8, convention="fast")
count_flops(model, config, inputs="a.png")
count_flops(model, config, inputs=batch)
count_flops(model, config, n_visual=16, inputs=prompt)
""",
    "Models and prompts": """
apply(torch.nn.Linear(2, 2), config)
apply("llava-hf/llava-1.5-7b-hf", config)
apply(config, model)
apply(model.config, config)
evaluate("llava-hf/llava-1.5-7b-hf", [batch])
profile(model.config, [batch])
count_flops("llava-hf/llava-1.5-7b-hf")
count_flops(config, model)
count_flops(model, frontier)
count_flops(transformers.MllamaConfig())
count_flops(transformers.LlamaConfig())
apply(model, PruningConfig("fastv", [1, 1, 0.5, 0.5]))
apply(model, frontier)
apply(model, frontier[0])
apply(model, [frontier[0]])
apply(model, presets("fastv"))
apply(model, "preset:fastv/k2-r50")
apply(model, config, visual_mask=[True])
apply(model, "frontier.json")
apply(model, config.to_dict())
apply(model, 0.5)
apply(model, PruningConfig("fastv", [0.5] * 6))
apply(model, PruningConfig("vispruner+fastv@6", [0.5] * 6))
apply(model, PruningConfig("fastv", [1.0] * 6, model_type="qwen2_vl"))
apply(model, config, mode="train")
[apply(model, config), apply(model, config)]
with apply(model, PruningConfig("fastv", [1, 0, 0, 0, 0, 0])): \
model(input_ids=batch["input_ids"][:1, :19], pixel_values=pixels)
with apply(model, config): model(pixel_values=pixels)
with apply(model, config): model(inputs_embeds=torch.ones(1, 25, 32))
with apply(model, config): model(input_ids=torch.tensor([[1, 7, 9]]), pixel_values=pixels)
with apply(model, config, visual_mask=torch.ones(1, 9, dtype=torch.bool)): model(**prompt)
with apply(model, config, mode="search"): \
model.generate(**prompt, max_new_tokens=2, cache_implementation="static")
with apply(model, config, mode="search"): model.generate(**prompt, max_new_tokens=2)
evaluate_downsampled(model, [batch], 0.5)
""",
    "Batches": """
search(model, batch)
search(model, "questions.jsonl")
data.batches(processor, "questions.jsonl")
data.batches(processor, None)
search(model, [])
evaluate(model, [{"input_ids": batch["input_ids"]}])
evaluate(model, [{**batch, "labels": batch["labels"][:, 1:]}])
evaluate(model, [{**batch, "labels": torch.full_like(batch["labels"], -100)}])
evaluate(model, [text_only])
data.batches(None, [], batch_size=0)
testbed.batches("dev")
testbed.batches("test", tasks=["ocr"])
testbed.load("testbed-lava")
pareto.hypervolume([[1.0, float("nan")]], (2.0, 2.0))
""",
    "The command line": """
vispco
vispco serach
vispco search --bogus
vispco search --meth fastv
vispco search --outdir run
vispco search llava-hf/llava-1.5-7b-hf
vispco --model testbed
vispco search --method fastvv
vispco search --method FASTV
vispco search --method all
vispco search --method fastv pdrop
vispco search --kernel monoton
vispco search --budgets 2
vispco search --budgets 20
vispco search --budgets 20,50,80
vispco search --budgets 20%,50
vispco search --budgets ".2;.5"
vispco search --budgets 0,5
vispco search --budgets 0.2-0.8
vispco search --budgets 0.2:0.8:0.1
vispco search --budgets 20:80:4
vispco search --budgets 192t
vispco search --budgets 20ms
vispco search --budgets latency=20
vispco search --budgets 0.2 0.5
vispco search --budgets 192
vispco search --budget 0.5
vispco search --budgets half
vispco search --budgets 0.1:0.9
vispco search --budgets 0.1:3TFLOPs:4
vispco search --budgets flops=0.5+flops=0.4
vispco search --budgets flop=0.5
vispco search --steps -1
vispco search --learning-rate nan
vispco search --start gradients
vispco search --start ramp --steps 3
vispco search --start ramp --before-llm
vispco search --dtype int8
vispco search --dtype fp16
vispco search --device gpu
vispco search --columns img=image
vispco search --model llava-7b
vispco search --model testbed_qwen
vispco search --model https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct
vispco search --model pictures
vispco search --model /nope/model
vispco search --model config.json
vispco search --output config.json
vispco search --output .
vispco search --output /proc/run
vispco search --tasks ocr
vispco search --images pictures
vispco evaluate
vispco evaluate --config config.json --frontier frontier.json
vispco evaluate --configs config.json
vispco evaluate --config missing.json
vispco evaluate --config fastv/k2-r50
vispco evaluate --config "K=2 R=0.5"
vispco evaluate --config pictures
vispco evaluate --config frontier.json
vispco evaluate --config preset:fastv/k2
vispco evaluate --config config.json --output measured.json
vispco evaluate --config config.json --published
vispco evaluate --config config.json --split dev
vispco evaluate --config config.json --limit 8
vispco plot
vispco plot frontier.json -o a.pdf
vispco plot frontier.json -o no/such/folder/a.svg
vispco plot frontier.json -o a.svg --y accuracy
vispco plot config.json -o a.svg
vispco plot pictures -o a.svg
vispco plot --tokens pictures/a.png -o a.svg
vispco plot newer.json -o a.svg
vispco apply config.json
vispco apply --config config.json --image pictures/a.png
vispco apply --config config.json --image pictures/a.png --question ""
vispco apply --config config.json --image https://example.org/a.png --question "what is it"
vispco apply --config config.json --image empty.json --question "what is it"
vispco apply --config config.json --image missing.png --question "what is it"
vispco apply --config config.json --image config.json --question "what is it"
vispco apply --config config.json --index -1
vispco convert --from fastv "K=2 R=0.5"
vispco convert --from fastv K=2 R=0.5 --num-layers 32
vispco convert --from fastv --num-layers 32
vispco convert --from FastV "K=2 R=0.5" --num-layers 32
vispco convert --from fastv "k=2, r=50%" --num-layers 32
vispco convert --from fastv "K=2" --num-layers 32
vispco convert --from fastv "K=2 R=50" --num-layers 32
vispco convert --config preset:fastv/k2-r50
vispco convert --from lexico "K=2" --num-layers 32
vispco convert --config pyramid.json --to fastv
vispco convert --config pyramid.json --to tgi
vispco list colours
vispco demo --model llava
""",
    "Configuration and frontier files": """
vispco convert --config empty.json
vispco convert --config list.json
vispco convert --config old.json
vispco convert --config rising.json
vispco convert --config nan.json
vispco convert --config twice.json
vispco convert --config unknown.json
vispco convert --config option.json
vispco convert --config deep.json
vispco convert --config picture.json
vispco plot point.json -o a.svg
LatencyTable.load("config.json")
""",
    "Questions": """
vispco search --data nothing.jsonl
vispco search --data coco
vispco search --data broken.jsonl
vispco search --data none.jsonl
vispco search --data keys.jsonl
vispco search --data keys.jsonl --columns prompt=query
vispco search --data questions.jsonl --images nowhere
vispco search --data questions.jsonl --split test
vispco search --data questions.jsonl --tasks count
vispco search --data questions.jsonl --chat-template config.png
vispco search --data list.json
data.parse({"image": "a.png", "question": "What?", "answer": ""}, "q.jsonl:1")
data.parse({"image": "a.png", "question": "Like <image>?", "answer": "no <image>"}, "q.jsonl:1")
data.parse({"images": ["a.png"], "question": "Is <image> like <image>?", "answer": "no"}, \
"q.jsonl:1")
data.parse({"image": "a.png", "video": "b.mp4", "question": "What?", "answer": "x"}, "q.jsonl:1")
data.parse({"image": "a.png", "conversations": [{"from": "human", "value": "What?"}]}, "q.jsonl:1")
data.parse({"image": "a.png", "conversations": [{"from": "robot", "value": "What?"}]}, "q.jsonl:1")
data.parse({"image": "a.png", "question": "What?", "answer": True}, "q.jsonl:1")
data.parse({"image": "a.png", "messages": [{"role": "tool", "content": "x"}]}, "q.jsonl:1")
data.draw("questions.jsonl", 0)
vispco search --data dialog.jsonl
vispco search --data empty.csv
vispco search --data quote.csv
vispco search --data wide.csv
vispco search --data twice.csv
vispco search --data latin.csv
vispco search --data sheet.csv
vispco search --data packed.jsonl.gz
vispco search --data damaged.parquet
vispco search --data object.json
vispco search --data lists.json
data.collate(processor, [data.parse({"image": "pictures/a.png", "question": "What?", \
"answer": "a <eos> b"}, "q.jsonl:1")])
data.collate(processor, [data.parse({"image": "pictures/a.png", "question": "What <eos>?", \
"answer": "a"}, "q.jsonl:1")])
vispco search --data saved
vispco search --data alone.jsonl
vispco search --data table.gz
vispco search --data wide32.csv
""",
    "Pictures and videos": """
vispco search --data gone.jsonl
vispco search --data outside.jsonl
vispco search --data link.jsonl --images pictures
vispco search --data address.jsonl
vispco search --data nopicture.jsonl
vispco search --data questions.jsonl --max-pixels 10
data.open_picture(b"hello")
data.open_picture(b"0" * 2**25, max_pixels=100)
data.open_picture("pictures")
data.open_picture("floats.tif")
data.parse({"image": "x" * 300, "question": "What?", "answer": "x"}, "q.jsonl:1")
data.parse({"image": "iVBORw0KGgo?", "question": "What?", "answer": "x"}, "q.jsonl:1")
data.parse({"video": "a.mp4", "question": "What?", "answer": "x", "fps": 0}, "q.jsonl:1")
vispco search --fps 0
""",
    "Serving with vLLM": """
OneDrop.of(PruningConfig("fastv", [1, 1, 0.5]))
OneDrop.of(PruningConfig("pdrop", [0.5, 0.5]))
OneDrop.of(PruningConfig("cdpruner", [0.5, 0.5]))
OneDrop.of(PruningConfig("prumerge", [0.5, 0.5], {"adaptive": True}))
OneDrop.of(PruningConfig("evs", [0, 0]))
""",
}
MISTAKES = [
    Mistake(area, line) for area, lines in AREAS.items() for line in lines.strip().splitlines()
] + [
    Mistake("Packages that are not installed", did, package)
    for did, package in (
        ("vispco plot frontier.json -o a.svg", "matplotlib"),
        ("vispco demo", "matplotlib"),
        ("vispco search --data owner/name", "datasets"),
        ('data.open_picture("pictures/a.png")', "PIL"),
        ('testbed.batches("test", tasks=["easy_vqa"])', "easy_vqa"),
        ("baselines.nsga2(evaluator, None, 8)", "optuna"),
        ('pictures.open_video("film.mp4")', "av"),
        ('data.draw("damaged.parquet", 1)', "pyarrow"),
    )
]


def files() -> None:
    """Make FILES in the current folder."""
    import datasets
    from PIL import Image

    from vispco import Frontier, FrontierPoint, PruningConfig

    Path("pictures").mkdir()
    Image.new("RGB", (8, 8), "red").save("pictures/a.png")
    Image.new("RGB", (8, 8), "red").save("config.png")
    Path("film.mp4").write_text("")
    os.symlink("../config.png", "pictures/link.png")
    good = PruningConfig.from_fastv(2, 0.5, num_layers=4).to_dict()
    PruningConfig.from_fastv(2, 0.5, num_layers=4).save("config.json")
    PruningConfig.from_pdrop([1, 2], [0.5, 0.25], num_layers=4).save("pyramid.json")
    curve = Frontier([FrontierPoint(PruningConfig("fastv", (1, 0.5)), 0.75, 1e9, 0.75, 0.1)], {})
    curve.save("frontier.json")
    held = json.loads(Path("frontier.json").read_text())
    newer = json.dumps({**held, "schema_version": 2})
    held["points"][0]["share"] = "0.75"
    texts = {
        "empty": "",
        "list": "[1, 2]",
        "old": json.dumps({**good, "schema_version": 0}),
        "point": json.dumps(held),
        "newer": newer,
        "rising": json.dumps({**good, "keep_ratios": [0.5, 1]}),
        "nan": json.dumps({**good, "flops": float("nan")}),
        "twice": json.dumps(good)[:-1] + ', "method": "random"}',
        "unknown": json.dumps({**good, "keep_ratio": 0.5}),
        "option": json.dumps({**good, "method_options": {"sharp": 1}}),
        "deep": '{"a": ' + "[" * 100 + "]" * 100 + "}",
        "picture": Path("pictures/a.png").read_bytes(),
    }
    for name, text in texts.items():
        Path(f"{name}.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    row = {"image": "pictures/a.png", "question": "What is it?", "answer": "a square"}
    rows = {
        "questions": [row] * 2,
        "none": [],
        "keys": [{"image": "pictures/a.png", "query": "What is it?", "label": "a square"}],
        "gone": [{**row, "image": "b.png"}],
        "outside": [{**row, "image": "../a.png"}],
        "address": [{**row, "image": "https://example.org/a.png"}],
        "nopicture": [{**row, "image": "config.json"}],
        "link": [{**row, "image": "link.png"}],
        "alone": [{"question": "What is it?", "answer": "a square"}] * 2,
    }
    for name, found in rows.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    talk = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "a square"},
    ]
    Path("dialog.jsonl").write_text(json.dumps({"img": "pictures/a.png", "dialog": talk}))
    table = "image,question,answer\npictures/a.png,What is it?,"
    tables = {"empty": "", "quote": '"a', "wide": "a,b", "latin": "caf\xe9", "twice": ""}
    for name, answer in tables.items():
        text = table.replace("question", "image", 1) if name == "twice" else table
        Path(f"{name}.csv").write_bytes(f"{text}{answer}\n".encode("latin-1"))
    Path("wide32.csv").write_bytes(table.encode("utf-32"))
    Path("table.gz").write_bytes(gzip.compress(b"PAR1" + bytes(8)))
    Path("sheet.csv").write_bytes(b"PK\x03\x04")
    Path("packed.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode())[:-20])
    Path("damaged.parquet").write_bytes(b"PAR1" + bytes(8))
    decimals = datasets.Dataset.from_list([{**row, "answer": 3.10}])
    # As if the library had read the file of JSON that says 3.10.
    decimals.info.builder_name = "json"
    decimals.save_to_disk("saved")
    Path("object.json").write_text(json.dumps({"mine": [row]}, indent=1))
    Path("lists.json").write_text(json.dumps({"train": [row], "test": [row]}))
    Image.new("F", (8, 8)).save("floats.tif")
    Path("broken.jsonl").write_text(json.dumps(row) + "\n{'image': 'a.png'}\n")


@functools.cache
def names() -> dict:
    """What the Python of a mistake may use."""
    import torch
    import transformers

    import vispco
    from tiny import batch, make, without_labels
    from vispco import baselines, data, kernels, testbed
    from vispco.data import pictures
    from vispco.integrations.serving import OneDrop

    two, one = batch(), without_labels(batch(images=(1,), text=(9,), before=(2,)))
    alone = batch(images=(0, 0))
    config = vispco.PruningConfig("fastv", [1, 1, 0.5, 0.5, 0.5, 0.5])
    curve = vispco.Frontier(
        [vispco.FrontierPoint(vispco.PruningConfig("fastv", (1, 0.5)), 0.75, 1e9, 0.75, 0.1)]
    )
    return {
        **vars(vispco),
        "torch": torch,
        "transformers": transformers,
        "model": make("llava"),
        "batch": two,
        "prompt": one,
        "text_only": alone,
        "config": config,
        "frontier": curve,
        "pixels": two["pixel_values"][:1],
        "data": data,
        "kernels": kernels,
        "testbed": testbed,
        "processor": testbed.load("testbed-llava")[1],
        "baselines": baselines,
        "pictures": pictures,
        "OneDrop": OneDrop,
        "evaluator": SimpleNamespace(passes=0, samples=4),
    }


def message_of(mistake: Mistake) -> str:
    """What a mistake is told, with the kind of error before it unless it is a ValueError.

    Raises AssertionError if nothing is said.
    """
    from vispco import ste
    from vispco.testbed import easyvqa

    # What this imports stays imported.
    names()
    # Other tests may have registered estimators of their own.
    own = {"default": ste.default, "paper": ste.paper}
    if mistake.without:
        easyvqa.load.cache_clear()
    missing = {mistake.without: None} if mistake.without else {}
    alone = mock.patch.dict(ste.ESTIMATORS, own, clear=True)
    with mock.patch.dict(sys.modules, missing), alone:
        if mistake.did.startswith("vispco"):
            text = _command(shlex.split(mistake.did)[1:])
        else:
            text = _python(mistake.did)
    return text.replace(f"{os.getcwd()}/", "/data/").replace(os.getcwd(), "/data")


def _command(words: list[str]) -> str:
    from vispco.commands.main import main

    before = sorted(map(str, Path(".").rglob("*")))
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = main(words)
    line, end, rest = err.getvalue().partition("\n")
    told = code == 2 and line.startswith("vispco: error: ") and end and not rest
    assert told and not out.getvalue(), (code, out.getvalue(), err.getvalue())
    assert sorted(map(str, Path(".").rglob("*"))) == before, "something was written"
    return line.removeprefix("vispco: error: ")


def _python(line: str) -> str:
    made: dict = dict(names())
    try:
        exec(compile(line, "<mistake>", "exec"), made)
    except (ValueError, TypeError, ImportError, OSError) as error:
        kind = type(error).__name__
        return str(error) if kind == "ValueError" else f"{kind}: {error}"
    finally:
        from vispco.pruning._hooks import _applied

        # What a mistake has left applied.
        for handle in [found() for found in _applied.values()]:
            if handle is not None:
                handle.remove()
    raise AssertionError(f"{line} is no mistake")


def row(mistake: Mistake, message: str) -> str:
    """A line of the table."""
    without = f" without {mistake.without}" if mistake.without else ""
    return f"| {code(mistake.did)}{without} | {code(message)} |"


def code(text: str) -> str:
    """As Markdown that shows it as it stands, on one line."""
    assert "|" not in text, f"a table cannot show {text}"
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def page(messages: dict[Mistake, str]) -> str:
    """docs/mistakes.md."""
    parts = [INTRODUCTION]
    for area in dict.fromkeys(m.area for m in messages):
        rows = [row(m, text) for m, text in messages.items() if m.area == area]
        head = [f"## {area}\n", "| what was done | what is said |", "| --- | --- |"]
        parts.append("\n".join([*head, *rows]) + "\n")
    return "\n".join(parts)


@contextlib.contextmanager
def place() -> Iterator[None]:
    """A folder of FILES as the current one."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            files()
            yield
        finally:
            os.chdir(here)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="print docs/mistakes.md")
    parser.add_argument("--write", action="store_true", help="write it")
    options = parser.parse_args()
    with place():
        text = page({mistake: message_of(mistake) for mistake in MISTAKES})
    if options.write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
