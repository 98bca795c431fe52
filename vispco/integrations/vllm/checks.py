"""What is looked at before vLLM builds a model: whether it can be pruned, under these settings."""

from __future__ import annotations

from math import ceil
from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from . import MODELS, VARIABLE, check_model, configured
from .positions import family


class Refused(VerifyAndUpdateConfig):
    """Of a model that the plug-in does not know: it would run unpruned, silently."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        raise ValueError(
            f"{VARIABLE} is set, and {model_config.architecture} is no model that is pruned: serve "
            f"one of {', '.join(MODELS)}, or unset it"
        )


class Served(VerifyAndUpdateConfig):
    """Of a model that is pruned."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        check_model(configured()[0], model_config.hf_config)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        multimodal = vllm_config.model_config.multimodal_config
        compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
        adapters, reads_tower = vllm_config.lora_config, configured()[1].method.reads_vision
        cannot = {
            "speculative decoding (--speculative-config)": vllm_config.speculative_config,
            "vLLM's own pruning (--video-pruning-rate)": multimodal.video_pruning_rate,
            "CUDA graphs of the vision tower (cudagraph_mm_encoder)": (
                compilation.cudagraph_mm_encoder
            ),
            # The positions of what is kept are known to the first process alone.
            "pipeline parallelism": parallel.pipeline_parallel_size > 1,
            "LoRA in the vision tower (enable_tower_connector_lora)": (
                adapters and adapters.enable_tower_connector_lora
            ),
            "a vision tower that is compiled (compile_mm_encoder), whose attention the method "
            "reads": reads_tower and compilation.compile_mm_encoder,
            "tensor parallelism, where each process has a part of the attention heads that the "
            "method reads": reads_tower and parallel.tensor_parallel_size > 1,
        }
        for what, found in cannot.items():
            if found:
                raise ValueError(
                    f"{VARIABLE} is set, and pruning does not go with {what}: leave it out, or "
                    "unset the variable"
                )


class ServedLlava(Served):
    """Of LLaVA, whose positions are single numbers.

    vLLM numbers the tokens of such models one after the other, whatever was dropped. Of a model
    with M-RoPE it asks positions, of three rows.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        Served.verify_and_update_model_config(model_config)
        config = model_config.hf_config
        text, tower = config.get_text_config(), config.vision_config.model_type
        kind = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
        if tower == "pixtral" or kind != "default":
            raise ValueError(
                f"{VARIABLE} is set, and of LLaVA models only those are pruned whose vision tower "
                "is CLIP or SigLIP and whose rotary embedding is of type 'default': this one has "
                f"{tower!r} and {kind!r}; unset it"
            )
        config.mrope_section = [1, 1, 1]
        # Positions count what was dropped, so the table of rotary embeddings reaches further than
        # the longest prompt.
        tokens = family(config).tokens_per_tile(config)
        kept = configured()[1].count(tokens)
        text.max_position_embeddings = ceil(text.max_position_embeddings * tokens / kept)


CHECKS = {name: ServedLlava if name.startswith("Llava") else Served for name in MODELS}
