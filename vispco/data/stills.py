"""A model's processor; without its video half where torchvision, which that needs, is missing."""

from __future__ import annotations

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
    """A processor class that asks for no video processor, and is the same otherwise."""

    class Stills(processor):
        @classmethod
        def get_attributes(cls):
            return [part for part in super().get_attributes() if part != "video_processor"]

    Stills.__name__ = processor.__name__
    return Stills


def _named_class(name: str, options: dict[str, Any]) -> Any:
    """The processor class of a model's kind."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    return PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(name, **options))]
