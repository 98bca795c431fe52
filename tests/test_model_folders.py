"""`--model FOLDER`: what cannot be pruned or loaded is refused before weights and output.

Every command says so in one line, and leaves everything as it was.
"""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from PIL import Image
from transformers import CONFIG_MAPPING

from test_support import CROSS, REFUSED
from vispco import PruningConfig
from vispco.commands import search
from vispco.commands.main import main
from vispco.testbed.model import FOLDER


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a picture, a question and a configuration.

    Reading weights, and making the folder of results, is an error of its own.
    """
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("p.png")
    Path("q.jsonl").write_text('{"image": "p.png", "question": "what?", "answer": "red"}\n')
    PruningConfig("fastv", [1.0] * 8).save("c.json")

    def forbidden(*args, **kwargs):
        raise AssertionError("too late")

    loader = transformers.AutoModelForImageTextToText
    monkeypatch.setattr(loader, "from_pretrained", forbidden)
    monkeypatch.setattr(search, "output_folder", forbidden)
    return tmp_path


def folder(model_type, **more):
    """A model folder: config.json, and weights that nothing can read."""
    Path("m").mkdir()
    Path("m/config.json").write_text(json.dumps({"model_type": model_type, **more}))
    Path("m/model.safetensors").write_bytes(b"no weights at all")


def whole():
    """A model folder with everything; its weights are zeros, and only their size is right."""
    shutil.copytree(FOLDER / "testbed-llava", "m", ignore=shutil.ignore_patterns("*.safetensors"))
    with open("m/model.safetensors", "wb") as file:
        file.truncate(10**9)


COMMANDS = {
    "search": ["--data", "q.jsonl", "-o", "deep/run"],
    "evaluate": ["--data", "q.jsonl", "--config", "c.json"],
    "apply": ["--config", "c.json", "--image", "p.png", "--question", "what?"],
    "plot": ["--tokens", "p.png", "--question", "what?", "--config", "c.json", "-o", "t.svg"],
}


def refused(capsys, command="search", more=()):
    """The one line that the command says; it leaves everything as it was."""
    if command == "plot":
        pytest.importorskip("matplotlib")
    before = {path: path.stat().st_mtime_ns for path in Path(".").rglob("*")}
    assert main([command, "--model", "m", *COMMANDS[command], *more]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("vispco: error: m: "), (out, err)
    assert len(err) < 700 and "Traceback" not in err
    assert {path: path.stat().st_mtime_ns for path in Path(".").rglob("*")} == before
    return err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("model_type", ["mllama", "llama"])
def test_every_command_refuses_before_weights_and_output(command, model_type, here, capsys):
    folder(model_type)
    line = refused(capsys, command)
    assert f"cannot prune {model_type!r} models: " in line
    assert (CROSS if model_type == "mllama" else "without a vision part") in line


@pytest.mark.parametrize("model_type", ["florence2", "git", "pi0", "mistral4"])
def test_families_by_folder(model_type, here, capsys):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    folder(model_type)
    assert REFUSED[model_type] in refused(capsys)


def test_what_transformers_does_not_know(here, capsys):
    folder("llava_9")
    line = refused(capsys)
    assert f"transformers {transformers.__version__} does not know 'llava_9' models" in line
    assert "pip install --upgrade transformers" in line
    shutil.rmtree("m")
    folder("llava_9", auto_map={"AutoConfig": "mine.Config"})
    Path("m/mine.py").write_text("raise SystemExit('this must never run')")
    assert "with --trust-remote-code it may be loaded" in refused(capsys)


def test_code_of_the_models_own_that_is_no_image_text_model(here, capsys, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(here / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", "modules")
    own = {"AutoConfig": "mine.Own", "AutoModelForCausalLM": "mine.Model"}
    folder("own", auto_map=own, visual={"depth": 2})
    code = "from transformers import PreTrainedConfig\nclass Own(PreTrainedConfig):\n"
    Path("m/mine.py").write_text(f"{code}    model_type = 'own'\n")
    # Where the code is kept once it was trusted.
    Path("modules").mkdir()
    main(["search", "--model", "m", *COMMANDS["search"], "--trust-remote-code"])
    line = capsys.readouterr().err
    assert "the code that comes with it offers no AutoModelForImageTextToText" in line
    assert not Path("deep").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "its config.json cannot be read"),
        ("{}", "its config.json cannot be read"),
        ('["llava"]', "its config.json cannot be read"),
        ('{"model_type": 3}', "its config.json cannot be read"),
    ],
)
def test_a_damaged_config(text, expected, here, capsys):
    Path("m").mkdir()
    Path("m/config.json").write_text(text)
    assert expected in refused(capsys)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (None, "there is no config.json; expected a model as save_pretrained writes it"),
        ("q4.gguf", "there is no config.json, but q4.gguf: GGUF weights"),
        ("onnx/model.onnx", "there is no config.json, but onnx/model.onnx: ONNX weights"),
        ("adapter_config.json", "adapter_config.json: a PEFT adapter: merge it"),
    ],
)
def test_folders_without_a_config(file, expected, here, capsys):
    Path("m/onnx").mkdir(parents=True)
    if file:
        Path("m", file).write_text("x")
    assert expected in refused(capsys)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (None, "there are no *.safetensors; expected"),
        ("q4.gguf", "there are no *.safetensors, but q4.gguf: GGUF weights"),
        ("model.onnx", "but model.onnx: ONNX weights"),
        ("onnx/model.onnx", "but onnx/model.onnx: ONNX weights"),
        ("pytorch_model.bin", "but pytorch_model.bin: pickled weights"),
    ],
)
def test_folders_without_safetensors(file, expected, here, capsys):
    whole()
    Path("m/model.safetensors").unlink()
    Path("m/onnx").mkdir()
    if file:
        Path("m", file).write_text("x")
    assert expected in refused(capsys)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["processor_config.json"], "no processor_config.json or preprocessor_config.json"),
        (["tokenizer.json"], "the folder has no tokenizer.json"),
        (
            ["processor_config.json", "tokenizer.json", "tokenizer_config.json"],
            "no processor_config.json or preprocessor_config.json and no tokenizer.json",
        ),
    ],
)
def test_missing_files_of_the_processor(files, expected, here, capsys):
    whole()
    for file in files:
        Path("m", file).unlink()
    line = refused(capsys)
    assert "no processor could be loaded: " in line and expected in line


def test_a_damaged_processor(here, capsys):
    whole()
    Path("m/tokenizer.json").write_text("{")
    assert "no processor could be loaded: " in refused(capsys)


def test_the_testbeds_questions_are_not_for_every_model(here, monkeypatch, capsys):
    """A model that is in order, but that knows other words."""
    whole()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    text = Path("m/tokenizer.json").read_text()
    Path("m/tokenizer.json").write_text(text.replace('"circle"', '"disc"'))
    assert main(["search", "--model", "m", "-o", "run"]) == 2
    assert "m does not speak the testbed's vocabulary" in capsys.readouterr().err
    assert not Path("run").exists()
