"""An untrained testbed model, and the processor that is saved with it."""

from __future__ import annotations

import torch

from vispco.data.stills import without_videos
from vispco.testbed.model import FRAMES, MERGE, QWEN_PATCH, VIDEO, build_config, resolve
from vispco.testbed.processor import MEAN, PATCH, STD, chat_template, llava_processor
from vispco.testbed.vocab import (
    EOS,
    ID,
    IMAGE,
    IMAGE_PAD,
    PAD,
    QWEN_ID,
    UNK,
    VIDEO_ID,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
)


def build_model(seed: int, name: str = "testbed-llava"):
    """A fresh model with seeded weights. The global random generator is left as it was."""
    from transformers import AutoModelForImageTextToText

    config = build_config(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    if resolve(name) == "testbed-qwen":
        # A deep residual stream starts better if every layer adds little.
        scale = (2 * config.text_config.num_hidden_layers) ** -0.5
        for key, weight in model.named_parameters():
            if key.endswith(("o_proj.weight", "down_proj.weight")):
                weight.data.mul_(scale)
    return model


def build_processor(name: str = "testbed-llava"):
    """The processor of the model `name`."""
    if name == VIDEO:
        return _qwen_processor(VIDEO_ID)
    return _qwen_processor(QWEN_ID) if resolve(name) == "testbed-qwen" else _llava_processor()


def _llava_processor():
    """An image processor that only rescales and normalises, and the words."""
    return llava_processor(_tokenizer(ID, [IMAGE]), IMAGE, chat_template(IMAGE))


def _qwen_processor(words: dict[str, int]):
    """Qwen2.5-VL's processor, for pictures of up to 1024 visual tokens, and the words.

    It rounds the sides of a picture, and of a clip, to 8 pixels. Its video half needs torchvision,
    so only the settings of that are here: they are saved, and read where torchvision is.
    """
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    sizes = {
        "size": {"shortest_edge": PATCH**2, "longest_edge": 1024 * PATCH**2},
        "patch_size": QWEN_PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    special = {
        "image_token": IMAGE_PAD,
        "video_token": VIDEO_PAD,
        "vision_start_token": VISION_START,
        "vision_end_token": VISION_END,
    }
    processor = without_videos(Qwen2_5_VLProcessor)(
        Qwen2VLImageProcessorPil(**sizes),
        _tokenizer(words, special),
        chat_template=chat_template(
            VISION_START + IMAGE_PAD + VISION_END, video=VISION_START + VIDEO_PAD + VISION_END
        ),
    )
    processor.videos = {"video_processor_type": "Qwen2VLVideoProcessor", **sizes}
    return processor


def _tokenizer(vocabulary: dict[str, int], special: list[str] | dict[str, str]):
    """The rule of `vispco.testbed.vocab.encode`, as a tokenizer that saves to JSON."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNK))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("?", " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        extra_special_tokens=special,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
