"""The zoo of tiny models: it holds every family, and each of its models does what its kind does."""

import pytest
import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES,
)

import zoo
from vispco.reading.structure import find_decoder
from zoo.entry import IMAGE

CROSS = "its decoder reads pictures through cross-attention: there are no visual tokens to prune"
ENCODER = "an encoder and a decoder: pictures are not in the decoder's sequence"
#: {model_type: why the zoo has no such model}
NOT_APPLICABLE = {
    **dict.fromkeys(["blip", "idefics", "mllama", "evolla"], CROSS),
    **dict.fromkeys(["florence2", "pix2struct", "pp_formulanet"], ENCODER),
    **dict.fromkeys(["t5gemma2", "udop", "vision-encoder-decoder"], ENCODER),
    "diffusion_gemma": "it writes by diffusion, not token by token",
    "pi0": "it moves a robot: its output is actions, not tokens",
    "mistral4": "text only",
    "git": "it puts the pictures before the text itself: the prompt has no visual tokens",
}


def pytest_generate_tests(metafunc):
    """Each entry by name, with pictures and with films: the fast ones, or all with --every."""
    every = metafunc.config.getoption("every")
    chosen = {name: entry for name, entry in zoo.FAMILIES.items() if every or entry.fast}
    if {"name", "video"} <= {*metafunc.fixturenames}:
        cases = [(name, video) for name, entry in chosen.items() for video in shown(entry)]
        metafunc.parametrize(("name", "video"), cases, ids=[f"{n}{'-video' * v}" for n, v in cases])
    elif "name" in metafunc.fixturenames:
        metafunc.parametrize("name", chosen)


def shown(entry):
    """Whether to show films: never, or once with and once without."""
    return (False,) if entry.video is None else (False, True)


def made(name, video=False):
    """The tiny model of an entry; skips what this release of transformers has not."""
    if lack := zoo.missing(zoo.FAMILIES[name], video):
        pytest.skip(lack)
    return zoo.make(name)


def logits(model, inputs):
    """Logits, without gradient."""
    with torch.no_grad():
        return model(**inputs).logits


def media_of(inputs):
    """The inputs that are neither ids nor masks: pictures or films."""
    shape = inputs["input_ids"].shape
    return {k: v for k, v in inputs.items() if getattr(v, "shape", None) != shape}


def test_every_family_is_here_or_not_applicable():
    """Each class that transformers lists is that of an entry, or it is named with a reason.

    Releases may call a class otherwise, or list it twice.
    """
    here = {name for entry in zoo.FAMILIES.values() for name in (entry.cls, entry.model_type)}
    absent = {kind for kind, cls in CLASSES.items() if not {kind, cls} & here}
    assert absent == NOT_APPLICABLE.keys() & CLASSES.keys()


def test_decoder(name):
    """Six or seven decoder layers, a small vocabulary, and the model type that the entry says."""
    model = made(name)
    _, layers = find_decoder(model)
    assert len(layers) in (6, 7)
    assert model.config.model_type == zoo.FAMILIES[name].model_type
    assert model.get_input_embeddings().weight.shape[0] <= 128


@pytest.mark.parametrize("padding", ["left", "right"])
def test_pictures_matter(name, padding, video):
    """Logits are finite, and other pictures give other logits in every row."""
    model = made(name, video)
    inputs, n_visual = zoo.prompts(name, padding=padding, video=video)
    visual = inputs["input_ids"] == (zoo.FAMILIES[name].video_token if video else IMAGE)
    assert visual.sum(1).tolist() == n_visual
    real = inputs["attention_mask"].bool()
    before = logits(model, inputs)
    others, _ = zoo.prompts(name, padding=padding, video=video, seed=1)
    after = logits(model, {**inputs, **media_of(others)})
    assert before[real].isfinite().all()
    for row, mask in zip((after - before).abs(), real, strict=True):
        assert row[mask][-1].max() > 1e-3


def test_seeded():
    """Two builds of an entry are equal, and leave the random state as it was."""
    state = torch.get_rng_state()
    entry = next(entry for entry in zoo.FAMILIES.values() if entry.fast and not zoo.missing(entry))
    first, second = zoo.build(entry).state_dict(), zoo.build(entry).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(torch.get_rng_state(), state)
