"""Which tokens are visual, where a prompt does not say: told by the caller, or refused."""

import pytest
import torch

import vispco
from oracles import hook_counts
from tiny import batch, make, without_labels

CONFIG = vispco.PruningConfig("fastv", [1, 1, 0.25, 0.25, 0.25, 0.25])
IMAGE = 5


@pytest.fixture(scope="module")
def prompt():
    """Token ids and pictures, and the same with the features in their places."""
    model, inputs = make("llava"), without_labels(batch(images=(1, 1), answer=0))
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
    visual = inputs["input_ids"] == IMAGE
    embeds[visual] = torch.cat(list(features))
    ready = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    return model, inputs, ready, visual


def test_embeddings_with_features_in_place_are_refused_or_told(prompt):
    """No embedding is that of the image token: that none is found does not mean there are none."""
    model, inputs, ready, visual = prompt
    hooks = hook_counts(model)
    with (
        torch.no_grad(),
        vispco.apply(model, CONFIG),
        pytest.raises(ValueError, match="no visual token is found.*inputs_embeds.*visual_mask="),
    ):
        model(**ready)
    with torch.no_grad(), vispco.apply(model, CONFIG, visual_mask=visual) as handle:
        told, kept = model(**ready).logits, handle.kept()
    with torch.no_grad(), vispco.apply(model, CONFIG) as handle:
        found = model(**inputs).logits
        assert all(torch.equal(kept[i], mask) for i, mask in handle.kept().items())
    assert torch.equal(told, found) and hook_counts(model) == hooks


def test_told_that_there_are_none(prompt):
    model, _, ready, visual = prompt
    with torch.no_grad():
        full = model(**ready).logits
        with vispco.apply(model, CONFIG, visual_mask=torch.zeros_like(visual)) as handle:
            assert torch.equal(model(**ready).logits, full) and handle.kept() == {}


def test_beam_search_repeats_the_rows(prompt):
    model, inputs, ready, visual = prompt
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    with vispco.apply(model, CONFIG, visual_mask=visual):
        told = model.generate(**ready, **options)
    with vispco.apply(model, CONFIG):
        found = model.generate(**inputs, **options)
    assert torch.equal(told, found[:, inputs["input_ids"].shape[1] :])


def test_a_mask_of_another_prompt_is_refused(prompt):
    model, _, ready, visual = prompt
    with (
        torch.no_grad(),
        vispco.apply(model, CONFIG, visual_mask=visual[:, 1:]) as handle,
    ):
        with pytest.raises(ValueError, match="set it on the handle for each prompt"):
            model(**ready)
        handle.visual_mask = visual
        model(**ready)
        assert handle.kept()


def test_pictures_without_their_tokens_are_refused(prompt):
    model, inputs, _, _ = prompt
    other = {**inputs, "input_ids": inputs["input_ids"].clamp(min=6)}
    with (
        torch.no_grad(),
        vispco.apply(model, CONFIG),
        pytest.raises(ValueError, match="no visual token is found.*pixel_values"),
    ):
        model(**other)
