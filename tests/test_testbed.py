"""The testbed: scenes, questions against a brute-force solver, batches, processor, and the shipped checkpoint."""

from __future__ import annotations

import hashlib
import socket

import numpy as np
import pytest
import torch

from vispco import testbed
from vispco.testbed import evaluate, questions, scenes, vocab
from vispco.testbed.data import generate
from vispco.testbed.model import FOLDER, build_config, build_processor

torch.set_num_threads(1)
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
        dx, dy = STEPS[words[0]] if words[0] in STEPS else (0, 0)
        return column + dx, row + dy

    def attribute(self, name: str, where) -> str:
        colour, thing = self.cells[where]
        assert name == "colour" or (name == "digit") == thing.isdigit()
        return colour if name == "colour" else thing

    def colour(self, words: list[str]) -> str:
        """["red"], ["the", "colour", "at", "c5"] or ["the", "colour", "west", "of", "c5"] -> "red"."""
        return words[0] if len(words) == 1 else self.attribute("colour", self.where(words[2:]))

    def solve(self, text: str) -> str:
        w = text.split()
        if w[0] == "count":  # count every S in COLOUR
            colour = self.colour(w[4:])
            return str(sum(c == colour and w[2] in (t, "object") for c, t in self.cells.values()))
        if w[:3] == ["is", "there", "more"]:  # is there more C than COLOUR
            first, second = (sum(c == k for c, _ in self.cells.values()) for k in (w[3], self.colour(w[5:])))
            assert abs(first - second) >= 2
            return "yes" if first > second else "no"
        if w[0] == "is":  # is there a S in COLOUR
            return "yes" if (self.colour(w[5:]), w[3]) in self.cells.values() else "no"
        if w[3] == "in":  # what A is in COLOUR
            colour = self.colour(w[4:])
            found = [t for c, t in self.cells.values() if c == colour and t.isdigit() == (w[1] == "digit")]
            assert len(found) == 1, "the question has no unique object"
            return found[0]
        if "in" in w:  # what A is D of the S in COLOUR
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
    cells = scenes.render(rng, boards).reshape(20, 8, 8, 8, 8, 3).swapaxes(2, 3).reshape(20, 64, 64, 3).astype(float)
    away = abs(cells - np.median(cells[boards.colour < 0], axis=(0, 1))).sum(-1)  # (20, 64, 64 pixels)
    assert away[boards.colour < 0].max() < 110
    strongest = np.take_along_axis(cells, away.argmax(2)[..., None, None], axis=2)[:, :, 0]
    nearest = abs(strongest[:, :, None] - scenes._RGB).sum(-1).argmin(-1)
    shape = (boards.colour >= 0) & (boards.shape != scenes.DIGIT)
    assert (nearest == boards.colour)[shape].mean() == 1.0


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
    same = [np.array_equal(a.image, b.image) and a.question == b.question for a, b in zip(first, again, strict=True)]
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
    ],
)
def test_bad_input_says_what_is_valid(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---------------------------------------------------------------- batches and processor


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_layout(side):
    items = testbed.examples("test", 16)
    batch = testbed.collate(items, side)
    for row, item in enumerate(items):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        prompt = [vocab.ID[vocab.IMAGE]] * 64 + [vocab.ID[w] for w in item.question.split()]
        answer = [vocab.ID[item.answer], vocab.ID[vocab.EOS]]
        assert ids == prompt + answer
        labels = batch["labels"][row]
        assert labels[labels != -100].tolist() == answer
        assert torch.equal(labels[labels != -100], batch["input_ids"][row][labels != -100])
        padded = batch["attention_mask"][row][0 if side == "left" else -1] == 0
        assert bool(padded) == (len(ids) < batch["input_ids"].shape[1])
    assert batch["pixel_values"].shape == (16, 3, 64, 64)


def test_batches_follow_the_examples():
    got = testbed.batches("calibration", n=40, batch_size=16, seed=2, padding_side="right")
    assert [len(b["input_ids"]) for b in got] == [16, 16, 8]
    want = testbed.collate(testbed.examples("calibration", 40, seed=2)[16:32], "right")
    assert all(torch.equal(got[1][key], want[key]) for key in want)


def test_processor_agrees_with_collate():
    items = testbed.examples("test", 24, seed=9)
    for processor in (build_processor(), testbed.load()[1]):
        made = processor(images=[x.image for x in items], text=["<image>" + x.question + "?" for x in items],
                         return_tensors="pt", padding=True)  # fmt: skip
        want = testbed.collate(items, with_answers=False)
        assert set(made) == set(want)
        assert torch.equal(made["input_ids"], want["input_ids"])
        assert torch.equal(made["attention_mask"], want["attention_mask"])
        assert torch.allclose(made["pixel_values"], want["pixel_values"], atol=1e-5)


# ---------------------------------------------------------------- the shipped checkpoint


@pytest.fixture(scope="module")
def shipped():
    return testbed.load("testbed-llava")


def test_loads_without_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the loader opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    model, _ = testbed.load("testbed")
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert not model.training and next(model.parameters()).dtype == torch.float32
    assert model.config.text_config.num_hidden_layers == build_config().text_config.num_hidden_layers


def test_checkpoint_is_small_and_only_json_and_safetensors():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in FOLDER.parent.rglob("*") if path.is_file()) < 10e6


def test_accuracy_and_depth(shipped):
    items = testbed.examples("test", 400, seed=11)
    full = evaluate.by_task(items, evaluate.hits(shipped[0], items))
    common = evaluate.majority(items)
    assert full["mean"] >= 0.85
    assert all(full[task] >= common[task] + 0.15 for task in testbed.TASKS)
    early = evaluate.by_task(items, evaluate.hits(shipped[0], items, [64] + [0] * 7))
    late = evaluate.by_task(items, evaluate.hits(shipped[0], items, [64] * 6 + [0] * 2))
    assert early["mean"] <= full["mean"] - 0.25
    assert late["mean"] >= full["mean"] - 0.06


@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_forward_agrees_with_the_evaluation(shipped, side):
    items = testbed.examples("test", 64, seed=12)
    batch = testbed.collate(items, side)
    labels = batch["labels"]
    with torch.inference_mode():
        out = shipped[0](**batch)
    assert torch.isfinite(out.loss)
    guess = out.logits.argmax(-1)[:, :-1]
    right = ((guess == labels[:, 1:]) | (labels[:, 1:] == -100)).all(1).numpy()
    assert (right == evaluate.hits(shipped[0], items)).mean() >= 0.98  # ties may fall either way in float32


def test_generate_is_the_teacher_forced_argmax(shipped):
    model, processor = shipped
    items = testbed.examples("test", 64, seed=13)
    prompt = testbed.collate(items, with_answers=False)
    with torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    texts = processor.batch_decode(out[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    right = np.array([text.strip() == item.answer for text, item in zip(texts, items, strict=True)])
    assert (right == evaluate.hits(model, items)).mean() >= 0.98
