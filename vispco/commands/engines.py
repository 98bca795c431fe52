"""What serving engines can do of a configuration: one drop before the language model, one number.

What each takes is as its documentation said in 2026. Flags change: look there before you serve.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from ..config import PruningConfig


@dataclass(frozen=True)
class Engine:
    """How a serving engine is told to prune.

    name: as it writes itself. method: the one that ranks there. prunes: what it prunes, and of
    which models. flags(drop): the setting, for the share of the tokens that goes.
    """

    name: str
    method: str
    prunes: str
    flags: Callable[[float], str]


def flags_for(engine: str, config: PruningConfig) -> tuple[str, list[str]]:
    """The setting of an engine that comes closest, and what it cannot express of a configuration.

    Closest is the drop before layer 0 that leaves as many tokens in the mean over the layers.
    Raises ValueError if that drops everything: no engine can.

    >>> flags, cannot = flags_for("vllm", PruningConfig("evs", [0.25] * 4))
    >>> flags, cannot
    ('--video-pruning-rate 0.75', ['vLLM prunes videos alone: pictures keep all their tokens'])
    """
    found, steps = ENGINES[engine], config.steps
    keep = sum(config.keep_ratios) / config.num_layers
    if not keep:
        raise ValueError(
            f"{found.name} cannot drop all visual tokens before the language model, and that is "
            f"what {config.describe()!r} does"
        )
    cannot = []
    if steps and list(steps) != [0]:
        where = ", ".join(map(str, steps))
        cannot.append(
            f"drops before layer {where}: it drops once, before layer 0. {100 * keep:.1f} % kept "
            "there is as many tokens in the mean over the layers, but other tokens"
        )
    if config.method != found.method:
        cannot.append(f"ranking by {config.method}: it ranks by {found.method}")
    if config.method_options:
        cannot.append(f"options of the method: {json.dumps(dict(config.method_options))}")
    cannot.append(f"{found.name} prunes {found.prunes}")
    return found.flags(1 - keep), cannot


def _percent(drop: float) -> str:
    return f"generation_config.pruning_ratio = {round(100 * drop)}"


def _rate(drop: float) -> str:
    return f"{drop:.4g}"


ENGINES = {
    "vllm": Engine(
        "vLLM",
        "evs",
        "videos alone: pictures keep all their tokens",
        lambda drop: f"--video-pruning-rate {_rate(drop)}",
    ),
    "sglang": Engine(
        "SGLang",
        "evs",
        "videos alone, of the Nemotron models: pictures and other models keep all their tokens",
        lambda drop: f"--json-model-override-args '{{\"video_pruning_rate\": {_rate(drop)}}}'",
    ),
    "openvino": Engine(
        "OpenVINO GenAI",
        "cdpruner",
        "Qwen2-VL, Qwen2.5-VL and Qwen3-VL alone, by whole percents",
        _percent,
    ),
}
