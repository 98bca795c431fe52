"""The video task: clips, their questions and answers, and testbed-qwen-video."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vispco
from reproduction import video as figures
from reproduction.training.pack import positions
from reproduction.training.video import train
from reproduction.training.video.batches import clip_batch, truths
from vispco import PruningConfig, data, testbed
from vispco.data.stills import without_videos
from vispco.testbed import clips, video
from vispco.testbed.images import image_inputs, video_inputs
from vispco.testbed.model import FOLDER, IMAGE_TOKENS, VIDEO
from vispco.testbed.vocab import QWEN_WORDS, VIDEO_ID, VIDEO_WORDS

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 70, 220),
    "yellow": (235, 205, 40),
    "black": (25, 25, 25),
}


@pytest.fixture(scope="module")
def model():
    return testbed.load(VIDEO)[0]


# ---- the clips, read from their pixels -----------------------------------------------------------
def shape_of(ink):
    """The name of a silhouette (8, 8) bool, from the widths of its rows."""
    widths = [int(w) for w in ink.sum(1) if w]
    if len(set(widths)) == 1:
        return "rectangle"
    if widths == sorted(widths):
        return "triangle"
    return "cross" if len(set(widths)) == 2 else "circle"


def seen(frames):
    """{shape: [(moment, row, column, colour)]} of a clip (16, 40, 40, 3). Digits never leave."""
    mean = frames.reshape(-1, 2, 40, 40, 3).mean(1)
    cells = mean.reshape(-1, 5, 8, 5, 8, 3).swapaxes(2, 3)  # (8, 5, 5, 8, 8, 3)
    paper = np.median(mean, axis=(1, 2))[:, None, None, None, None]
    ink = np.abs(cells - paper).max(-1) > 60
    there = ink.any((3, 4))
    there &= ~there.all(0)
    found = {}
    for moment, row, column in np.argwhere(there):
        mask = ink[moment, row, column]
        colour = cells[moment, row, column][mask].mean(0)
        nearest = min(COLOURS, key=lambda name: np.abs(colour - COLOURS[name]).sum())
        found.setdefault(shape_of(mask), []).append((moment, row, column, nearest))
    return found


def answer(question, found):
    """What the question's answer is, of what was seen."""
    words = question.split()
    if question == "count every shape":
        return str(len(found))
    if question.startswith("what shape came"):
        began = {shape: track[0][0] for shape, track in found.items()}
        return (min if words[-1] == "first" else max)(began, key=began.get)
    track = found[words[-1]]
    if words[0] == "where":
        (_, r, c, _), (_, row, column, _) = track[0], track[-1]
        if row != r:
            return "south" if row > r else "north"
        return "east" if column > c else "west"
    return track[0 if words[1] == "first" else -1][3]


def test_answers_are_what_the_pixels_show():
    items = video.examples("test", 120)
    for item in items:
        found = seen(item.frames)
        for track in found.values():
            # One shape, one cell a moment, without a gap.
            moments = [moment for moment, *_ in track]
            assert moments == list(range(moments[0], moments[0] + len(moments)))
        assert answer(item.question, found) == item.answer
    assert Counter(item.task for item in items) == dict.fromkeys(video.TASKS, 30)


def test_the_same_arguments_give_the_same_clips_and_splits_differ():
    first, again = (video.examples("test", 8, seed=3) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.frames, b.frames) and (a.question, a.answer) == (
            b.question,
            b.answer,
        )
    for other in (video.examples("calibration", 8, seed=3), video.examples("test", 8, seed=4)):
        assert not any(np.array_equal(a.frames, b.frames) for a in first for b in other)
    pools = [
        set(clips.sample(np.random.default_rng(0), 50, s).writing.ravel()) - {-1}
        for s in testbed.SPLITS
    ]
    assert not any(a & b for a in pools for b in pools if a is not b)


def test_no_answer_is_common():
    items = video.examples("train", 400)
    for task in video.TASKS:
        answers = Counter(item.answer for item in items if item.task == task)
        assert max(answers.values()) < 0.4 * sum(answers.values())


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="split must be one of"):
        video.examples("validation")
    with pytest.raises(ValueError, match="n must be at least 1"):
        video.examples(n=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        video.batches(batch_size=0)
    with pytest.raises(ValueError, match="at least one example"):
        video.collate([])
    with pytest.raises(ValueError, match="padding_side must be"):
        video.collate(video.examples(n=1), "middle")
    with pytest.raises(ValueError, match="must divide the clip's 8"):
        video.fewer_frames(video.examples(n=1)[0], 3)


def test_fewer_frames_are_moments_of_the_clip():
    item = video.examples(n=1)[0]
    for moments, kept in ((8, range(8)), (4, [1, 3, 5, 7]), (2, [2, 6]), (1, [4])):
        short = video.fewer_frames(item, moments)
        want = np.concatenate([item.frames[2 * m : 2 * m + 2] for m in kept])
        assert np.array_equal(short.frames, want) and short.seconds == 4 / moments
    made = video.collate([video.fewer_frames(item, 4)])
    assert made["video_grid_thw"].tolist() == [[4, 10, 10]]
    assert made["second_per_grid_ts"].tolist() == [1.0]
    assert int((made["mm_token_type_ids"] == 2).sum()) == 100


def test_what_a_faultless_reader_of_fewer_frames_can_answer():
    items = video.examples("test", 120)
    assert all(figures.readable(item, 8) == 1 for item in items)
    sure = 0
    for item in items:
        short = video.fewer_frames(item, 4)
        found = figures.readable(item, 4)
        # Read from the pixels, where they show more than one shape and leave nothing open.
        if found in (0, 1) and item.task != "motion":
            sure += 1
            assert (answer(item.question, seen(short.frames)) == item.answer) == found
    assert sure > 60


# ---- inputs --------------------------------------------------------------------------------------
def test_a_still_clip_is_a_picture(model):
    picture = testbed.examples("test", 1)[0].image
    still, one = video_inputs([np.stack([picture] * 4)]), image_inputs("testbed-qwen", [picture])
    assert torch.equal(still["pixel_values_videos"], one["pixel_values"].repeat(2, 1))
    assert still["video_grid_thw"].tolist() == [[2, 16, 16]]
    with torch.no_grad():
        (film,) = model.model.get_video_features(**still, return_dict=True).pooler_output
        (image,) = model.model.get_image_features(**one, return_dict=True).pooler_output
    assert torch.allclose(film, image.repeat(2, 1), atol=1e-4)


def test_inputs_are_those_of_the_real_video_processor():
    pytest.importorskip("torchvision")
    from transformers import Qwen2VLVideoProcessor

    item = video.examples(n=1)[0]
    sizes = {"size": {"shortest_edge": 64, "longest_edge": 65536}, "patch_size": 4}
    processor = Qwen2VLVideoProcessor(**sizes, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    made = processor([torch.from_numpy(item.frames).permute(0, 3, 1, 2)], do_sample_frames=False)
    ours = video_inputs([item.frames])
    assert torch.equal(torch.as_tensor(made["video_grid_thw"]), ours["video_grid_thw"])
    assert torch.allclose(made["pixel_values_videos"], ours["pixel_values_videos"], atol=1e-5)


def test_a_clip_of_a_users_row_becomes_the_tasks_inputs(tmp_path):
    """Through the processor that was saved where torchvision is not, and read where it is."""
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor, Qwen2_5_VLProcessor

    stills = without_videos(Qwen2_5_VLProcessor)
    stills.from_pretrained(FOLDER / VIDEO).save_pretrained(tmp_path)
    item = video.examples(n=1)[0]
    for i, frame in enumerate(item.frames):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    row = {"video": [f"{i}.png" for i in range(16)], "fps": 2 / item.seconds}
    row |= {"question": item.question, "answer": item.answer}
    asked = data.parse(row, "q.jsonl:1", tmp_path)
    made = data.collate(AutoProcessor.from_pretrained(tmp_path), [asked], frames=16)
    want = video.collate([item])
    for key in want:
        assert torch.allclose(torch.as_tensor(made[key]), want[key], atol=1e-5), key


def test_positions_in_training_are_those_of_the_model(model):
    batch = video.collate(video.examples(n=1), with_answers=False)
    given = {key: value for key, value in batch.items() if not key.startswith("pixel")}
    want = model.model.get_rope_index(**given)[0][:, 0]
    words = torch.arange(want.shape[1] - 202)
    assert torch.equal(positions(IMAGE_TOKENS["testbed-qwen"], 5, 5, words, 8), want)


def test_what_tokens_should_know_is_what_happens():
    rng = np.random.default_rng(0)
    drawn, packed = clip_batch(rng, ["first", "number"], 6)
    thing, colour, rank, now, way, first = (t.reshape(6, 8, 25) for t in truths(drawn))
    for n, frames in enumerate(packed.images):
        found = seen(frames)
        order = sorted(found, key=lambda shape: found[shape][0][0])
        assert int((thing[n] > 0).sum() - (thing[n] == 5).sum()) == sum(map(len, found.values()))
        for shape, track in found.items():
            for i, (moment, row, column, name) in enumerate(track):
                at = n, moment, 5 * row + column
                assert shape_number(thing[at]) == shape and [*COLOURS][colour[at] - 1] == name
                assert rank[at] == order.index(shape) + 1
                assert [*COLOURS][first[at] - 1] == track[0][3]
                moved = (row, column) != track[0][1:3]
                assert (way[at] > 1) == moved
                assert (now[at] > 1) == ((row, column) != track[max(i - 1, 0)][1:3])
                if moved:
                    assert ["north", "south", "west", "east"][way[at] - 2] == answer(
                        f"where goes the {shape}", {shape: track}
                    )


def shape_number(number):
    return ("circle", "rectangle", "triangle", "cross")[number - 1]


# ---- the model -----------------------------------------------------------------------------------
def test_the_video_model_is_a_small_thing_of_its_own(model):
    folder = FOLDER / VIDEO
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4.2e6
    assert VIDEO not in testbed.MODELS
    base = testbed.load("testbed-qwen")[0]
    # Its tower is that of testbed-qwen; its words come after those.
    for name, weight in base.model.visual.state_dict().items():
        assert torch.equal(weight, model.model.visual.state_dict()[name])
    assert VIDEO_WORDS[: len(QWEN_WORDS)] == QWEN_WORDS
    tokenizer = testbed.load(VIDEO)[1].tokenizer
    asked = "what first colour has the circle"
    assert tokenizer(asked)["input_ids"] == [VIDEO_ID[word] for word in asked.split()]


def test_it_answers_about_clips(model):
    record = vispco.evaluate(model, video.batches("test", n=64))
    assert record.accuracy >= 0.9
    blind = PruningConfig("vtw", [0.0] * 16)
    assert vispco.evaluate(model, video.batches("test", n=32), blind).accuracy <= 0.6


@torch.no_grad()
def test_pruning_a_clip_is_dropping_tokens_by_hand(model):
    batch = video.collate(video.examples(n=1), with_answers=False)
    given = {k: v for k, v in batch.items() if not k.startswith("pixel")}
    places = model.model.get_rope_index(**given)[0]
    pixels = {k: batch[k] for k in ("pixel_values_videos", "video_grid_thw")}
    (features,) = model.model.get_video_features(**pixels, return_dict=True).pooler_output
    # The first moment, then what differs most from the same place a moment earlier.
    moments = torch.nn.functional.normalize(features, dim=-1).view(8, 25, -1)
    change = 1 - (moments[1:] * moments[:-1]).sum(-1).flatten()
    kept = torch.cat([torch.arange(25), 25 + change.topk(25).indices.sort().values])
    index = torch.cat([torch.tensor([0]), 1 + kept, torch.arange(201, places.shape[-1])])
    embedded = model.get_input_embeddings()(batch["input_ids"])
    embedded[0, 1:201] = features
    hidden = model.model.language_model(
        inputs_embeds=embedded[:, index], position_ids=places[:, :, index]
    )
    by_hand = model.lm_head(hidden.last_hidden_state[:, -1])
    with vispco.apply(model, PruningConfig("evs", [50 / 200] * 16)):
        pruned = model(**batch, logits_to_keep=1).logits[:, -1]
    assert torch.allclose(pruned, by_hand, atol=1e-3)
    assert not torch.allclose(pruned, model(**batch, logits_to_keep=1).logits[:, -1], atol=1e-2)


# ---- the figures ---------------------------------------------------------------------------------
def test_figures_are_at_equal_flops(tmp_path):
    found = figures.measure(4, layer=4, methods=("evs", "fastv"))
    rows = {(r["method"], r["kind"], r["share"]): r for r in found["rows"]}
    assert len(rows) == len(found["rows"]) == 1 + 3 * (2 + 4)
    for share in figures.SHARES:
        fewer, evs, fastv = (rows[m, "equal", share] for m in (figures.FEWER, "evs", "fastv"))
        assert evs["tokens"] == fewer["tokens"] == [200 * share] * 16
        assert evs["flops"] == fewer["flops"]
        assert (
            fastv["tokens"][0] == 200 and 0.97 * fewer["flops"] < fastv["flops"] <= fewer["flops"]
        )
        assert rows["evs", "same", share]["tokens"] == [200] * 4 + [200 * share] * 12
    for row in found["rows"]:
        if row["method"] == figures.READER:
            continue
        right = [c == "1" for c in row["right"]]
        assert row["accuracy"]["mean"] == pytest.approx(sum(right) / 4)
    text = figures.tables(found)
    assert text.count("| fewer frames |") == 3 and text.count("| fastv |") == 4
    assert figures.main(["--output", str(tmp_path / "none.json"), "--table"]) == 2


def test_the_page_has_the_figures_of_the_file():
    docs = Path(__file__).parent.parent / "docs"
    found = json.loads((docs / "results" / "video" / "testbed-qwen-video.json").read_text())
    assert found["questions"] == 256
    assert figures.tables(found) in (docs / "video.md").read_text(encoding="utf-8")


# ---- training ------------------------------------------------------------------------------------
@pytest.mark.slow
def test_training_that_was_stopped_goes_on_as_if_it_had_not(tmp_path, monkeypatch):
    sizes = {"steps": 2, "clips": 2, "questions": 3, "boards": 2, "every": 1, "save-every": 1}
    small = ["--no-bf16", "--resume", *(f"--{name}={size}" for name, size in sizes.items())]
    whole, parts = (
        train.parser().parse_args([*small, "--output", str(tmp_path / name)])
        for name in ("whole", "parts")
    )
    want = train.train(whole, train.Training).state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "step", stopped(train.Training.step))
        with pytest.raises(KeyboardInterrupt):
            train.train(parts, train.Training)
    found = train.train(parts, train.Training).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in want.items())


def stopped(step):
    def once(run, number):
        if number:
            raise KeyboardInterrupt
        return step(run, number)

    return once
