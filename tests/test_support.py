"""Models that cannot be pruned are refused by their configuration alone, without any weights.

The expected reasons are written down here; the library reads most of them off the configurations.
"""

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vispco.reading.support import candidates, check_supported, not_applicable

CROSS, ENCODER = "cross-attention, its decoder never holds visual tokens", "encoder-decoder"
REFUSED = {
    **dict.fromkeys(["blip", "idefics", "mllama", "evolla"], CROSS),
    **dict.fromkeys(["florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop"], ENCODER),
    "vision-encoder-decoder": ENCODER,
    "diffusion_gemma": "diffusion",
    "pi0": "robotics",
    "mistral4": "a language model without a vision part",
    "git": "the prompt does not say where they are",
}
TYPES = list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def default(model_type):
    """The default configuration; no release of transformers has them all."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    config_class = CONFIG_MAPPING[model_type]
    if model_type == "vision-encoder-decoder":
        # It has no default parts.
        text = transformers.GPT2Config(add_cross_attention=True)
        return config_class(encoder=transformers.ViTConfig().to_dict(), decoder=text.to_dict())
    return config_class()


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_by_config_json_alone(model_type, tmp_path):
    config = default(model_type)
    config.save_pretrained(tmp_path)
    # Nothing else is there to be read.
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    # Some releases write another name for Evolla than they read.
    read = AutoConfig.from_pretrained(tmp_path) if config.model_type == model_type else config
    with pytest.raises(ValueError) as error:
        check_supported(read)
    line = str(error.value)
    assert line.startswith(f"cannot prune {config.model_type!r} models: ")
    assert REFUSED[model_type] in line and "; choose a vision-language model" in line


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in REFUSED])
def test_all_other_image_text_models_pass(model_type):
    check_supported(default(model_type))


def test_every_image_text_model_is_in_one_of_two_lists():
    good, bad = candidates(), not_applicable()
    assert not good.keys() & bad.keys() and good.keys() | bad.keys() == {*TYPES}
    assert bad.keys() == {*TYPES} & REFUSED.keys()
    assert all(REFUSED[name] in reason for name, reason in bad.items())
    assert good["llava"] == "LlavaForConditionalGeneration"


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "qwen2_vl_text", "gemma3_text"])
def test_text_only(model_type):
    with pytest.raises(ValueError, match=f"'{model_type}' models: a language model without a vis"):
        check_supported(default(model_type))


def with_t5():
    text = transformers.T5Config()
    return transformers.Blip2Config(text_config=text)


def other_cross():
    """A newer family that says so, of whatever name."""
    config = default("mllama")
    config.model_type = "mllama9"
    return config


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (with_t5, ENCODER),
        (other_cross, CROSS),
        (lambda: default("clip"), "has no image-text-to-text class"),
        (lambda: default("siglip"), "AutoModelForImageTextToText"),
        (lambda: default("colqwen2"), "only its part 'vlm' .* a 'qwen2_vl' model"),
    ],
)
def test_other_configurations(build, reason):
    with pytest.raises(ValueError, match=reason):
        check_supported(build())


def test_classes_of_the_users_own():
    """They are in no list of transformers, and may be loaded by other means."""

    class Own(PreTrainedConfig):
        model_type = "own"

    check_supported(Own(visual={"depth": 2}))
    check_supported(Own(picture_token=7))
    for config in (Own(), Own(visual=None)):
        with pytest.raises(ValueError, match="'own' models: a language model without a vision"):
            check_supported(config)
    with pytest.raises(ValueError, match=ENCODER):
        check_supported(Own(visual={}, is_encoder_decoder=True))


def test_a_model_is_refused_as_its_configuration():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 9}
    config = transformers.LlamaConfig(**sizes, **heads)
    said = []
    for what in (config, transformers.LlamaForCausalLM(config)):
        with pytest.raises(ValueError) as error:
            check_supported(what)
        said.append(str(error.value))
    assert said[0] == said[1] and "'llama'" in said[0]
    with pytest.raises(ValueError, match="expected a model of Hugging Face .* got Linear"):
        check_supported(torch.nn.Linear(1, 1))
