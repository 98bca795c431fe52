"""What a model's processor makes of texts with their pictures or videos."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..utils.files import brief
from .conversation import Conversation
from .film import Film
from .marks import unmarked
from .template import media_tokens

#: Visual tokens of a picture from which on a warning is given.
MANY_TOKENS = 4096
#: Frames of which a processor that reads times writes at least two times.
SEVERAL = 4
_WARNED: Any = weakref.WeakSet()
_TIMELESS: Any = weakref.WeakSet()
#: What a processor must know of its model, and may lack in old checkpoints.
_SETTINGS = ("patch_size", "num_image_tokens", "vision_feature_select_strategy")


@dataclass(frozen=True)
class Rendered:
    """What a processor gets of one conversation. media: opened pictures, or `Film`s."""

    conversation: Conversation
    text: str
    media: list[Any]


def process(processor: Any, rendered: Sequence[Rendered], **padding) -> dict[str, Any]:
    """What the processor makes of these. Raises ValueError that names the conversation at fault."""
    kind = rendered[0].conversation.kind
    texts = [_with_bos(processor, one.text) for one in rendered]
    options: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": False, **padding}
    media = [one.media for one in rendered]
    films: list[Film] = []
    if any(media):
        options[f"{kind}s"] = media
    if kind == "video":
        films = [film for row in media for film in row]
        options |= {"do_sample_frames": False, "video_metadata": metadata(films)}
    try:
        made = dict(processor(text=texts, **options))
    except Exception as error:
        # Pictures too small, special tokens in questions: a processor may raise anything.
        where = rendered[0].conversation.source
        if len(rendered) > 1:
            where += f" to {rendered[-1].conversation.source}"
            # Each conversation alone, to name the one at fault.
            for one in rendered:
                process(processor, [one])
        raise ValueError(f"{where}: {_why(processor, error)}") from error
    seconds = "video_second_per_grid"
    if seconds in made:
        # Qwen's Omni models take one rate for all videos of a batch, so it is set here.
        patch = processor.video_processor.temporal_patch_size
        made[seconds] = torch.tensor([patch / film.sampled_fps for film in films])
    return made


def warn_of_many(processor: Any, made: dict[str, Any], rendered: Sequence[Rendered]) -> None:
    """Warn, once for a processor, of pictures that become very many tokens."""
    token = media_tokens(processor)["image"]
    seen = made["input_ids"] == processor.tokenizer.convert_tokens_to_ids(token)
    pairs = zip(seen.sum(1).tolist(), rendered, strict=True)
    most = max(
        (tokens / len(one.media) for tokens, one in pairs if one.conversation.kind == "image"),
        default=0,
    )
    if most <= MANY_TOKENS or processor in _WARNED:
        return
    _WARNED.add(processor)
    size = sum(x.nbytes for x in made.values() if isinstance(x, torch.Tensor)) / len(rendered)
    warnings.warn(
        f"a picture gives {most:,.0f} visual tokens, and a question takes {size / 1e6:,.0f} MB: if "
        "that is more than the model will see later, lower the most pixels that its processor "
        "takes (size or max_pixels in its configuration)",
        stacklevel=3,
    )


def metadata(films: Sequence[Film]) -> Any:
    """What transformers' processors want to know of videos whose frames were taken before."""
    from transformers.video_utils import VideoMetadata

    found = [VideoMetadata(**film.metadata()) for film in films]
    return found[0] if len(found) == 1 else found


def check_rates(processor: Any, rendered: Sequence[Rendered]) -> None:
    """Raise ValueError that names a conversation whose model reads times that nobody knows."""
    for one in rendered:
        if one.conversation.kind != "video":
            continue
        plain = replace(one, text=unmarked(one.text).text)

        def made(fps: float, plain: Rendered = plain) -> dict[str, Any]:
            return process(processor, [replace(plain, media=at_rate(plain.media, fps))])

        how = 'in the row ("fps": 2) or as --fps 2'
        check_times(processor, one.media, made, one.conversation.source, how)


def check_times(
    processor: Any, films: Sequence[Film], made: Callable[[float], Any], source: str, how: str
) -> None:
    """Raise ValueError that begins with `source` if the model reads times that nobody knows.

    A list of frames says nothing of their times. If the processor makes the same of them at two
    rates, then the model does not read them. Of several frames, this is found once.

    made: what the processor makes of the films, with this rate where none is known. how: where to
        give the rate.
    """
    if all(film.fps for film in films) or processor in _TIMELESS:
        return
    if not _alike(made(0.5), made(7.0)):
        raise ValueError(
            f"{source}: {type(processor).__name__} tells the model the time of each frame, which "
            f"these frames do not say: give the frames per second, {how}"
        )
    if min(len(film) for film in films) >= SEVERAL:
        _TIMELESS.add(processor)


def at_rate(films: Sequence[Film], fps: float) -> list[Film]:
    """The films, at this rate where none is known."""
    return [film if film.fps else film.at_rate(fps) for film in films]


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    pairs = [(one[key], other.get(key)) for key in one]
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        for a, b in pairs
    )


def _why(processor: Any, error: Exception) -> str:
    name = type(processor).__name__
    missing = [what for what in _SETTINGS if getattr(processor, what, "") is None]
    if isinstance(error, TypeError) and missing:
        return (
            f"{name} lacks {' and '.join(missing)}, without which it cannot tell how many tokens a "
            "picture has: set it as the model's config.json has it (processor.patch_size = "
            "config.vision_config.patch_size), and save the processor again"
        )
    return f"{name} cannot process it: {brief(error)}"


def _with_bos(processor: Any, text: str) -> str:
    """The text with the beginning-of-sequence token that the tokenizer would add.

    The template may have written it already. With it in the text, the tokenizer adds no special
    tokens, so the tokens of a text's beginning are the beginning of its tokens.
    """
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token
    if not bos or text.startswith(bos):
        return text
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return bos + text if adds_bos else text
