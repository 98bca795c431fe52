"""What serving engines can do of a configuration: one drop before the language model, one number.

Settings, models and limits are as the released package of each has them, of the version named
here. They change: with another version, look there before you serve.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..config import PruningConfig


@dataclass(frozen=True)
class Engine:
    """How a serving engine is told to prune.

    name: as it writes itself. version: of which the rest is true. methods: {method that can rank
    there: what it prunes, and of which models}, first the one that ranks unless told otherwise.
    flags(drop, method): the setting, for the share of the tokens that goes. plugin: what vispco's
    own plug-in for the engine does, if there is one.
    """

    name: str
    version: str
    methods: Mapping[str, str]
    flags: Callable[[float, str], str]
    plugin: str = ""


def flags_for(engine: str, config: PruningConfig) -> tuple[str, list[str]]:
    """The setting of an engine that comes closest, and what it cannot express of a configuration.

    Closest is the drop before layer 0 that leaves as many tokens in the mean over the layers.
    Raises ValueError if that drops everything: no engine can.

    >>> flags, cannot = flags_for("vllm", PruningConfig("evs", [0.25] * 4))
    >>> flags
    '--video-pruning-rate 0.75'
    >>> cannot[0].split(":")[0]
    'vLLM 0.33.0 prunes videos alone, of some models'
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
    method = config.method
    if method not in found.methods:
        cannot.append(f"ranking by {method}: it ranks by {' or '.join(found.methods)}")
        method = next(iter(found.methods))
    if config.method_options:
        cannot.append(f"options of the method: {json.dumps(dict(config.method_options))}")
    cannot.append(f"{found.name} {found.version} prunes {found.methods[method]}")
    return found.flags(1 - keep, method), cannot


def _vllm(drop: float, method: str) -> str:
    rate = f"--video-pruning-rate {_rate(drop)}"
    return rate if method == "evs" else f"{rate} --video-pruning-method {method}"


def _sglang(drop: float, method: str) -> str:
    return f"--json-model-override-args '{{\"video_pruning_rate\": {_rate(drop)}}}'"


def _openvino(drop: float, method: str) -> str:
    # 100 would leave nothing.
    return f"generation_config.pruning_ratio = {min(99, round(100 * drop))}"


def _rate(drop: float) -> str:
    return f"{drop:.4g}"


ENGINES = {
    "vllm": Engine(
        "vLLM",
        "0.33.0",
        {
            "evs": "videos alone, of some models: pictures keep all their tokens, a film those of "
            "one frame at least",
            "vidcom2": "videos alone, of Qwen3-VL and models built on it: pictures keep all their "
            "tokens, a film one of each frame at least",
        },
        _vllm,
        "With the plug-in (pip install vispco[vllm]), vLLM runs any configuration that drops once, "
        "before layer 0, by a method that ranks pictures alone, on pictures too:\n"
        "VISPCO_CONFIG=config.json vllm serve MODEL",
    ),
    "sglang": Engine(
        "SGLang",
        "0.5.23",
        {
            "evs": "videos alone, of the Nemotron models: pictures and other models keep all their "
            "tokens, a film those of one frame at least"
        },
        _sglang,
    ),
    "openvino": Engine(
        "OpenVINO GenAI",
        "2026.4.1",
        {"cdpruner": "Qwen2-VL (no videos), Qwen2.5-VL and Qwen3-VL alone, by whole percents"},
        _openvino,
    ),
}
