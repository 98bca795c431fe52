"""Input downsampling: shorter prompts with the right tokens, and the same answers to compare."""

import pytest
import torch

import vispco
from tiny import IMAGE, batch, make
from tiny_families import processed, prompts
from vispco.baselines.downsample import downsample, evaluate_downsampled
from vispco.calibration import prepare
from vispco.registry import adapter_for

SUPPORTED = ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def inputs_of(family, **kwargs):
    """A mixed batch, as the family's processor gives it."""
    model = make(family)
    inputs = batch(images=(1, 1, 1), text=(9, 4, 6), before=(2, 0, 3), **kwargs)
    return model, inputs if family == "llava" else processed(model, inputs)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("scale, tokens", [(1.0, 16), (0.75, 9), (0.5, 4), (0.1, 1)])
@pytest.mark.parametrize("family", SUPPORTED)
def test_fewer_tokens_and_all_the_text(family, scale, tokens, padding):
    model, inputs = inputs_of(family, padding=padding)
    adapter = adapter_for(model)(model)
    small = downsample(adapter, inputs, scale)
    for b, mask in enumerate(small["attention_mask"].bool()):
        # Padding stays on its side.
        assert mask.tolist() == sorted(mask.tolist(), reverse=padding == "right")
        real = inputs["attention_mask"][b].bool()
        place = inputs["input_ids"][b][real].tolist().index(IMAGE)
        for name, fill in (("input_ids", 0), ("labels", -100), ("mm_token_type_ids", 0)):
            if name in inputs:
                before = inputs[name][b][real].tolist()
                assert (
                    small[name][b][mask].tolist() == before[: place + tokens] + before[place + 16 :]
                )
                assert (small[name][b][~mask] == fill).all()
    with torch.no_grad():
        run = {k: v for k, v in small.items() if k != "labels"}
        assert model(**adapter.embedded(run)).logits.isfinite().all()


@pytest.mark.parametrize("family", SUPPORTED)
def test_at_scale_one_nothing_changes(family):
    model, inputs = inputs_of(family)
    record = evaluate_downsampled(model, prepare(model, [inputs]), 1.0)
    full = vispco.evaluate(model, [inputs])
    assert (
        record.kl < 1e-6
        and record.prunable_share == 1
        and torch.equal(record.correct, full.correct)
    )


@pytest.mark.parametrize("family", SUPPORTED)
def test_half_the_side_costs_what_a_quarter_of_the_tokens_cost(family):
    model, inputs = inputs_of(family)
    prepared = prepare(model, [inputs])
    record = evaluate_downsampled(model, prepared, 0.5)
    quarter = vispco.PruningConfig("strided", [0.25] * len(model.get_decoder().layers))
    pruned = vispco.evaluate(model, prepared, quarter)
    assert (
        record.flops == pruned.flops
        and record.prunable_share == pruned.prunable_share
        and record.kl > 1e-3
    )


def test_pictures_are_averages():
    """A picture of one colour stays one.

    The patches of Qwen are put together as its processor cuts them.
    """
    model = make("qwen2_5_vl")
    adapter, patch = adapter_for(model)(model), 2
    # Rows get brighter.
    picture = torch.arange(16.0)[:, None].expand(3, 16, 16)
    # Tokens, patches, colours, pixels.
    pieces = picture.view(3, 4, 2, patch, 4, 2, patch).permute(1, 4, 2, 5, 0, 3, 6)
    pixels = pieces.unsqueeze(5).expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(64, -1)
    inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 8, 8]])}
    changed, tokens = adapter.smaller(inputs, 0.5)
    small = (
        changed["pixel_values"]
        .view(2, 2, 2, 2, 3, 2, patch, patch)
        .permute(4, 5, 0, 2, 6, 1, 3, 7)
        .reshape(3, 2, 8, 8)
    )
    rows = small[0, 0, :, 0]
    assert (
        tokens == [(16, 4)]
        and torch.allclose(small, rows[:, None].expand(3, 2, 8, 8))
        and (rows.diff() > 1).all()
    )
    assert torch.allclose(rows[2:6], torch.tensor([4.5, 6.5, 8.5, 10.5]))


@pytest.mark.parametrize("scale", [0, -1, 1.5, float("nan")])
def test_refuses_other_scales(scale):
    model, inputs = inputs_of("llava")
    with pytest.raises(ValueError, match=r"scale must be in \(0, 1\]"):
        downsample(adapter_for(model)(model), inputs, scale)


def test_refuses_families_that_give_no_way():
    model = make("llava_next")
    inputs, _ = prompts(model, [[2, ("image", 0), 4]])
    with pytest.raises(
        ValueError,
        match="LlavaNextForConditionalGeneration cannot be made smaller here: give its processor",
    ):
        downsample(adapter_for(model)(model), inputs, 0.5)
