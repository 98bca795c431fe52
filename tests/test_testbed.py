"""The testbed.

Scenes, questions against a brute-force solver, batches, processors, and the shipped checkpoints.
"""

from __future__ import annotations

import hashlib
import os
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from tests.reproduction.training import evaluate, state
from tests.reproduction.training.batches import board_batch
from tests.reproduction.training.build import build_model, build_processor
from tests.reproduction.training.curriculum import Curriculum
from tests.reproduction.training.pack import forward
from tests.reproduction.training.recipe import RECIPES
from vispco import testbed
from vispco.data.stills import load_processor
from vispco.testbed import questions, scenes, vocab
from vispco.testbed.data import Example, generate
from vispco.testbed.model import EMBEDDED, FOLDER, IMAGE_TOKENS, build_config

torch.set_num_threads(1)
models = pytest.mark.parametrize("name", EMBEDDED)
STEPS = {"north": (0, -1), "west": (-1, 0)}


# ---------------------------------------------------------------- an independent solver


class Board:
    """One board as a plain dictionary {(column, row): (colour, shape or digit)}."""

    def __init__(self, boards: scenes.Scenes, index: int):
        self.cells = {}
        for cell in range(64):
            if boards.colour[index, cell] < 0:
                continue
            shape = boards.shape[index, cell]
            thing = str(boards.digit[index, cell]) if shape == scenes.DIGIT else vocab.SHAPES[shape]
            self.cells[(cell % 8, cell // 8)] = (vocab.COLOURS[boards.colour[index, cell]], thing)

    def where(self, words: list[str]):
        """["at", "c5"] or ["west", "of", "c5"] -> coordinates."""
        column, row = "abcdefgh".index(words[-1][0]), int(words[-1][1]) - 1
        dx, dy = STEPS.get(words[0], (0, 0))
        return column + dx, row + dy

    def attribute(self, name: str, where) -> str:
        colour, thing = self.cells[where]
        assert name == "colour" or (name == "digit") == thing.isdigit()
        return colour if name == "colour" else thing

    def colour(self, words: list[str]) -> str:
        """The colour that words name.

        ["red"], ["the", "colour", "at", "c5"] or ["the", "colour", "west", "of", "c5"] -> "red".
        """
        return words[0] if len(words) == 1 else self.attribute("colour", self.where(words[2:]))

    def solve(self, text: str) -> str:
        w = text.split()
        # Count every S in COLOUR.
        if w[0] == "count":
            colour = self.colour(w[4:])
            return str(sum(c == colour and w[2] in (t, "object") for c, t in self.cells.values()))
        # Is there more C than COLOUR.
        if w[:3] == ["is", "there", "more"]:
            first, second = (
                sum(c == k for c, _ in self.cells.values()) for k in (w[3], self.colour(w[5:]))
            )
            assert abs(first - second) >= 2
            return "yes" if first > second else "no"
        # Is there a S in COLOUR.
        if w[0] == "is":
            return "yes" if (self.colour(w[5:]), w[3]) in self.cells.values() else "no"
        # What A is in COLOUR.
        if w[3] == "in":
            colour = self.colour(w[4:])
            found = [
                t
                for c, t in self.cells.values()
                if c == colour and t.isdigit() == (w[1] == "digit")
            ]
            assert len(found) == 1, "the question has no unique object"
            return found[0]
        # What A is D of the S in COLOUR.
        if "in" in w:
            kind = (self.colour(w[8:]), w[6])
            (anchor,) = [place for place, thing in self.cells.items() if thing == kind]
            return self.attribute(w[1], (anchor[0] + STEPS[w[3]][0], anchor[1] + STEPS[w[3]][1]))
        return self.attribute(w[1], self.where(w[3:]))


@pytest.mark.parametrize("family", questions.FAMILIES)
def test_every_answer_is_what_a_brute_force_solver_finds(family):
    boards, tokens, answers = generate(np.random.default_rng(5), family, 60, "test")
    for index in range(60):
        text = " ".join(vocab.WORDS[t] for t in tokens[index])
        assert Board(boards, index).solve(text) == vocab.WORDS[answers[index]], text


def test_families_cover_the_tasks():
    shares = {}
    for family in questions.FAMILIES.values():
        shares[family.task] = shares.get(family.task, 0) + family.share
        assert all(name in questions.FAMILIES for name in family.after)
    assert set(shares) == set(testbed.TASKS) - {"easy_vqa"}
    assert all(abs(total - 1) < 1e-9 for total in shares.values())


def test_pictures_show_the_boards():
    """Every object's strongest pixel has the object's colour; every empty cell is plain paper."""
    rng = np.random.default_rng(0)
    boards = scenes.sample(rng, 20, "test")
    cells = (
        scenes.render(rng, boards)
        .reshape(20, 8, 8, 8, 8, 3)
        .swapaxes(2, 3)
        .reshape(20, 64, 64, 3)
        .astype(float)
    )
    away = abs(cells - np.median(cells[boards.colour < 0], axis=(0, 1))).sum(
        -1
    )  # (20, 64, 64 pixels)
    assert away[boards.colour < 0].max() < 110
    strongest = np.take_along_axis(cells, away.argmax(2)[..., None, None], axis=2)[:, :, 0]
    nearest = abs(strongest[:, :, None] - scenes._RGB).sum(-1).argmin(-1)
    shape = (boards.colour >= 0) & (boards.shape != scenes.DIGIT)
    assert (nearest == boards.colour)[shape].mean() == 1.0


# ---------------------------------------------------------------- training that was killed


def _parts(seed: int):
    torch.manual_seed(seed)
    module = torch.nn.Linear(3, 2)
    optim = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optim.step()
    return {"model": module}, [optim]


def _state(modules, optims) -> list:
    return [
        *modules["model"].parameters(),
        *(v for s in optims[0].state_dict()["state"].values() for v in s.values()),
    ]


@pytest.mark.parametrize("written", [0, 1, 2])
def test_training_killed_while_it_saves_goes_on_from_the_last_whole_state(
    written, tmp_path, monkeypatch
):
    """The tensors of one step never go with the step number of another.

    There is no third file in the end.
    """
    states = [_parts(seed) for seed in range(2)]
    log = [{"step": 1, "tasks": {"easy_vqa": 0.5}}]
    state.save_state(tmp_path / "state", 1, *states[0], Curriculum(), log)
    replace, left = os.replace, [written]

    def replaced(*paths):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(*paths)

    monkeypatch.setattr(os, "replace", replaced)
    if written < 2:
        with pytest.raises(KeyboardInterrupt):
            state.save_state(tmp_path / "state", 2, *states[1], Curriculum(), [*log, *log])
    else:
        state.save_state(tmp_path / "state", 2, *states[1], Curriculum(), [*log, *log])
    fresh = _parts(2)
    step, entries = state.load_state(tmp_path / "state", *fresh, Curriculum())
    assert step == len(entries) == 1 + (written == 2)
    assert all(
        torch.equal(a, b) for a, b in zip(_state(*fresh), _state(*states[step - 1]), strict=True)
    )
    left[0] = 2
    state.save_state(tmp_path / "state", 3, *states[0], Curriculum(), log)
    assert len(list((tmp_path / "state").iterdir())) == 2


def test_a_training_state_whose_tensors_were_damaged_is_refused(tmp_path):
    state.save_state(tmp_path / "state", 1, *_parts(0), Curriculum(), [])
    (path,) = (tmp_path / "state").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    # One bit of a number: safetensors would not notice.
    data[-1] ^= 1
    path.write_bytes(data)
    message = (
        f"state: expected the state of this training, but {path.name} is damaged; "
        "train without --resume"
    )
    with pytest.raises(ValueError, match=message):
        state.load_state(tmp_path / "state", *_parts(1), Curriculum())


# ---------------------------------------------------------------- examples and splits


def _digest(items) -> set[str]:
    return {hashlib.sha256(item.image.tobytes()).hexdigest() for item in items}


def test_splits_are_disjoint():
    digits = [set(scenes.digit_pool(split).tolist()) for split in testbed.SPLITS]
    assert sum(map(len, digits)) == len(set.union(*digits)) == 1797
    ink = scenes.handwriting()[0]
    train = {ink[i].tobytes() for i in digits[0]}
    assert not train & {ink[i].tobytes() for i in digits[2]}
    seen = [_digest(testbed.examples(split, 160, seed=0)) for split in testbed.SPLITS]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    from vispco.testbed import easyvqa

    paths = [set(easyvqa.load(split).paths) for split in testbed.SPLITS]
    assert len(set.union(*paths)) == sum(map(len, paths)) == 5000


def test_examples_are_deterministic_and_balanced():
    first = testbed.examples("test", 512, seed=3)
    again, other = testbed.examples("test", 512, seed=3), testbed.examples("test", 512, seed=4)
    same = [
        np.array_equal(a.image, b.image) and a.question == b.question
        for a, b in zip(first, again, strict=True)
    ]
    assert all(same) and [x.answer for x in first] == [x.answer for x in again]
    assert [x.question for x in first] != [x.question for x in other]
    assert [sum(x.task == task for x in first) for task in testbed.TASKS] == [64] * 8
    item = first[0]
    assert item.image.shape == (64, 64, 3) and item.image.dtype == np.uint8
    known = set(vocab.WORDS)
    assert all(set(x.question.split()) <= known and x.answer in known for x in first)


def test_a_task_keeps_its_examples_when_asked_alone():
    mixed = [x.question for x in testbed.examples("test", 80, seed=1) if x.task == "count"]
    alone = [x.question for x in testbed.examples("test", 10, seed=1, tasks=("count",))]
    assert sorted(mixed) == sorted(alone)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: testbed.examples("dev"), "calibration"),
        (lambda: testbed.examples(tasks=("ocr",)), "easy_vqa"),
        (lambda: testbed.examples(n=0), "at least 1"),
        (lambda: testbed.batches(batch_size=0), "at least 1"),
        (lambda: testbed.collate([]), "at least one"),
        (lambda: testbed.collate(testbed.examples(n=1), padding_side="top"), "left"),
        (lambda: testbed.load("llava-7b"), "testbed-llava"),
        (lambda: testbed.collate(testbed.examples(n=1), model="qwen"), "testbed-qwen"),
        (lambda: testbed.enlarge(testbed.examples(n=1), 64, 70), "multiples of 8"),
        (lambda: testbed.enlarge(testbed.examples(n=1), 64, 56), "from 64 and 64"),
        (lambda: testbed.collate(testbed.enlarge(testbed.examples(n=1), 64, 72)), "testbed-qwen"),
        (
            lambda: testbed.collate(
                [Example(np.zeros((64, 60, 3), np.uint8), "a", "b", "c")], model="testbed-qwen"
            ),
            "64x60",
        ),
    ],
)
def test_bad_input_says_what_is_valid(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_enlarged_examples_keep_their_board():
    items = testbed.examples("test", 8)
    bigger = testbed.enlarge(items, 72, 88)
    for small, big in zip(items, bigger, strict=True):
        assert big.image.shape == (72, 88, 3) and big.image.dtype == np.uint8
        assert np.array_equal(big.image[:64, :64], small.image)
        assert big.image[64:].min() > 150 and big.image[:, 64:].min() > 150
        assert (big.question, big.answer, big.task) == (small.question, small.answer, small.task)
    again = testbed.enlarge(items, 72, 88)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(bigger, again, strict=True))


# ---------------------------------------------------------------- batches and processors


@models
@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_layout(side, name):
    items = testbed.examples("test", 16)
    if name == "testbed-qwen":
        items = items[:8] + testbed.enlarge(items[8:], 72, 80)
    batch, spec = testbed.collate(items, side, model=name), IMAGE_TOKENS[name]
    for row, item in enumerate(items):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        image = [spec.image] * (64 if item.image.shape[0] == 64 else 90)
        prompt = [*spec.before, *image, *spec.after] + [vocab.ID[w] for w in item.question.split()]
        answer = [vocab.ID[item.answer], vocab.ID[vocab.EOS]]
        assert ids == prompt + answer
        labels = batch["labels"][row]
        assert labels[labels != -100].tolist() == answer
        assert torch.equal(labels[labels != -100], batch["input_ids"][row][labels != -100])
        padded = batch["attention_mask"][row][0 if side == "left" else -1] == 0
        assert bool(padded) == (len(ids) < batch["input_ids"].shape[1])
    if name == "testbed-qwen":
        assert batch["pixel_values"].shape == (4 * 8 * (64 + 90), 2 * 3 * 4 * 4)
        assert batch["image_grid_thw"].tolist() == [[1, 16, 16]] * 8 + [[1, 18, 20]] * 8
        assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == spec.image)
    else:
        assert batch["pixel_values"].shape == (16, 3, 64, 64)


@models
def test_batches_follow_the_examples(name):
    got = testbed.batches(
        "calibration", n=40, batch_size=16, seed=2, padding_side="right", model=name
    )
    assert [len(b["input_ids"]) for b in got] == [16, 16, 8]
    want = testbed.collate(testbed.examples("calibration", 40, seed=2)[16:32], "right", model=name)
    assert got[1].keys() == want.keys()
    assert all(torch.equal(got[1][key], want[key]) for key in want)


def _prompts(name, items):
    image = "<image>" if name == "testbed-llava" else "<|vision_start|><|image_pad|><|vision_end|>"
    return [image + item.question + "?" for item in items]


def _agree(processor, items, name):
    made = processor(
        images=[x.image for x in items],
        text=_prompts(name, items),
        return_tensors="pt",
        padding=True,
    )
    want = testbed.collate(items, with_answers=False, model=name)
    assert set(made) == set(want)
    for key in want:
        assert made[key].shape == want[key].shape and torch.allclose(
            made[key], want[key], atol=1e-5
        ), key


@models
def test_processor_agrees_with_collate(name):
    items = testbed.examples("test", 24, seed=9)
    for processor in (build_processor(name), testbed.load(name)[1]):
        _agree(processor, items, name)
        if name == "testbed-qwen":
            _agree(processor, items[:12] + testbed.enlarge(items[12:], 80, 72), name)


@models
def test_the_chat_template_writes_the_prompt_that_the_model_was_trained_on(name, tmp_path):
    """Token by token, of a folder that `save_pretrained` has written, read as anybody's."""
    testbed.load(name)[1].save_pretrained(tmp_path)
    processor, items = load_processor(str(tmp_path)), testbed.examples("test", 24, seed=11)
    turns = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.fromarray(x.image)},
                    {"type": "text", "text": x.question + "?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": x.answer}]},
        ]
        for x in items
    ]
    for answered in (False, True):
        made = processor.apply_chat_template(
            [turn[: 1 + answered] for turn in turns],
            add_generation_prompt=not answered,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        want = testbed.collate(items, with_answers=answered, model=name)
        assert set(made) == set(want) - {"labels"}
        assert all(torch.allclose(made[key].float(), want[key].float(), atol=1e-5) for key in made)


@pytest.mark.parametrize("name", ["testbed-qwen", "testbed-qwen-video"])
def test_qwens_processor_is_of_the_class_that_its_checkpoints_name(name):
    """To the bit what a class that knows pictures alone makes of the same parts."""
    from transformers import PaddleOCRVLProcessor

    processor = testbed.load(name)[1]
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    plain = PaddleOCRVLProcessor(processor.image_processor, processor.tokenizer)
    items = testbed.examples("test", 16, seed=10)
    items = items[:8] + testbed.enlarge(items[8:], 80, 72)
    asked = {"text": _prompts("testbed-qwen", items), "images": [x.image for x in items]}
    made, want = (p(**asked, return_tensors="pt", padding=True) for p in (processor, plain))
    assert {*made} == {*want} and all(torch.equal(made[key], want[key]) for key in want)


# ---------------------------------------------------------------- training's own forward


@models
def test_packed_questions_give_the_models_own_logits(name):
    model = build_model(0, name).eval()
    for size in [(8, 8), (8, 10), (10, 9)] if name == "testbed-qwen" else [(8, 8)]:
        _, batch = board_batch(np.random.default_rng(1), [0, 2, 8, 11], 3, size)
        with torch.inference_mode():
            logits = forward(model, batch, (0, RECIPES[name].layers))[0]
            for slot in range(4):
                # Two slots hold the answer too.
                where = (batch.slot == slot).nonzero()[:, 0][: -1 if slot < 2 else None]
                items = []
                for image, row in zip(batch.images, batch.tokens[:, where], strict=True):
                    question = " ".join(vocab.WORDS[t] for t in row)
                    items.append(Example(image, question, "", ""))
                out = model(**testbed.collate(items, with_answers=False, model=name)).logits[:, -1]
                assert torch.allclose(out, logits[:, where[-1]], atol=1e-4)


@models
def test_a_closed_window_hides_the_image(name):
    """Closed from the start or taken out at once: the same.

    The text's logits know nothing of the picture.
    """
    model, layers = build_model(0, name).eval(), RECIPES[name].layers
    _, batch = board_batch(np.random.default_rng(1), [0, 8], 4, (8, 8))
    with torch.inference_mode():
        blind = forward(model, batch, (layers, layers))[0]
        gone = forward(model, batch, (0, 0))[0]
        batch.images = batch.images[::-1].copy()
        other = forward(model, batch, (layers, layers))[0]
    assert torch.allclose(blind, gone, atol=1e-4) and torch.allclose(blind, other, atol=1e-4)


# ---------------------------------------------------------------- the shipped checkpoints


@pytest.fixture(scope="module", params=EMBEDDED)
def shipped(request):
    return *testbed.load(request.param), request.param


@models
def test_loads_without_network(monkeypatch, name):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the loader opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    model, _ = testbed.load(name)
    classes = {
        "testbed-llava": "LlavaForConditionalGeneration",
        "testbed-qwen": "Qwen2_5_VLForConditionalGeneration",
    }
    assert type(model).__name__ == classes[name]
    assert not model.training and {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert (
        model.config.text_config.num_hidden_layers
        == build_config(name).text_config.num_hidden_layers
    )


def test_the_short_name_is_llava():
    assert testbed.load("testbed")[0].config.model_type == "llava"


def test_checkpoints_are_small_and_only_text_and_safetensors():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors"}
    assert sum(path.stat().st_size for path in FOLDER.parent.rglob("*") if path.is_file()) < 27e6


def test_accuracy_and_depth(shipped):
    model, _, name = shipped
    layers, closes = RECIPES[name].layers, min(RECIPES[name].closes)
    items = testbed.examples("test", 400, seed=11)
    full = evaluate.by_task(items, evaluate.hits(model, items))
    common = evaluate.majority(items)
    assert full["mean"] >= 0.85
    assert all(full[task] >= common[task] + 0.15 for task in testbed.TASKS)
    early = evaluate.by_task(items, evaluate.hits(model, items, [64] * 2 + [0] * (layers - 2)))
    late = evaluate.by_task(
        items, evaluate.hits(model, items, [64] * closes + [0] * (layers - closes))
    )
    assert early["mean"] <= full["mean"] - 0.25
    assert late["mean"] >= full["mean"] - 0.06


@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_forward_agrees_with_the_evaluation(shipped, side):
    items = testbed.examples("test", 64, seed=12)
    batch = testbed.collate(items, side, model=shipped[2])
    labels = batch["labels"]
    with torch.inference_mode():
        out = shipped[0](**batch)
    assert torch.isfinite(out.loss)
    guess = out.logits.argmax(-1)[:, :-1]
    right = ((guess == labels[:, 1:]) | (labels[:, 1:] == -100)).all(1).numpy()
    # Ties may fall either way in float32.
    assert (right == evaluate.hits(shipped[0], items)).mean() >= 0.98


def test_generate_is_the_teacher_forced_argmax(shipped):
    model, processor, name = shipped
    items = testbed.examples("test", 64, seed=13)
    if name == "testbed-qwen":
        items = testbed.enlarge(items, 72, 64)
    prompt = testbed.collate(items, with_answers=False, model=name)
    with torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    texts = processor.batch_decode(out[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    right = np.array([text.strip() == item.answer for text, item in zip(texts, items, strict=True)])
    assert (right == evaluate.hits(model, items)).mean() >= 0.98


def test_qwen_reads_boards_on_larger_pictures():
    model, _ = testbed.load("testbed-qwen")
    items = testbed.examples("test", 200, seed=14)
    plain = evaluate.by_task(items, evaluate.hits(model, items))["mean"]
    for height, width in ((64, 80), (80, 64)):
        bigger = testbed.enlarge(items, height, width)
        assert evaluate.by_task(bigger, evaluate.hits(model, bigger))["mean"] >= plain - 0.1


def test_evaluation_takes_one_size_at_a_time(shipped):
    items = testbed.examples("test", 4)
    with pytest.raises(ValueError, match="one size"):
        evaluate.hits(shipped[0], items[:2] + testbed.enlarge(items[2:], 64, 72))
