"""A film through the real video processors, into tiny models: frames as methods see them."""

import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

import vispco
from test_collate import CHATML, tokenizer
from vispco import PruningConfig
from vispco.data import collate, parse
from vispco.registry import METHODS, build_method
from zoo import FAMILIES
from zoo.build import build

#: Eight frames, two a second: all grey but one.
FRAMES, RATE, RED = 8, 2, 5
#: Frames of the model, rows and columns of each, frames that differ from the one before them, and
#: tokens after a film.
SHAPES = {
    "qwen2_5_vl": (4, 2, 2, {2, 3}, 0),
    "qwen3_vl": (4, 2, 2, {2, 3}, 0),
    "llava_onevision": (8, 2, 2, {5, 6}, 1),
    "internvl": (8, 2, 2, {5, 6}, 0),
    "smolvlm": (8, 2, 2, {5, 6}, 0),
}
#: How the prompt tells when frames are shown, and what it says of these.
TIMES = {
    "qwen3_vl": (r"<([\d.]+) seconds>", ["0.2", "1.2", "2.2", "3.2"]),
    "internvl": (r"Frame(\d):", [*"12345678"]),
    "smolvlm": (r"Frame from 00:0(\d):", [*"00112233"]),
}


@pytest.fixture(scope="module", params=SHAPES)
def family(request):
    """(name, processor, its word for a film) of a family whose processor reads films."""
    pytest.importorskip("torchvision")
    if request.param == "smolvlm":
        pytest.importorskip("num2words")
    return request.param, *PROCESSORS[request.param](tokenizer("bytes"))


def qwen(tok, name):
    import transformers as hf

    words = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    more = {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
    special(tok, words | more)
    sizes = {"patch_size": 8, "size": {"shortest_edge": 256, "longest_edge": 65536}}
    images = hf.Qwen2VLImageProcessor(**sizes)
    films = hf.Qwen3VLVideoProcessor if name == "Qwen3VLProcessor" else hf.Qwen2VLVideoProcessor
    parts = {"image_processor": images, "video_processor": films(**sizes), "tokenizer": tok}
    return getattr(hf, name)(**parts), "<|vision_start|><|video_pad|><|vision_end|>"


def onevision(tok):
    import transformers as hf

    special(tok, {"image_token": "<image>", "video_token": "<video>"})
    square = {"height": 32, "width": 32}
    images = hf.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=[[32, 32]])
    films = hf.LlavaOnevisionVideoProcessor(size=square)
    own = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    made_of = hf.LlavaOnevisionProcessor(
        image_processor=images, tokenizer=tok, video_processor=films, **own
    )
    return made_of, "<video>"


def internvl(tok):
    import transformers as hf

    words = {"start_image_token": "<img>", "end_image_token": "</img>"}
    words |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    special(tok, words)
    square = {"height": 32, "width": 32}
    images = hf.GotOcr2ImageProcessor(size=square, crop_to_patches=False)
    films = hf.InternVLVideoProcessor(size=square)
    parts = {"image_processor": images, "video_processor": films, "tokenizer": tok}
    return hf.InternVLProcessor(**parts, image_seq_length=4), "<video>"


def smolvlm(tok):
    import transformers as hf

    words = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    words |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    special(tok, words)
    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}}
    images = hf.SmolVLMImageProcessor(**sizes, do_image_splitting=False)
    films = hf.SmolVLMVideoProcessor(**sizes)
    return hf.SmolVLMProcessor(images, tok, films, image_seq_len=4), "<video>"


PROCESSORS = {
    "qwen2_5_vl": lambda tok: qwen(tok, "Qwen2_5_VLProcessor"),
    "qwen3_vl": lambda tok: qwen(tok, "Qwen3VLProcessor"),
    "llava_onevision": onevision,
    "internvl": internvl,
    "smolvlm": smolvlm,
}
SQUARE = {"image_size": 32, "patch_size": 8}
VISION = {
    "qwen2_5_vl": {"patch_size": 8, "window_size": 32},
    "qwen3_vl": {"patch_size": 8},
    "llava_onevision": SQUARE,
    "internvl": {"image_size": [32, 32], "patch_size": [8, 8]},
    "smolvlm": SQUARE,
}


def special(tok, words):
    """Adds special tokens, under the names by which a processor finds them."""
    tok.add_tokens([*words.values()], special_tokens=True)
    for name, word in words.items():
        setattr(tok, name, word)
        setattr(tok, f"{name}_id", tok.convert_tokens_to_ids(word))


def model_for(name, processor):
    """A tiny model of the family, whose tower and token ids fit the processor."""
    entry, tok = FAMILIES[name], processor.tokenizer
    ids = {
        kind: tok.convert_tokens_to_ids(getattr(processor, f"{kind}_token"))
        for kind in ("image", "video")
        if getattr(processor, f"{kind}_token", None)
    }
    if name in ("internvl", "smolvlm"):
        # Their frames are pictures.
        ids.pop("video", None)
    top = {f"{kind}_token_{'index' if 'llava' in name else 'id'}": i for kind, i in ids.items()}
    if "qwen" in name:
        top |= {
            f"vision_{end}_token_id": getattr(tok, f"vision_{sign}_token_id")
            for end, sign in (("start", "bos"), ("end", "eos"))
        }
    own = {
        "llava_onevision": {"image_grid_pinpoints": [[32, 32]]},
        "internvl": {"image_seq_length": 4},
    }
    return build(
        replace(
            entry,
            text={**entry.text, "vocab_size": len(tok)},
            vision={**entry.vision, **VISION[name]},
            top={**entry.top, **own.get(name, {}), **top},
        )
    )


class Seen(type(build_method("evs"))):
    """EVS, which notes where the tokens stand that are about to enter a layer."""

    grids = []

    def score(self, ctx):
        self.grids.append(ctx.grid[0][ctx.valid[0]])
        return super().score(ctx)


def film(tmp_path):
    """One question about the film, its frames as files of 32x32 pixels."""
    for i in range(FRAMES):
        colour = (200, 30, 30) if i == RED else (128, 128, 128)
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{i}.png")
    row = {"video": [f"{i}.png" for i in range(FRAMES)], "fps": RATE}
    return parse({**row, "question": "What?", "answer": "yes"}, "q", tmp_path)


@torch.no_grad()
def test_frames_of_a_film_are_the_frames_that_methods_see(family, tmp_path, monkeypatch):
    name, processor, word = family
    part = "{% if p['type'] == 'video' %}" + word + "{% elif p['type'] == 'image' %}"
    template = CHATML.replace("{% if p['type'] == 'image' %}", part)
    batch = collate(processor, [film(tmp_path)], frames=FRAMES, chat_template=template)
    words, times = TIMES.get(name, ("<no times>", []))
    assert re.findall(words, processor.tokenizer.decode(batch["input_ids"][0])) == times
    if name == "qwen2_5_vl":
        assert batch["second_per_grid_ts"].tolist() == [2 / RATE]
    model = model_for(name, processor)
    frames, rows, columns, odd, after = SHAPES[name]
    tokens = frames * rows * columns + after
    # EVS keeps the first frame, and those that differ from the one before them.
    first = after + rows * columns * (1 + len(odd))
    monkeypatch.setattr(Seen, "grids", [])
    vispco.register_method("seen")(Seen)
    layers = model.config.text_config.num_hidden_layers
    ratios = [first / tokens, *[(first - 1) / tokens] * (layers - 1)]
    try:
        with vispco.apply(model, PruningConfig("seen", ratios)):
            model(**batch)
    finally:
        METHODS.remove("seen")
    whole, kept = Seen.grids
    places = [[f, r, c] for f in range(frames) for r in range(rows) for c in range(columns)]
    assert whole.tolist() == places + [[frames - 1, rows - 1, columns]] * after
    assert set(kept[:, 0].tolist()) == {0, *odd, *[frames - 1] * after}
    assert len(kept) == first
