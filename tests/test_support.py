"""Models that cannot be pruned are refused by their configuration alone, before anything is done.

The expected reasons are written down here; the library reads most of them off the configurations.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.reproduction.training.build import build_processor
from vispco import PruningConfig
from vispco.commands import search
from vispco.commands.main import main
from vispco.models.support import candidates, check_supported, not_applicable
from vispco.testbed.model import build_config

CROSS, ENCODER = "cross-attention, its decoder never holds visual tokens", "encoder-decoder"
REFUSED = {
    **dict.fromkeys(["blip", "idefics", "mllama", "evolla"], CROSS),
    **dict.fromkeys(["florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop"], ENCODER),
    "vision-encoder-decoder": ENCODER,
    "diffusion_gemma": "diffusion",
    "pi0": "robotics",
    "mistral4": "a language model without a vision part",
    "git": "the prompt does not say where they are",
}
TYPES = list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def default(model_type):
    """The default configuration; no release of transformers has them all."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    return CONFIG_MAPPING[model_type]()


# ---- by configuration ----------------------------------------------------------------------------
@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_by_config_json_alone(model_type, tmp_path):
    config = default(model_type)
    config.save_pretrained(tmp_path)
    # Nothing else is there to be read.
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    if model_type == "vision-encoder-decoder":
        # Its default has no parts, and cannot be read back.
        read = config
    else:
        read = AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        check_supported(read)
    line = str(error.value)
    assert line.startswith(f"cannot prune {config.model_type!r} models: ")
    assert REFUSED[model_type] in line and "; choose a vision-language model" in line


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in REFUSED])
def test_all_other_image_text_models_pass(model_type):
    check_supported(default(model_type))


def test_every_image_text_model_is_in_one_of_two_lists():
    good, bad = candidates(), not_applicable()
    assert not good.keys() & bad.keys() and good.keys() | bad.keys() == {*TYPES}
    assert bad.keys() == {*TYPES} & REFUSED.keys()
    assert all(REFUSED[name] in reason for name, reason in bad.items())
    assert good["llava"] == "LlavaForConditionalGeneration"


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "qwen2_vl_text", "gemma3_text"])
def test_text_only(model_type):
    with pytest.raises(ValueError, match=f"'{model_type}' models: a language model without a vis"):
        check_supported(default(model_type))


def with_t5():
    text = transformers.T5Config()
    return transformers.Blip2Config(text_config=text)


def other_cross():
    """A newer family that says so, of whatever name."""
    config = default("mllama")
    config.model_type = "mllama9"
    return config


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (with_t5, ENCODER),
        (other_cross, CROSS),
        (lambda: default("clip"), "has no image-text-to-text class"),
        (lambda: default("siglip"), "AutoModelForImageTextToText"),
        (lambda: default("colqwen2"), "only its part 'vlm' .* a 'qwen2_vl' model"),
    ],
)
def test_other_configurations(build, reason):
    with pytest.raises(ValueError, match=reason):
        check_supported(build())


def test_classes_of_the_users_own():
    """They are in no list of transformers, and may be loaded by other means."""

    class Own(PreTrainedConfig):
        model_type = "own"

    check_supported(Own(visual={"depth": 2}))
    check_supported(Own(picture_token=7))
    for config in (Own(), Own(visual=None)):
        with pytest.raises(ValueError, match="'own' models: a language model without a vision"):
            check_supported(config)
    with pytest.raises(ValueError, match=ENCODER):
        check_supported(Own(visual={}, is_encoder_decoder=True))


def test_a_model_is_refused_as_its_configuration():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 9}
    config = transformers.LlamaConfig(**sizes, **heads)
    said = []
    for what in (config, transformers.LlamaForCausalLM(config)):
        with pytest.raises(ValueError) as error:
            check_supported(what)
        said.append(str(error.value))
    assert said[0] == said[1] and "'llama'" in said[0]
    with pytest.raises(ValueError, match="expected a model of Hugging Face .* got Linear"):
        check_supported(torch.nn.Linear(1, 1))


# ---- by the command line -------------------------------------------------------------------------
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
    build_config().save_pretrained("m")
    build_processor().save_pretrained("m")
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
