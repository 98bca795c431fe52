"""Evaluation against an oracle: one sample at a time, by greedy decoding and plain softmax."""

import sys
from dataclasses import replace

import pytest
import torch

import vispco
from tiny import IMAGE, batch, without_labels
from vispco.calibration import prepare, run_teacher
from vispco.pruning.forward import kl_divergence


@pytest.fixture(scope="module")
def batches(llava):
    """Two batches of four questions.

    Answers are what the full model would say in the first two rows, and random in the others.
    """
    result = []
    for seed in range(2):
        b = batch(
            images=(1, 2, 1, 0),
            text=(9, 5, 7, 8),
            before=(2, 0, 3, 4),
            padding=("left", "right")[seed],
            seed=seed,
        )
        # The labels become what the model says, token by token.
        for row in range(2):
            for at in (b["labels"][row] != -100).nonzero()[:, 0].tolist():
                with torch.no_grad():
                    token = model_answer(llava, b, row, at)
                b["input_ids"][row, at] = b["labels"][row, at] = token
        result.append(b)
    return result


def model_answer(model, b, row, at):
    logits = model(**without_labels(b)).logits[row, at - 1].clone()
    logits[IMAGE] = float("-inf")
    return int(logits.argmax())


def oracle(model, batches, config):
    """Accuracy and KL with one unpadded sample at a time."""
    right, divergence = [], []
    for b in batches:
        image = 0
        for row in range(len(b["input_ids"])):
            real = b["attention_mask"][row].bool()
            one = {
                "input_ids": b["input_ids"][row][real][None],
                "attention_mask": torch.ones(1, int(real.sum())),
            }
            count = int((one["input_ids"] == IMAGE).sum()) // 16
            if count:
                one["pixel_values"] = b["pixel_values"][image : image + count]
            image += count
            labels = b["labels"][row][real][None]
            with torch.no_grad():
                full = model(**one).logits[0, :-1]
                with vispco.apply(model, config):
                    pruned = model(**one, labels=labels).logits[0, :-1]
            answer = labels[0, 1:] != -100
            p, q = pruned[answer].double().softmax(-1), full[answer].double().softmax(-1)
            divergence.append((p * (p / q).log()).sum(-1))
            right.append(bool((pruned[answer].argmax(-1) == labels[0, 1:][answer]).all()))
    return sum(right) / len(right), float(torch.cat(divergence).mean())


@pytest.mark.parametrize("ratios", [[1, 1, 0.5, 0.5, 0.25, 0.25], [1, 0.1, 0.1, 0, 0, 0], [1] * 6])
@pytest.mark.parametrize("mode", ["deploy", "search"])
def test_evaluate_equals_the_oracle(llava, batches, ratios, mode):
    config = vispco.PruningConfig("fastv", ratios)
    record = vispco.evaluate(llava, batches, config, mode=mode)
    accuracy, kl = oracle(llava, batches, config)
    assert (
        record.n == 8
        and record.accuracy == accuracy
        and record.kl == pytest.approx(kl, rel=1e-3, abs=1e-5)
    )


def test_full_model(llava, batches):
    record = vispco.evaluate(llava, batches)
    assert (record.kl, record.share, record.prunable_share) == (0, 1, 1) and record.accuracy >= 0.5
    assert len(record.correct) == 8 and record.to_dict()["n"] == 8


def test_teacher_forced_accuracy_is_greedy_decoding(llava):
    """What `generate` writes under the same configuration is what `evaluate` calls right."""
    b = batch(images=(1,), text=(9,), before=(2,), seed=3)
    config = vispco.PruningConfig("fastv", [1, 1, 0.5, 0.5, 0.25, 0.25])
    prompt = {
        "input_ids": b["input_ids"][:, :-2],
        "attention_mask": b["attention_mask"][:, :-2],
        "pixel_values": b["pixel_values"],
    }
    with vispco.apply(llava, config):
        answer = llava.generate(
            **prompt, max_new_tokens=2, do_sample=False, suppress_tokens=[IMAGE]
        )[:, -2:]
    b["input_ids"][:, -2:] = b["labels"][:, -2:] = answer
    assert vispco.evaluate(llava, [b], config).accuracy == 1
    b["labels"][:, -1] = b["input_ids"][:, -1] = (answer[:, -1] + 1) % 50 + 6
    # One wrong token makes the answer wrong.
    assert vispco.evaluate(llava, [b], config).accuracy == 0


def test_flops_are_the_prompt_s_mean(llava, batches):
    config = vispco.PruningConfig("fastv", [1, 1, 0.5, 0.5, 0.25, 0.25])
    record = vispco.evaluate(llava, batches, config)
    expected = [
        vispco.count_flops(llava, config, n_visual=16 * n, n_text=1 + t - 2).total
        for n, t in ((1, 9), (2, 5), (1, 7), (0, 8))
    ]
    assert record.flops == sum(expected) / 4


def test_the_full_model_runs_once_for_many_configurations(llava, batches, monkeypatch):
    prepared = run_teacher(llava, prepare(llava, batches))
    monkeypatch.setattr(
        sys.modules["vispco.evaluate"],
        "run_teacher",
        lambda model, seen: [x.log_probs.shape for x in seen],
    )
    config = vispco.PruningConfig("fastv", [1, 1, 0.5, 0.5, 0.25, 0.25])
    assert vispco.evaluate(llava, prepared, config).kl > 0


def test_answers_cannot_be_seen_by_the_scores(llava):
    """Other answer tokens, same kept tokens."""
    one = batch(seed=1)
    two = {k: v.clone() for k, v in one.items()}
    two["input_ids"][:, -2:] = torch.tensor([[50, 51], [52, 53]])
    config = vispco.PruningConfig("fastv", [1, 0.5, 0.5, 0.25, 0.25, 0.25])
    kept = []
    for b in (one, two):
        with vispco.apply(llava, config) as handle, torch.no_grad():
            llava(**b)
            kept.append(torch.stack(list(handle.kept().values())))
    assert torch.equal(*kept)


def test_kl_direction():
    """KL(pruned || full), not the reverse: by hand."""
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    expected = 0.9 * torch.tensor(0.9 / 0.5).log() + 0.1 * torch.tensor(0.1 / 0.5).log()
    assert kl_divergence(p.log(), q.log()) == pytest.approx(float(expected))


def test_agreement_is_accuracy_where_the_full_model_is_right(llava):
    """With the full model's own answers as labels both are the same; the full model agrees."""
    b = batch()
    assert vispco.evaluate(llava, [b]).agreement == 1
    config = vispco.PruningConfig("fastv", [1, 1, 0.25, 0.25, 0, 0])
    prepared = run_teacher(llava, prepare(llava, [b]))
    found = vispco.evaluate(llava, prepared, config)
    own = replace(prepared[0], targets=prepared[0].log_probs.argmax(-1))
    assert vispco.evaluate(llava, [own], config).accuracy == found.agreement < 1
