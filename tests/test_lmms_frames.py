"""Videos that a task of lmms-eval gives as frames. lmms-eval itself is not needed here."""

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BatchFeature

import vispco
from test_collate_media import real

torch.set_num_threads(1)


class Said:
    """A processor of lmms-eval's messages, of which only the times of the films are told."""

    def __init__(self, reads_times):
        self.reads_times = reads_times

    def apply_chat_template(self, said, processor_kwargs, **_):
        known = processor_kwargs["video_metadata"]
        known = known if isinstance(known, list) else [known]
        assert all(
            len(film.frames_indices) == len(said[0][0]["content"][0]["video"]) for film in known
        )
        rates = [film.fps for film in known] if self.reads_times else [0.0]
        ids = torch.zeros(1, 3, dtype=torch.long)
        return BatchFeature({"input_ids": ids, "rates": torch.tensor(rates)})

    def batch_decode(self, output, **_):
        return ["yes" for _ in output]


@pytest.fixture
def plugin(monkeypatch):
    """The plug-in for lmms-eval, without its libraries."""
    names = ("accelerate", "lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "tqdm")
    for name in (*names, "lmms_eval.protocol"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["accelerate"].Accelerator = sys.modules["tqdm"].tqdm = None
    sys.modules["lmms_eval.api.model"].lmms = object
    sys.modules["lmms_eval.protocol"].ChatMessages = lambda messages: types.SimpleNamespace(
        to_hf_messages=lambda: messages
    )
    spec = importlib.util.spec_from_file_location(
        "vispco.integrations.without_libraries",
        Path(vispco.__file__).parent / "integrations" / "lmms_eval.py",
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answered(plugin, processor, fps=None, video=None):
    """What the model gets of a task's question about a video: four frames, if nothing else."""
    model, got = object.__new__(plugin.VispcoModel), {}

    def generate(input_ids, **given):
        got.update(given, input_ids=input_ids)
        return input_ids

    model.processor, model.fps, model.max_num_frames, model.device = processor, fps, 4, "cpu"
    model.model = types.SimpleNamespace(dtype=torch.float32, generate=generate)
    video = [Image.new("LA", (64, 64))] * 4 if video is None else video
    content = [{"type": "video", "video": video}, {"type": "text", "text": "Why?"}]
    model.task_dict = {"t": {"test": [[{"role": "user", "content": content}]]}}
    assert model._answer([("", lambda said: said, {}, 0, "t", "test")]) == ["yes"]
    return got


def test_frames_that_a_task_gives(plugin):
    """Their rate is said, or the model reads no times, or they are refused."""
    assert answered(plugin, Said(True), fps=2.0)["rates"].tolist() == [2]
    assert "rates" in answered(plugin, Said(False))
    with pytest.raises(ValueError, match=r"^task t: Said tells .* as --model_args fps=2$"):
        answered(plugin, Said(True))
    with pytest.raises(ValueError, match="expected a video's file or a list of its frames"):
        answered(plugin, Said(True), 2.0, torch.zeros(4, 3, 8, 8))
    for bad in (0, "x", True, float("nan")):
        with pytest.raises(ValueError, match="fps must be a positive number"):
            plugin._rate(bad)


def test_a_task_s_pictures_are_those_of_calibration(plugin, tmp_path):
    """Given as a file or opened, taken sideways, with colours that transparency hides."""
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = Image.new("RGBA", (2, 1), (255, 0, 255, 0))
    clear.putpixel((0, 0), (0, 0, 0, 255))
    for name, image in (("a.png", clear), ("b.png", clear.convert("P"))):
        image.save(tmp_path / name, exif=turned)
        with Image.open(tmp_path / name) as opened:
            for given in (str(tmp_path / name), opened):
                seen = plugin._picture(given)
                assert seen.mode == "RGB" and seen.size == (1, 2)
                assert [seen.getpixel((0, y)) for y in (0, 1)] == [(0, 0, 0), (255, 255, 255)]
    assert plugin._picture("https://example.org/a.png") == "https://example.org/a.png"


@pytest.mark.parametrize(("fps", "times"), [(2.0, ["0.2", "1.2"]), (8.0, ["0.1", "0.3"])])
def test_a_real_processor_tells_the_times_of_a_task_s_frames(fps, times, plugin, monkeypatch):
    pytest.importorskip("torchvision")
    made_of, made_of.chat_template, words = real("Qwen3VLProcessor")
    monkeypatch.setattr(made_of, "batch_decode", lambda output, **_: ["yes"], raising=False)
    ids = answered(plugin, made_of, fps)["input_ids"]
    assert re.findall(words, made_of.tokenizer.decode(ids[0])) == times
    with pytest.raises(ValueError, match="^task t: Qwen3VLProcessor tells"):
        answered(plugin, made_of)
