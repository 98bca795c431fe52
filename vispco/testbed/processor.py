"""What the processors of the testbed's LLaVA models share."""

from __future__ import annotations

from typing import Any

#: Pixels a side of a board, and of one visual token.
IMAGE_SIZE, PATCH = 64, 8
#: Normalisation of the pixels.
MEAN, STD = 0.5, 0.5


def llava_processor(tokenizer: Any, image: str, template: str) -> Any:
    """A LlavaProcessor whose image processor only rescales and normalises.

    image: the token that stands for a picture. template: the chat template.
    """
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size=square, crop_size=square, resample=2, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        image_token=image,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def chat_template(image: str, blank: str = "' '", video: str | None = None) -> str:
    """A chat template for what the models were trained on: image, question, answer, end.

    image, video: what stands for a picture, and for a clip. blank: a Jinja expression, what comes
    before an answer.
    """
    film = "{% elif part['type'] == 'video' %}" + video if video else ""
    return (
        "{% for turn in messages %}{% for part in turn['content'] %}"
        "{% if part['type'] == 'image' %}" + image + film + "{% elif part['type'] == 'text' %}"
        "{{ "
        + blank
        + " if turn['role'] == 'assistant' }}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% if turn['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
