"""What a batch holds besides words: each picture once, the times of videos, memory."""

import io
import json
import re
import sys
import warnings

import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from transformers import LlavaProcessor
from transformers.utils import is_torchvision_available

import vispco
from test_collate import CHATML, FAMILIES, TALKS, Films, family, processor, talk, tokenizer
from vispco import evaluate, testbed
from vispco.calibration import answer_logits, prepare
from vispco.data import Conversation, batches, collate, parse, prompt
from vispco.data.film import Film
from vispco.data.marks import BEGIN, END, marked, unmarked
from vispco.data.stills import load_processor
from vispco.utils.digest import of_batches

# The package has a function of that name too.
collate_module = sys.modules["vispco.data.collate"]


# ---- each picture once ---------------------------------------------------------------------------
@given(st.lists(st.tuples(st.text("ab \n", max_size=4), st.text("ab", max_size=4)), max_size=4))
def test_marks_come_out_where_they_were_put(pieces):
    text, answers = "", []
    for around, answer in pieces:
        text += around
        answers.append((len(text), len(text) + len(answer)))
        text += answer
    found = unmarked(marked(text, answers))
    assert found.text == text and found.answers == tuple(answers)
    assert marked(text, answers).count(BEGIN) == marked(text, answers).count(END) == len(pieces)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("turns", [1, 2, 6])
def test_every_picture_is_processed_once_however_many_turns_there_are(name, turns, monkeypatch):
    made_of, image = family(name)
    template, seen = CHATML.replace("<image>", image), []
    kind = type(made_of.image_processor)
    real = kind.preprocess

    def counted(self, images, *others, **options):
        seen.append(len([x for row in images for x in (row if isinstance(row, list) else [row])]))
        return real(self, images, *others, **options)

    monkeypatch.setattr(kind, "preprocess", counted)
    one = talk(("<image>What?", "yes"), *[("Why?", "no")] * (turns - 1))
    many = talk(*[("<image>What?", f"{i}") for i in range(turns)])
    made = collate(made_of, [one, many], chat_template=template)
    assert sum(seen) == 1 + turns
    learned = [made_of.tokenizer.decode(row[row != -100]) for row in made["labels"]]
    assert learned[1] == "".join(f"{i}<|im_end|>" for i in range(turns))
    # The processor is as it was.
    assert made_of.tokenizer("yes")["input_ids"] and collate(made_of, [one], chat_template=template)


def test_pixels_stand_in_the_order_of_the_questions():
    """A second picture that comes in a later turn has its own pixels."""
    made_of, image = family("qwen2_vl")
    files = []
    for size, colour in (((16, 24), "red"), ((32, 16), "blue")):
        file = io.BytesIO()
        Image.new("RGB", size, colour).save(file, "png")
        files.append(file.getvalue())
    turns = (("<image>colour?", "red"), ("<image>and now?", "blue"))
    both = Conversation(turns, tuple(files), "image", "/", "q.jsonl:1")
    template = CHATML.replace("<image>", image)
    made = collate(made_of, [both], chat_template=template)
    alone = [
        collate(
            made_of,
            [Conversation((turn,), (file,), "image", "/", "q")],
            chat_template=template,
        )
        for turn, file in zip(turns, files, strict=True)
    ]
    for key in ("pixel_values", "image_grid_thw"):
        assert torch.equal(made[key], torch.cat([batch[key] for batch in alone]))


def test_a_processor_that_does_not_know_its_patches_is_told_in_a_sentence():
    old = LlavaProcessor(
        processor("bytes", "chatml").image_processor, tokenizer("bytes"), chat_template=CHATML
    )
    with pytest.raises(ValueError, match=r"q\.jsonl:1: LlavaProcessor lacks patch_size and"):
        collate(old, TALKS[:1])


def test_very_many_tokens_are_told_once(monkeypatch):
    made_of, image = family("qwen2_vl")
    monkeypatch.setattr("vispco.data.process.MANY_TOKENS", 1)
    template = CHATML.replace("<image>", image)
    with pytest.warns(
        UserWarning, match=r"a picture gives \d+ visual tokens, and a question takes 0 MB"
    ):
        collate(made_of, TALKS[:1], chat_template=template)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collate(made_of, TALKS[:1], chat_template=template)


# ---- the times of videos -------------------------------------------------------------------------
class Timed(Films):
    """As `Films`; and it writes the seconds between two steps, as Qwen2.5-VL's processor does."""

    def __call__(self, text, videos=None, video_metadata=None, **options):
        made = super().__call__(text, videos, video_metadata=video_metadata, **options)
        known = video_metadata if isinstance(video_metadata, list) else [video_metadata]
        seconds = [2 / video.sampled_fps for video in known]
        return {**made, "second_per_grid_ts": torch.tensor(seconds)}


@pytest.fixture
def filmed(tmp_path):
    """From rows about frames in a folder to conversations."""
    (tmp_path / "film").mkdir()
    for i, example in enumerate(testbed.examples("test", 8)):
        Image.fromarray(example.image).save(tmp_path / "film" / f"{i}.png")
    asked = {"question": "what digit is at f6?", "answer": "6"}
    return lambda **row: parse({"video": "film", **asked, **row}, "q:3", tmp_path)


def test_the_rate_of_frames_reaches_the_model(filmed):
    model, own = testbed.load("testbed-qwen")
    made = collate(Timed(own), [filmed(fps=8), filmed(fps="0.5")], frames=4)
    assert made["second_per_grid_ts"].tolist() == [2 / 4, 2 / 0.25]
    # The row's own rate counts.
    made = collate(Timed(own), [filmed(fps=8), filmed()], frames=4, fps=1)
    assert made["second_per_grid_ts"].tolist() == [2 / 4, 2 / 0.5]
    assert prompt(Timed(own), filmed(), frames=4, fps=1)["second_per_grid_ts"].tolist() == [4]
    places = [
        model.model.get_rope_index(**{k: v for k, v in batch.items() if k not in OTHERS})[0][0]
        for batch in (collate(Timed(own), [filmed(fps=fps)], frames=4) for fps in (8, 0.5))
    ]
    assert not torch.equal(*places)


OTHERS = ("labels", "pixel_values_videos")


def test_times_that_nobody_knows_are_asked_for_if_the_model_reads_them(filmed, monkeypatch):
    own = testbed.load("testbed-qwen")[1]
    for read in (lambda p: collate(p, [filmed()]), lambda p: prompt(p, filmed())):
        assert "input_ids" in read(Films(own))
        with pytest.raises(ValueError, match=r'^q:3: Timed tells .* in the row \("fps": 2\) or as'):
            read(Timed(own))
    # Two frames may be one time: nothing is concluded from them.
    several, calls, real_call = Films(own), [], Films.__call__
    monkeypatch.setattr(Films, "__call__", lambda *a, **k: calls.append(1) or real_call(*a, **k))
    for frames, want in ((2, 3), (2, 6), (4, 9), (4, 10)):
        collate(several, [filmed()], frames=frames)
        assert len(calls) == want


def test_a_film_of_one_rate_is_the_same_at_another():
    frames = [Image.new("RGB", (4, 2))] * 2
    film = Film(frames, None, 10, [0, 9])
    assert film.metadata()["fps"] is None and film.sampled_fps is None
    known = film.at_rate(5)
    assert list(known) == frames and known.metadata() == {
        **film.metadata(),
        "fps": 5,
        "duration": 2,
    }


TIMES = {
    "Qwen2VLProcessor": (None, None),
    "Qwen2_5_VLProcessor": ("second_per_grid_ts", [15.0]),
    "Qwen3VLProcessor": ("text", ["4.3", "21.3", "38.5", "55.5"]),
    "Glm4vProcessor": ("text", ["0", "17", "34", "51"]),
    "Glm46VProcessor": ("text", ["0.0", "17.0", "34.2", "51.2"]),
    "VideoLlama3Processor": (
        "text",
        ["0.0", "8.6", "17.0", "25.6", "34.2", "42.8", "51.2", "59.8"],
    ),
    "Qwen2_5OmniProcessor": ("video_second_per_grid", [15.0]),
}


@pytest.mark.parametrize("name", TIMES)
def test_real_processors_tell_the_times_of_a_film(name, tmp_path):
    """A film of a minute at 5 frames a second, of which 8 are taken."""
    pytest.importorskip("torchvision")
    av = pytest.importorskip("av")
    made_of, template, words = real(name)
    with av.open(str(tmp_path / "film.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        for _ in range(300):
            file.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 32)))))
        file.mux(stream.encode())
    row = {"video": "film.mp4", "question": "What?", "answer": "yes"}
    for made in (
        collate(made_of, [parse(row, "q", tmp_path)], chat_template=template),
        prompt(made_of, parse(row, "q", tmp_path), chat_template=template),
    ):
        where, want = TIMES[name]
        if where == "text":
            text = made_of.tokenizer.decode(made["input_ids"][0])
            assert re.findall(words, text) == want
        elif where:
            assert made[where].tolist() == pytest.approx(want)
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    row["video"] = ["0.png"] * 8
    if where:
        with pytest.raises(ValueError, match="give the frames per second"):
            collate(made_of, [parse(row, "q", tmp_path)], chat_template=template)
    collate(made_of, [parse(row, "q", tmp_path)], chat_template=template, fps=2)


def real(name):
    """(processor, chat template, how it writes times) of a family that reads videos."""
    import transformers as hf

    tok, size = tokenizer("bytes"), {"shortest_edge": 784, "longest_edge": 65536}
    tokens = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokens |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
    tokens |= {"audio_token": "<|audio|>", "audio_bos_token": "<|a|>", "audio_eos_token": "<|/a|>"}
    if name.startswith("Glm"):
        signs = ("begin_of_image", "end_of_image", "image", "begin_of_video", "end_of_video")
        tok.add_tokens([f"<|{sign}|>" for sign in (*signs, "video")], special_tokens=True)
        kind = name.removesuffix("Processor")
        images, videos = (getattr(hf, f"{kind}{part}Processor")() for part in ("Image", "Video"))
        made_of = getattr(hf, name)(images, tok, videos)
        film = "<|begin_of_video|><|video|><|end_of_video|>"
        return made_of, with_films(film), r"<\|end_of_image\|>([\d.]+)"
    tok.add_tokens([*tokens.values(), "<|vision_start|>", "<|vision_end|>"], special_tokens=True)
    for key, word in tokens.items():
        setattr(tok, key, word)
        setattr(tok, f"{key}_id", tok.convert_tokens_to_ids(word))
    images, videos = hf.Qwen2VLImageProcessor(size=size), hf.Qwen2VLVideoProcessor(size=size)
    if name == "Qwen3VLProcessor":
        images = hf.Qwen2VLImageProcessor(patch_size=16, size=size)
        videos = hf.Qwen3VLVideoProcessor(size={"shortest_edge": 4096, "longest_edge": 65536})
    if name == "VideoLlama3Processor":
        images, videos = hf.VideoLlama3ImageProcessor(), hf.VideoLlama3VideoProcessor()
        made_of = hf.VideoLlama3Processor(images, tok, videos)
        return made_of, with_films("<|video_pad|>"), r"Time ([\d.]+)s:"
    parts = {"image_processor": images, "video_processor": videos, "tokenizer": tok}
    if "Omni" in name:
        parts["feature_extractor"] = hf.WhisperFeatureExtractor()
    film = "<|vision_start|><|video_pad|><|vision_end|>"
    return getattr(hf, name)(**parts), with_films(film), r"<([\d.]+) seconds>"


def with_films(film):
    part = "{% if p['type'] == 'video' %}" + film + "{% elif p['type'] == 'image' %}"
    return CHATML.replace("{% if p['type'] == 'image' %}", part)


# ---- held while there is room --------------------------------------------------------------------
def test_batches_are_made_when_they_are_looked_at(monkeypatch):
    made, real_collate = [], collate_module.collate
    monkeypatch.setattr(
        collate_module,
        "collate",
        lambda p, group: made.append(len(group)) or real_collate(p, group),
    )
    monkeypatch.setattr("vispco.utils.lazy.LARGE", 0)
    size = 3 * 16 * 16 * 4
    found = batches(processor("bytes", "chatml"), [TALKS[0]] * 5, 2, memory=2 * size)
    assert len(found) == 3 and not made
    assert [len(batch["input_ids"]) for batch in found] == made == [2, 2, 1]
    # The first one's pixels are held, those of the others are made again.
    assert [len(batch["pixel_values"]) for batch in found] == [2, 2, 1]
    assert made == [2, 2, 1, 2, 1]
    assert torch.equal(
        found[0]["labels"], real_collate(processor("bytes", "chatml"), TALKS[:1] * 2)["labels"]
    )
    shapes = found[1].outlines()["pixel_values"]
    assert shapes.shape == (2, 3, 16, 16) and shapes.untyped_storage().nbytes() == 4
    assert set(found[1]) == set(dict(found[1].items())) == set(found[1].without())
    assert "labels" not in found[1].without("labels")


def test_a_search_lets_pixels_go_once_the_tower_has_run(tmp_path, monkeypatch):
    """And finds the same, to the bit, as with all of them held."""
    monkeypatch.setattr("vispco.utils.lazy.LARGE", 0)
    model, own = testbed.load("testbed-llava")
    conversations = []
    for i, e in enumerate(testbed.examples("calibration", 12)):
        Image.fromarray(e.image).save(tmp_path / f"{i}.png")
        row = {"image": f"{i}.png", "question": e.question + "?", "answer": e.answer}
        conversations.append(parse(row, f"{i}", tmp_path))
    options = {"budgets": [0.5], "start": vispco.Gradient(steps=2), "refinement": 1}
    made = batches(own, conversations, 4, memory=0)
    held = [dict(batch.items()) for batch in made]
    (want,), (found,) = (vispco.search(model, b, **options).points for b in (held, made))
    assert (found.config, found.loss) == (want.config, want.loss)
    assert evaluate(model, made, want.config).kl == evaluate(model, held, want.config).kl
    # A search that is resumed compares these.
    assert of_batches(dict(batch.items()) for batch in made) == of_batches(held)
    roomy = batches(own, conversations, 4)
    prepared, room = prepare(model, roomy, keep_features=True), roomy[0]._held.room
    assert room.used == 12 * 3 * 64 * 64 * 4
    for left, batch in zip((8, 4, 0), prepared, strict=True):
        before = answer_logits(model, batch)
        assert room.used == left * 3 * 64 * 64 * 4
        assert torch.equal(answer_logits(model, batch), before)
    assert room.used == 0 and all("pixel_values" in batch for batch in roomy)


# ---- a clean machine -----------------------------------------------------------------------------
def test_a_processor_loads_for_still_pictures_without_torchvision(tmp_path):
    import transformers as hf

    made_of, _ = family("qwen2_vl")
    made_of.save_pretrained(tmp_path)
    hf.Qwen2_5_VLConfig().save_pretrained(tmp_path)
    held = json.loads((tmp_path / "processor_config.json").read_text())
    videos = {"video_processor_type": "Qwen2VLVideoProcessor", **held["image_processor"]}
    held |= {"processor_class": "Qwen2_5_VLProcessor", "video_processor": videos}
    (tmp_path / "processor_config.json").write_text(json.dumps(held))
    found = load_processor(str(tmp_path), local_files_only=True)
    assert type(found).__name__ == "Qwen2_5_VLProcessor"
    template = CHATML.replace("<image>", "<|image_pad|>")
    same = [collate(p, [TALKS[0]], chat_template=template) for p in (found, made_of)]
    # torchvision resizes in its own way.
    assert all(torch.allclose(same[0][key], same[1][key], atol=0.05) for key in same[1])
    # What is saved is whole, and names its class itself.
    found.save_pretrained(again := tmp_path / "again")
    assert json.loads((again / "processor_config.json").read_text()).keys() == held.keys()
    assert type(load_processor(str(again))).__name__ == "Qwen2_5_VLProcessor"
    if not is_torchvision_available():
        film = Conversation((("<video>Why?", "yes"),), ("a.mp4",), "video", "/", "q")
        with pytest.raises(ValueError, match=r'takes no video .*pip install "vispco\[qwen\]"'):
            collate(found, [film])


def test_a_processor_that_cannot_do_without_says_what_to_install(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise ImportError("\nX requires the Torchvision library but it was not found")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", missing)
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: False)
    with pytest.raises(ImportError, match=r'needs torchvision: pip install "vispco\[qwen\]"'):
        load_processor(str(tmp_path))
