"""The command line on users' models and data.

A folder written by save_pretrained, pictures and questions on disk.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import vispco
from test_collate import Films
from vispco import Frontier, PruningConfig, testbed
from vispco.commands.main import main
from vispco.commands.notations import parse_notation
from vispco.data import draw
from vispco.testbed.model import EMBEDDED

N = 12
FAST = [
    "--steps",
    "2",
    "--limit",
    "8",
    "--batch-size",
    "4",
    "--kernel",
    "linear",
    "--refinement",
    "0",
]


@pytest.fixture(scope="module", params=EMBEDDED)
def own(request, tmp_path_factory):
    """(folder, name, examples).

    A model as its owner would keep it, and questions in three forms.
    """
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = testbed.load(request.param)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    examples = testbed.examples("test", N, seed=5)
    (folder / "pictures").mkdir()
    with open(folder / "questions.jsonl", "w") as file:
        for i, e in enumerate(examples):
            Image.fromarray(e.image).save(folder / "pictures" / f"{i}.png")
            file.write(
                json.dumps(
                    {
                        "image": f"{i}.png",
                        "question": e.question + "?",
                        "answer": e.answer,
                        "task": e.task,
                    }
                )
                + "\n"
            )
    talks = [
        {
            "id": str(i),
            "image": f"{i}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{e.question}?"},
                {"from": "gpt", "value": e.answer},
                {"from": "human", "value": f"{e.question}?"},
                {"from": "gpt", "value": e.answer},
            ],
        }
        for i, e in enumerate(examples)
    ]
    talks.insert(
        3,
        {
            "id": "text",
            "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}],
        },
    )
    (folder / "llava.json").write_text(json.dumps(talks, indent=1))
    return folder, request.param, examples


@pytest.fixture
def here(own, monkeypatch):
    """The same, as the working folder's parent of a fresh one."""
    folder, name, examples = own
    monkeypatch.chdir(folder)
    return name, examples


OWN = ["--model", "model", "--data", "questions.jsonl", "--images", "pictures"]


def drawn(examples, limit, seed=0):
    """The examples that a draw gives, in its order, by the pictures' names."""
    sample = draw("questions.jsonl", limit, seed, images="pictures")
    return [examples[int(Path(c.media[0]).stem)] for c in sample.conversations]


def test_search_is_the_librarys_own_on_the_same_batches(here, tmp_path, capsys):
    name, examples = here
    run = tmp_path / "run"
    assert (
        main(["search", *OWN, *FAST, "--budgets", "0.4,flops=0.6+kv_cache=70%", "-o", str(run)])
        == 0
    )
    out, err = capsys.readouterr()
    found = Frontier.load(run / "frontier.json")
    chosen = drawn(examples, 8)
    batches = [testbed.collate(chosen[i : i + 4], model=name) for i in (0, 4)]
    want = vispco.search(
        testbed.load(name)[0],
        batches,
        kernel="linear",
        budgets=[0.4, {"flops": 0.6, "kv_cache": "70%"}],
        refinement=0,
        start=vispco.Gradient(steps=2),
    )
    assert [p.config for p in found.points] == [p.config for p in want.points]
    assert [p.loss for p in found.points] == pytest.approx(
        [p.loss for p in want.points], rel=1e-4, abs=1e-6
    )
    assert found.meta["model"] == "model" and found.meta["data"] == "questions.jsonl"
    files = {p.name for p in run.iterdir()}
    assert files == {
        "frontier.json",
        "log.jsonl",
        "report.html",
        "journal.jsonl",
        "config-0.4.json",
        "config-flops-0.6+kv_cache-70.json",
    }
    assert "flops=0.6+kv_cache=70%" in out
    counts, *shown = err.splitlines()
    assert (
        f"{N} questions, 8 drawn with seed 0" in counts
        and "64 visual tokens" in counts
        and "2 of answers" in counts
    )
    assert len(shown) == 3
    for line, example in zip(shown, chosen, strict=False):
        assert (
            f"{example.question}? -> {example.answer}; labelled: '{example.answer} <eos>'" in line
        )
    PruningConfig.load(run / "config-0.4.json")


def test_a_llava_instruct_file(here, tmp_path, capsys):
    command = [
        "search",
        "--model",
        "model",
        "--data",
        "llava.json",
        "--images",
        "pictures",
        *FAST,
        "--objective",
        "task",
        "--estimator",
        "paper",
        "--budgets",
        "0.5",
        "-o",
        str(tmp_path / "run"),
        "--json",
    ]
    assert main(command) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["meta"]["objective"] == "task" and "task" in result["configurations"][0]
    assert (
        f"{N} questions, 8 drawn with seed 0, 1 without a picture left out" in err
        and "4 of answers" in err
    )
    assert "(and 1 more turns)" in err and "llava.json:" in err


def test_evaluate_gives_the_librarys_figures(here, tmp_path, capsys):
    name, examples = here
    layers = {"testbed-llava": 8, "testbed-qwen": 16}[name]
    config = PruningConfig.from_fastv(2, 0.75, num_layers=layers)
    config.save(tmp_path / "c.json")
    assert main(["evaluate", *OWN, "--config", str(tmp_path / "c.json"), "--json", "-q"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    chosen = drawn(examples, 512)
    model = testbed.load(name)[0]
    batches = [testbed.collate(chosen[i : i + 4], model=name) for i in range(0, N, 4)]
    for found, want in (
        (result["full"], vispco.evaluate(model, batches)),
        (result["configurations"][0], vispco.evaluate(model, batches, config)),
    ):
        assert (found["n"], found["accuracy"]) == (N, want.accuracy)
        assert found["kl"] == pytest.approx(want.kl, rel=1e-3, abs=1e-6) and found[
            "flops"
        ] == pytest.approx(want.flops)
        right = {task: [] for task in {e.task for e in chosen}}
        for e, correct in zip(chosen, want.correct.tolist(), strict=True):
            right[e.task].append(correct)
        assert found["tasks"] == {task: sum(c) / len(c) for task, c in right.items()}
    # --quiet
    assert not err


def test_apply_answers_as_generate_does(here, tmp_path, capsys):
    name, examples = here
    layers = {"testbed-llava": 8, "testbed-qwen": 16}[name]
    PruningConfig("fastv", [1.0] * layers).save(tmp_path / "c.json")
    model, processor = testbed.load(name)
    for i in (0, 1):
        words = [
            "apply",
            "--model",
            "model",
            "--config",
            str(tmp_path / "c.json"),
            "--image",
            f"pictures/{i}.png",
            "--question",
            examples[i].question + "?",
        ]
        assert main([*words, "--json", "--repeats", "0"]) == 0
        result = json.loads(capsys.readouterr().out)
        inputs = testbed.collate(examples[i : i + 1], with_answers=False, model=name)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=32, do_sample=False)[
                0, inputs["input_ids"].shape[1] :
            ]
        want = processor.decode(output, skip_special_tokens=True).strip()
        assert result["full"]["answer"] == result["pruned"]["answer"] == want
        assert result["full"]["tokens"] == [64] * layers and result["speeds"] is None
    assert main(words) == 0
    out = capsys.readouterr().out
    assert (
        out.count(" ms ") == 2
        and "first token" in out
        and out.count("tokens/s") == 2
        and "attention: sdpa" in out
    )


def test_other_number_types(here, tmp_path, capsys):
    config = PruningConfig("fastv", [1.0] * {"testbed-llava": 8, "testbed-qwen": 16}[here[0]])
    config.save(tmp_path / "c.json")
    assert (
        main(
            [
                "evaluate",
                *OWN,
                "--config",
                str(tmp_path / "c.json"),
                "--json",
                "-q",
                "--dtype",
                "bfloat16",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert (
        result["configurations"][0]["kl"] == pytest.approx(0, abs=1e-6)
        and result["full"]["accuracy"] > 0.8
    )


def test_a_model_by_name_and_what_is_asked_of_transformers(tmp_path, monkeypatch, capsys):
    """No code of the model's own, no pickles, unless it is asked for.

    A folder is never looked for elsewhere.
    """
    import transformers

    model, processor = testbed.load("testbed-llava")
    asked, testbed_parts = (
        [],
        {
            "AutoModelForImageTextToText": (model, {"missing_keys": set()}),
            "AutoProcessor": processor,
            "AutoConfig": model.config,
        },
    )
    for cls in (
        transformers.AutoConfig,
        transformers.AutoProcessor,
        transformers.AutoModelForImageTextToText,
    ):
        monkeypatch.setattr(
            cls,
            "from_pretrained",
            lambda name, which=cls.__name__, **options: (
                asked.append((which, name, options)) or testbed_parts[which]
            ),
        )
    monkeypatch.chdir(tmp_path)
    PruningConfig("fastv", [1.0] * 8).save("c.json")
    # A folder of a size that fits.
    Path("folder").mkdir()
    Path("folder/config.json").write_text("{}")
    with open("folder/model.safetensors", "wb") as file:
        file.truncate(10**9)
    monkeypatch.setattr("vispco.commands.model._reachable", lambda name: True)
    example = testbed.examples("test", 1)[0]
    Image.fromarray(example.image).save("a.png")
    words = ["apply", "--config", "c.json", "--repeats", "0", "--device", "cpu", "--model"]
    question = ["--image", "a.png", "--question", f"{example.question}?"]
    assert (
        main([*words, "owner/model", *question, "--dtype", "bfloat16"])
        == main([*words, "folder", *question, "--trust-remote-code"])
        == 0
    )
    for calls, name, own, dtype in (
        (asked[:3], "owner/model", False, "bfloat16"),
        (asked[3:], "folder", True, "auto"),
    ):
        common = {"trust_remote_code": own, "local_files_only": own}
        weights = {"use_safetensors": True, "output_loading_info": True, "dtype": dtype}
        # Weights come last.
        assert calls == [
            ("AutoConfig", name, common),
            ("AutoProcessor", name, common),
            ("AutoModelForImageTextToText", name, {**common, **weights}),
        ]


# ---- what goes wrong -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data", "nothing.jsonl"], "nothing.jsonl: No such file"),
        (
            ["--data", "nothing"],
            "'nothing' is no file and no folder here, and not the OWNER/NAME of a data set",
        ),
        (["--data", "bad.jsonl"], "bad.jsonl:2: expected a JSON object on one line"),
        (["--data", "empty.jsonl"], "empty.jsonl holds no question about a picture"),
        (
            ["--data", "keys.jsonl"],
            "keys.jsonl:1: expected a text under 'question', "
            "got the keys 'image', 'query', 'label'",
        ),
        (
            ["--data", "keys.jsonl", "--columns", "question=query"],
            "keys.jsonl:1: expected a text under 'answer'",
        ),
        (["--data", "keys.jsonl", "--columns", "prompt=query"], "--columns: expected OURS=THEIRS"),
        (["--columns", "question="], "expected OURS=THEIRS"),
        (["--data", "outside.jsonl"], "outside.jsonl:1: '../model/config.json' lies outside of"),
        (["--data", "gone.jsonl"], "gone.jsonl:1: expected the file"),
        (["--data", "nopicture.jsonl", "--images", "."], "nopicture.jsonl:1: "),
        (["--data", "video.jsonl"], "takes no video"),
        (["--images", "nowhere"], "nowhere is no folder"),
        (["--max-pixels", "100"], "questions.jsonl:"),
        (["--max-pixels", "many"], "whole number"),
        (["--split", "test"], "questions.jsonl is a file, which has no splits"),
        (["--tasks", "count"], "--tasks are the testbed's"),
        (["--chat-template", "none.jinja"], "none.jinja: No such file"),
        (["--chat-template", "questions.jsonl"], "questions.jsonl:"),
        (["--batch-size", "0"], "from 1"),
        (["--frames", "0"], "from 1"),
        (["--fps", "0"], "--fps: expected a positive number, got '0'"),
        (["--data", "names.jsonl"], "--columns image=img,conversations=dialog"),
        (["--data", "cells.csv"], "cells.csv:2: expected a text under 'answer', but its value is"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "gpu"], "expected cpu, cuda, cuda:1, mps or auto, got 'gpu'"),
        (["--device", "cuda:99"], "cuda"),
        (["--model", "nowhere"], "unknown model 'nowhere'"),
        (["--model", "pictures"], "pictures: there is no config.json"),
        (["--model", "huge"], "weights, which its"),
        (["--model", "pickled"], "but pytorch_model.bin: pickled weights"),
        (["--model", "custom"], "with --trust-remote-code it may"),
        (["--model", "text-only"], "text-only: cannot prune 'gpt2' models"),
        (["--objective", "accuracy"], "invalid choice: 'accuracy'"),
        (["--estimator", "papers"], "did you mean 'paper'?"),
        (["--budgets", "flop=0.5"], "did you mean 'flops'?"),
        (["--budgets", "flops=0.5+flops=0.4"], "limits the same twice"),
        (["--budgets", "flops=0.5+kv_cache=half"], "'half' is not understood"),
        (["--budgets", "flops=0.0001+kv_cache=0.5", "--quiet"], "the reachable range is"),
    ],
)
def test_every_fault_is_one_line(words, expected, tmp_path, monkeypatch, capsys, stand_in_folder):
    monkeypatch.chdir(stand_in_folder)
    before = sorted(map(str, Path(".").rglob("*")))
    assert main(["search", *OWN, "-o", str(tmp_path / "run"), *words]) == 2
    out, err = capsys.readouterr()
    assert (
        not out and err.count("\n") == 1 and err.startswith("vispco: error: ") and expected in err
    ), err
    assert "Traceback" not in err and len(err) < 700
    assert sorted(map(str, Path(".").rglob("*"))) == before and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def stand_in_folder(tmp_path_factory):
    """A model folder, good questions, and many bad ones."""
    folder = tmp_path_factory.mktemp("bad")
    model, processor = testbed.load("testbed-llava")
    for name in ("model", "pickled", "custom"):
        model.save_pretrained(folder / name) if name != "pickled" else (folder / name).mkdir()
        processor.save_pretrained(folder / name)
    (folder / "pickled/config.json").write_text((folder / "model/config.json").read_text())
    torch.save(model.state_dict(), folder / "pickled/pytorch_model.bin")
    custom = json.loads((folder / "model/config.json").read_text())
    custom |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Config", "AutoModelForImageTextToText": "mine.Model"},
    }
    (folder / "custom/config.json").write_text(json.dumps(custom))
    (folder / "custom/mine.py").write_text("raise SystemExit('this must never run')")
    shutil.copytree(folder / "model", folder / "huge")
    huge = json.loads((folder / "model/config.json").read_text())
    huge["text_config"] |= {"hidden_size": 16384, "intermediate_size": 65536}
    (folder / "huge/config.json").write_text(json.dumps(huge))
    (folder / "text-only").mkdir()
    (folder / "text-only/config.json").write_text('{"model_type": "gpt2"}')
    processor.save_pretrained(folder / "text-only")
    (folder / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "pictures/a.png")
    good = {"image": "a.png", "question": "what shape is in red?", "answer": "circle"}
    for name, rows in {
        "questions": [good] * 3,
        "keys": [{"image": "a.png", "query": "x", "label": "y"}],
        "outside": [{**good, "image": "../model/config.json"}],
        "gone": [{**good, "image": "b.png"}],
        "empty": [],
        "nopicture": [{**good, "image": "questions.jsonl"}],
        "video": [{"video": ["a.png", "a.png"], "question": "what?", "answer": "yes"}],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dialog = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    (folder / "names.jsonl").write_text(json.dumps({"img": "a.png", "dialog": dialog}))
    (folder / "cells.csv").write_text("image,question,answer\na.png,x,\n")
    (folder / "bad.jsonl").write_text(json.dumps(good) + "\n{'image': 'a.png'}\n")
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["apply", "--config", "c.json", "--image", "a.png", "--video", "b.mp4", "--question", "x"],
        ["apply", "--config", "c.json", "--question", "x"],
        ["apply", "--config", "c.json", "--video", "b.mp4", "--question", "what"],
        ["convert"],
        ["convert", "--from", "fastv", "K=2 R=0.5"],
        ["convert", "--config", "c.json", "--num-layers", "8"],
        ["convert", "--config", "c.json", "--to", "fastvv"],
        ["convert", "--from", "lexico", "K=2", "--num-layers", "8"],
        ["convert", "--from", "fastv", "K=2", "--num-layers", "8"],
        ["convert", "--from", "fastv", "K=2 R=1.5", "--num-layers", "8"],
        ["convert", "--from", "fastv", "K=2.5 R=0.5", "--num-layers", "8"],
        ["convert", "--from", "fastv", "K=9 R=0.5", "--num-layers", "8"],
        ["convert", "--from", "fastv", "K=nan R=0.5", "--num-layers", "8"],
        ["convert", "--from", "fastv", "K=2 K=3 R=0.5", "--num-layers", "8"],
        ["convert", "--from", "pdrop", "layers=1,2 ratios=0.5", "--num-layers", "8"],
        ["convert", "--from", "pdrop", "layers=1,2 ratios=0.5,0.7", "--num-layers", "8"],
        ["convert", "--from", "sparsevlm", "layers=1 tokens=700", "--num-layers", "8"],
        ["convert", "--from", "sparsevlm", "layers=7 tokens=7", "--num-layers", "8"],
        [
            "convert",
            "--from",
            "fastv",
            "K=2 R=0.5",
            "--num-layers",
            "8",
            "--output",
            "no/such/folder.json",
        ],
    ],
)
def test_faults_of_apply_and_convert_are_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    PruningConfig("fastv", [1, 1, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25]).save("c.json")
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("vispco: error: "), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json"]


def test_convert_there_and_back(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for notation, text, layers in (
        ("fastv", "K=2 R=0.75", 8),
        ("pdrop", "layers=8,16,24 ratios=0.5,0.25,0.125", 32),
        ("sparsevlm", "layers=2,6,15 tokens=300,200,110", 32),
    ):
        assert (
            main(["convert", "--from", notation, text, "--num-layers", str(layers), "-o", "c.json"])
            == 0
        )
        assert capsys.readouterr().out.endswith("c.json\n")
        assert PruningConfig.load("c.json") == parse_notation(notation, text, layers)
        assert main(["convert", "--config", "c.json", "--to", notation]) == 0
        assert capsys.readouterr().out == text + "\n"
        assert main(["convert", "--config", "c.json", "--to", notation, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["text"] == text
    assert PruningConfig.load("c.json").tokens(576)[3] == 300
    assert main(["convert", "--config", "c.json", "--to", "fastv"]) == 2
    assert "it drops tokens once, not before 3 layers" in capsys.readouterr().err


# ---- videos --------------------------------------------------------------------------------------
def film(path, image):
    """Two frames of the same picture: a folder of pictures, or a video file, without loss."""
    if not path.suffix:
        path.mkdir()
        for i in range(2):
            Image.fromarray(image).save(path / f"{i}.png")
        return
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "bgr0"
        for _ in range(2):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())


@pytest.mark.parametrize(
    "whose, suffix", [("a stand-in", ""), ("a stand-in", ".mkv"), ("Qwen's own", ".mkv")]
)
def test_a_film_of_one_picture_is_searched_and_answered_as_the_picture(
    whose, suffix, tmp_path, monkeypatch, capsys
):
    """Two equal frames make the patches that Qwen2.5-VL makes of one picture.

    From the files to the answer, all must agree.
    """
    monkeypatch.chdir(tmp_path)
    model, processor = testbed.load("testbed-qwen")
    films = Films(processor)
    if whose == "Qwen's own":
        pytest.importorskip("torchvision")
        from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

        like = {
            key: getattr(processor.image_processor, key)
            for key in (
                "patch_size",
                "merge_size",
                "temporal_patch_size",
                "image_mean",
                "image_std",
                "size",
            )
        }
        films = Qwen2_5_VLProcessor(
            processor.image_processor,
            processor.tokenizer,
            Qwen2VLVideoProcessor(**like),
            chat_template=films.chat_template,
        )
    for name, its in {"image": processor, "video": films}.items():
        model.save_pretrained(f"{name}-model")
        (processor if its is films and whose == "a stand-in" else its).save_pretrained(
            f"{name}-model"
        )
    examples = testbed.examples("test", 4, seed=2)
    for i, e in enumerate(examples):
        film(tmp_path / f"{i}{suffix or '-frames'}", e.image)
        Image.fromarray(e.image).save(f"{i}.png")
    found, answers = {}, {}
    for kind, end in {"image": ".png", "video": suffix or "-frames"}.items():
        if kind == "video" and whose == "a stand-in":
            monkeypatch.setattr(
                "transformers.AutoProcessor.from_pretrained", lambda *_, **__: films
            )
        rows = [
            {kind: f"{i}{end}", "question": e.question + "?", "answer": e.answer}
            for i, e in enumerate(examples)
        ]
        Path(f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = ["--model", f"{kind}-model", "--frames", "2", "--json"]
        assert (
            main(
                [
                    "search",
                    *own,
                    "--data",
                    f"{kind}.jsonl",
                    "--batch-size",
                    "2",
                    "--budgets",
                    "0.5",
                    "--kernel",
                    "linear",
                    "--steps",
                    "2",
                    "--refinement",
                    "0",
                    "-o",
                    kind,
                ]
            )
            == 0
        )
        out, err = capsys.readouterr()
        assert (
            "4 questions, 4 drawn" in err
            and "64 visual tokens" in err
            and f"<{kind}>{examples[0].question}? -> " in err
        )
        found[kind] = json.loads(out)["configurations"][0]
        assert (
            main(
                [
                    "apply",
                    *own,
                    "--config",
                    f"{kind}/config-0.5.json",
                    f"--{kind}",
                    f"0{end}",
                    "--question",
                    examples[0].question + "?",
                    "--repeats",
                    "0",
                ]
            )
            == 0
        )
        answers[kind] = json.loads(capsys.readouterr().out)
    assert found["video"]["keep_ratios"] == found["image"]["keep_ratios"] and found["video"][
        "kl"
    ] == pytest.approx(found["image"]["kl"], rel=1e-3)
    assert answers["video"] == answers["image"] and answers["video"]["pruned"]["tokens"][-1] < 64


# ---- a real process ------------------------------------------------------------------------------
@pytest.mark.parametrize("own", ["testbed-llava"], indirect=True)
def test_as_a_process(own, tmp_path):
    folder, _, _ = own
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(vispco.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "vispco",
            "search",
            *OWN,
            *FAST,
            "--budgets",
            "0.5",
            "-o",
            str(tmp_path / "run"),
            "--json",
        ],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["configurations"][0]["share"] <= 0.5 and Path(result["frontier"]).exists()
    assert "8 drawn with seed 0" in done.stderr and "Traceback" not in done.stderr
