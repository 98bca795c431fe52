"""A model's processor; without its video half where torchvision, which that needs, is missing."""

from __future__ import annotations

import contextlib
from typing import Any


def load_processor(name: str, **options) -> Any:
    """The processor of a folder or a name, as `AutoProcessor.from_pretrained` gives it.

    Qwen's processors (and others) read videos with torchvision. Where that is not installed, they
    cannot be loaded at all, not even for still pictures. Then this gives the same class without its
    video half, if that can be left out.

    options: of `from_pretrained`. Raises what that raises; ImportError that names the extra if
    torchvision is missing and the class cannot do without.
    """
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    try:
        return AutoProcessor.from_pretrained(name, **options)
    except (ImportError, TypeError, ValueError) as error:
        # Releases of transformers raise one or another of these where torchvision is missing.
        told = "torchvision" in str(error).lower()
        if is_torchvision_available() or isinstance(error, ValueError) and not told:
            raise
        try:
            stills = without_videos(_named_class(name, options))
            return stills.from_pretrained(name, **options)
        except Exception as second:
            if not told:
                raise error from None
            raise ImportError(
                f'{name}: its processor needs torchvision: pip install "vispco[qwen]" (without it: '
                f"{second})"
            ) from error


def without_videos(processor: Any) -> Any:
    """A processor class that asks for no video processor, and is the same otherwise.

    What a folder says of its video half is kept as it is, and saved again. So the folder that
    `save_pretrained` writes loads whole where torchvision is.
    """

    class Stills(processor):
        #: The settings of the video half, as `processor_config.json` has them.
        videos: Any = None

        @classmethod
        def get_attributes(cls):
            return [part for part in super().get_attributes() if part != "video_processor"]

        @classmethod
        def from_pretrained(cls, name, **options):
            made = super().from_pretrained(name, **options)
            made.videos = _video_settings(name, options)
            return made

        def to_dict(self):
            return {
                **super().to_dict(),
                **({"video_processor": self.videos} if self.videos else {}),
            }

    Stills.__name__ = processor.__name__
    return Stills


def _video_settings(name: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """What a folder says of its videos; None where it says nothing."""
    from transformers.video_processing_utils import BaseVideoProcessor

    try:
        return BaseVideoProcessor.get_video_processor_dict(name, **options)[0]
    except OSError:
        return None


def _named_class(name: str, options: dict[str, Any]) -> Any:
    """The processor class that a folder names, or else that of its model's kind."""
    import transformers
    from transformers import AutoConfig, ProcessorMixin
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    with contextlib.suppress(OSError):
        settings = ProcessorMixin.get_processor_dict(name, **options)[0]
        if named := getattr(transformers, str(settings.get("processor_class")), None):
            return named
    return PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(name, **options))]
