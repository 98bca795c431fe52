"""The model `vispco` of lmms-eval: any vision-language model of Hugging Face, in full or pruned.

    lmms-eval --model vispco --tasks chartqa \\
        --model_args pretrained=FOLDER,pruning_config=config-0.5.json

Without `pruning_config` the same code runs the full model: the baseline and the pruned model differ
in nothing else.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL.Image import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from ..config import PruningConfig
from ..data.colours import in_rgb
from ..data.film import Film
from ..data.pictures import open_picture, open_video
from ..data.process import at_rate, check_times, metadata
from ..data.stills import load_processor
from ..data.template import read_template
from ..pruning import apply, check_fits
from ..registry import adapter_for

DTYPES = ("auto", "float32", "float16", "bfloat16")
#: Options of sampling: transformers warns when they come with greedy decoding.
SAMPLING = ("temperature", "top_p", "top_k")
#: Options of a task that `generate` gets.
PASSED_ON = ("max_new_tokens", "num_beams", "repetition_penalty", "do_sample", *SAMPLING)


class VispcoModel(lmms):
    """`--model vispco`; the parameters are lmms-eval's `--model_args name=value,...`.

    pretrained: folder or name, loaded with AutoModelForImageTextToText and AutoProcessor.
    pruning_config: a file that `PruningConfig.save` or `vispco search` wrote; None: the full model.
    dtype: auto (as stored), float32, float16 or bfloat16.
    device: auto, cpu, cuda, cuda:1, ...; under `accelerate launch` each process takes its own.
    device_map: for a model that needs several devices, "auto".
    attn_implementation: as in `from_pretrained`.
    chat_template: a Jinja file, for a processor that has none.
    max_num_frames: frames taken evenly from each video file. The processor gets their times.
    fps: frames per second of videos that a task gives as frames. Needed if the model reads times.
    trust_remote_code: run code that comes with the model; only if you say so.
    batch_size: comes from lmms-eval's `--batch_size`.

    Raises ValueError for arguments, files and models that do not fit, before the first question.
    """

    #: It wants messages for the chat template, not a string with placeholders.
    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        pruning_config: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        device_map: str | None = None,
        attn_implementation: str | None = None,
        chat_template: str | None = None,
        max_num_frames: int = 32,
        fps: float | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown,
    ):
        super().__init__()
        if unknown:
            raise ValueError(
                f"model_args has unknown names: {', '.join(sorted(unknown))}; see the docstring of "
                "vispco.integrations.lmms_eval.VispcoModel for those there are"
            )
        if not pretrained:
            needed = "pretrained=FOLDER_OR_NAME"
            raise ValueError(f"model_args lacks pretrained: pass --model_args {needed}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if not isinstance(trust_remote_code, bool):
            raise ValueError(f"trust_remote_code must be True or False, got {trust_remote_code!r}")
        self.batch_size = _positive("batch_size", batch_size)
        self.max_num_frames = _positive("max_num_frames", max_num_frames)
        self.fps = None if fps is None else _rate(fps)
        self.pruning = None if pruning_config is None else PruningConfig.load(pruning_config)

        kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        self.processor = load_processor(pretrained, **kwargs)
        # New tokens come after the prompt, in every row.
        self.processor.tokenizer.padding_side = "left"
        if chat_template is not None:
            self.processor.chat_template = read_template(chat_template)
        if not self.processor.chat_template:
            raise ValueError(
                f"the processor of {pretrained} has no chat template: pass chat_template=FILE.jinja"
            )
        if attn_implementation is not None:
            kwargs["attn_implementation"] = attn_implementation
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        if device_map is not None:
            kwargs["device_map"] = device_map
        model = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=dtype, **kwargs)
        self.model = model.eval()
        if device_map is None:
            own = self._world_size > 1 or device in (None, "auto")
            self.model.to(self.accelerator.device if own else device)
        self.device = self.model.device
        if self.pruning is not None:
            check_fits(self.pruning, adapter_for(self.model)(self.model))

    @torch.inference_mode()
    def generate_until(self, requests) -> list[str]:
        """One answer per request, in their order.

        Requests that share their generation options run in batches.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[2]), []).append(i)
        pruned = nullcontext() if self.pruning is None else apply(self.model, self.pruning)
        bar = tqdm(total=len(requests), desc="vispco", disable=self.rank != 0)
        answers: dict[int, str] = {}
        with pruned, bar:
            for indices in groups.values():
                for start in range(0, len(indices), self.batch_size):
                    chosen = indices[start : start + self.batch_size]
                    texts = self._answer([requests[i].args for i in chosen])
                    answers.update(zip(chosen, texts, strict=True))
                    bar.update(len(chosen))
        return [answers[i] for i in range(len(requests))]

    def _answer(self, batch: list[tuple]) -> list[str]:
        """Answers to requests with the same options.

        A request: (context, doc_to_messages, options, document id, task, split).
        """
        conversations = []
        for _, to_messages, _, document, task, split in batch:
            messages = ChatMessages(messages=to_messages(self.task_dict[task][split][document]))
            conversations.append(messages.to_hf_messages())
        parts = [part for turns in conversations for turn in turns for part in turn["content"]]
        for part in parts:
            if part["type"] == "image":
                part["image"] = _picture(part["image"])
        videos = [part for part in parts if part["type"] == "video"]
        films = [self._film(part) for part in videos]

        def made(fps: float) -> Any:
            return self._inputs(conversations, videos, at_rate(films, fps))

        task = f"task {batch[0][4]}"
        check_times(self.processor, films, made, task, "as --model_args fps=2")
        inputs = self._inputs(conversations, videos, films)
        inputs = inputs.to(self.device, dtype=self.model.dtype)
        options, until = generation_options(batch[0][2])
        output = self.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(output, skip_special_tokens=True)
        return [cut(text, until) for text in texts]

    def _inputs(self, conversations: list, videos: list[dict], films: list[Film]):
        """What the processor makes of the conversations. videos: the parts that hold the films."""
        media: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        for part, film in zip(videos, films, strict=True):
            part["video"] = film
        if films:
            media |= {"do_sample_frames": False, "video_metadata": metadata(films)}
        return self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            processor_kwargs=media,
        )

    def _film(self, part: dict) -> Film:
        """Frames of a video's file with their times, as calibration reads them; or a task's frames.

        Raises ValueError if a part of a video is asked for, or if a task gives anything else.
        """
        if "video_start" in part or "video_end" in part:
            raise ValueError(
                "this task asks for a part of a video, by its times; the model vispco takes whole "
                "videos"
            )
        given = part["video"]
        if isinstance(given, str):
            return open_video(given, frames=self.max_num_frames, fps=self.fps)
        if not isinstance(given, list | tuple) or not all(isinstance(x, Image) for x in given):
            raise ValueError(
                "expected a video's file or a list of its frames (PIL), got "
                f"{type(given).__name__}; the model vispco takes no other videos"
            )
        return Film([in_rgb(frame) for frame in given], self.fps, len(given), range(len(given)))

    def loglikelihood(self, requests):
        """Refused: lmms-eval hands a chat model requests to generate only."""
        raise NotImplementedError(
            "the model vispco generates answers; of this benchmark choose a task with "
            "output_type generate_until (for example seedbench, not seedbench_ppl)"
        )

    def generate_until_multi_round(self, requests):
        """Refused: several rounds are not supported."""
        raise NotImplementedError(
            "the model vispco answers in one round; choose a task with output_type generate_until"
        )


def _picture(given: Any) -> Any:
    """A task's picture with the pixels that calibration sees. Addresses are left as they are."""
    if isinstance(given, Image):
        return in_rgb(given)
    return open_picture(given) if isinstance(given, str) and os.path.isfile(given) else given


def generation_options(asked: dict) -> tuple[dict, list[str]]:
    """What a task asks for, as arguments of `generate` and the strings that end an answer.

    Greedy unless the task asks for a temperature above 0; 1024 new tokens unless it says how many.
    What is meant for single models (image_aspect_ratio, ...) is left out.

    >>> asked = {"until": "ASSISTANT:", "temperature": 0, "top_p": 1.0, "image_aspect_ratio": "pad"}
    >>> generation_options(asked)
    ({'max_new_tokens': 1024, 'do_sample': False}, ['ASSISTANT:'])
    """
    given = {name: asked[name] for name in PASSED_ON if asked.get(name) is not None}
    options = {"max_new_tokens": 1024, **given}
    samples = options.get("do_sample", True) and options.get("temperature", 0) > 0
    options["do_sample"] = bool(samples)
    if not samples:
        options = {k: v for k, v in options.items() if k not in SAMPLING}
    until = asked.get("until") or []
    return options, [until] if isinstance(until, str) else list(until)


def cut(text: str, until: list[str]) -> str:
    """`text` before the first of the strings `until`, without blanks at its ends.

    >>> cut(" red. ASSISTANT: blue", ["ASSISTANT:"])
    'red.'
    """
    return min((text.split(stop)[0] for stop in until if stop), key=len, default=text).strip()


def _positive(name: str, value) -> int:
    if isinstance(value, bool) or not str(value).isdigit() or int(value) < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)


def _rate(fps) -> float:
    try:
        rate = float(fps)
    except (TypeError, ValueError):
        rate = 0.0
    if isinstance(fps, bool) or not 0 < rate < float("inf"):
        raise ValueError(f"fps must be a positive number, got {fps!r}")
    return rate
