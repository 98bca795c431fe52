"""What was published: each method's own configurations, by name, with the figures that they give.

All are for LLaVA-1.5-7B, 32 decoder layers and 576 visual tokens, unless `Published` says so. For
another depth the steps go to the same relative depth. A preset holds a PruningConfig like any
other: apply it, count it, compare it with a search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

from ..config import PruningConfig
from ..registry import METHODS, build_method, is_composite
from ..utils.files import brief

LAYERS, VISUAL = 32, 576


@dataclass(frozen=True)
class Published:
    """A configuration as its authors state it.

    steps: {layer: fraction of the original tokens that enters it and those after it}.
    tokens: what that leaves of `n_visual`, step by step.
    source: where it stands.
    num_layers: decoder layers of the model that it was published for.
    n_text, convention: text tokens and convention of FLOPs of the published cost, if there is one:
        `share` of the full model's, or `flops` in the convention's unit.
    options: of the method.
    note: what a reader of the publication should know.
    """

    steps: Mapping[int, float]
    tokens: tuple[int, ...]
    source: str
    n_visual: int = VISUAL
    num_layers: int = LAYERS
    n_text: int = 0
    convention: str | None = None
    share: float | None = None
    flops: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Preset:
    """A configuration for a model, and the publication that it follows.

    Where several publications come to the same configuration, `published` is the first.
    """

    config: PruningConfig
    published: Published


def presets(method: str, num_layers: int = LAYERS, at: str = "depth") -> dict[str, Preset]:
    """The published configurations of a method, by name; none if nothing was published in full.

    num_layers: decoder layers of the model they are for.
    at: where the steps go. "depth": different layers of the publication go to different layers, as
        near as can be to the same relative depth, K / 32 * num_layers (or of as many as it was
        published for), and not before the first layer that the method can prune. In a model too
        shallow for that, configurations that come to the same schedule are given once, under all of
        their names: "k2-r50, k3-r50".
        "layer": at the very layers; without configurations that have steps below the last one.
    Raises ValueError for an unknown method, with the nearest name; if num_layers is no number of
    layers; or for another `at`.

    >>> presets("fastv")["k2-r50"].config.describe()
    'fastv: layer 2 keeps 50.0 % (drops 50.0 %)'
    >>> presets("pdrop", num_layers=8)["lambda-0.5"].config.keep_ratios
    (1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125)
    >>> {name: list(preset.config.steps) for name, preset in presets("fastv", 8).items()}
    {'k2-r50': [1], 'k3-r50': [2], 'k3-r75': [2]}
    """
    scorer = build_method(method) if is_composite(method) else METHODS.get(method)
    first_layer = scorer.first_layer
    if not isinstance(num_layers, int) or isinstance(num_layers, bool) or num_layers < 1:
        raise ValueError(
            f"num_layers must be the model's number of decoder layers, got {brief(num_layers, 40)}"
        )
    if at not in ("depth", "layer"):
        raise ValueError(f"at must be 'depth' or 'layer', got {at!r}")
    found: list[tuple[list[str], Preset]] = []
    known = PUBLISHED.get(method, {})
    depths = sorted(
        {k / published.num_layers for published in known.values() for k in published.steps}
    )
    moved = _at_relative_depth(depths, num_layers, first_layer)
    for name, published in known.items():
        steps = published.steps
        if at == "depth":
            steps = {moved[layer / published.num_layers]: r for layer, r in steps.items()}
        elif max(steps) >= num_layers:
            continue
        config = PruningConfig(method, _keep_ratios(steps, num_layers), published.options)
        same = [names for names, preset in found if preset.config == config]
        if same:
            same[0].append(name)
        else:
            found.append(([name], Preset(config, published)))
    return {", ".join(names): preset for names, preset in found}


def _at_relative_depth(
    depths: Sequence[float], num_layers: int, first_layer: int
) -> dict[float, int]:
    """{depth: layer of `num_layers`}: different ones stay different if there are enough layers.

    depths: published layers over the number of layers that they were published for.
    """
    exact = [depth * num_layers for depth in depths]
    near = [max(first_layer, int(place + 0.5)) for place in exact]
    around = [range(max(first_layer, n - 2), min(num_layers, n + 3)) for n in near]
    apart = [c for c in product(*around) if all(a < b for a, b in pairwise(c))]

    def moved(places: Sequence[int]) -> tuple[float, int]:
        both = zip(places, exact, near, strict=True)
        away = [(abs(place - e), abs(place - n)) for place, e, n in both]
        return sum(a for a, _ in away), sum(b for _, b in away)

    return dict(zip(depths, min(apart, key=moved, default=near), strict=True))


def _keep_ratios(steps: Mapping[int, float], num_layers: int) -> list[float]:
    layers = range(num_layers)
    return [min([r for layer, r in steps.items() if layer <= i], default=1.0) for i in layers]


def _of(layers: tuple[int, ...], tokens: tuple[int, ...], source: str, **more) -> Published:
    """A configuration that was published as token counts."""
    steps = {layer: n / VISUAL for layer, n in zip(layers, tokens, strict=True)}
    return Published(steps, tokens, source, **more)


_FASTV = "Chen et al., ECCV 2024, arXiv 2403.06764"
_SPARSEVLM = "Zhang et al., ICML 2025, arXiv 2410.04417"
_PDROP = "Xing et al., CVPR 2025, arXiv 2410.17247"
_VTW = "Lin et al., AAAI 2025, arXiv 2405.05803"
_VISIONZIP = "Yang et al., CVPR 2025, arXiv 2412.04467"
_VISPRUNER = "Zhang et al., ICCV 2025, arXiv 2412.01818"
_DART = "Wen et al., EMNLP 2025, arXiv 2502.11494"
_DIVPRUNE = "Alvar et al., CVPR 2025, arXiv 2503.02175"
_CDPRUNER = "Zhang et al., NeurIPS 2025, arXiv 2506.10967"
_HOLOV = "arXiv 2510.02912"
_PACT = "arXiv 2504.08966"
_VIDCOM2 = "Liu et al., EMNLP 2025, arXiv 2505.14454"
_AVERAGE = (
    "the name is the average over layers as the paper counts it: {} enter layers 2, 6 and 15, and "
    "to them are added a few merged tokens (a tenth of the best 30 % of those dropped), left out "
    "here. The code drops after these layers, and so does this configuration"
)

#: {method: {name: configuration}}. None of FitPrune: of its fitted counts only those of the first
#: layers are known; `vispco.fitprune_schedule` fits them. None of EVS, FEATHER, FrameFusion,
#: HiPrune, IVC-Prune, PruMerge and VScan: of these, layers or shares are known to us, but no whole
#: configuration.
PUBLISHED: dict[str, dict[str, Published]] = {
    "fastv": {
        "k2-r50": Published({2: 0.5}, (288,), _FASTV, n_text=64, convention="fastv", share=0.57),
        "k3-r50": Published({3: 0.5}, (288,), _FASTV),
        "k3-r75": Published({3: 0.25}, (144,), _FASTV),
    },
    "pdrop": {
        "lambda-0.5": Published(
            {8: 0.5, 16: 0.25, 24: 0.125}, (288, 144, 72), _PDROP, convention="pdrop", flops=1.78e12
        )
    },
    "sparsevlm": {
        "192": _of((3, 7, 16), (300, 200, 110), _SPARSEVLM, note=_AVERAGE.format("300, 200, 110")),
        "128": _of((3, 7, 16), (303, 110, 36), _SPARSEVLM, note=_AVERAGE.format("303, 110, 36")),
        "64": _of((3, 7, 16), (66, 30, 17), _SPARSEVLM, note=_AVERAGE.format("66, 30, 17")),
    },
    "vtw": {"k15": Published({15: 0.0}, (0,), _VTW), "k16": Published({16: 0.0}, (0,), _VTW)},
    "visionzip": {
        "192": _of((0,), (192,), _VISIONZIP, note="162 dominant and 30 contextual tokens"),
        "128": _of((0,), (128,), _VISIONZIP, note="108 dominant and 20 contextual tokens"),
        "64": _of((0,), (64,), _VISIONZIP, note="54 dominant and 10 contextual tokens"),
    },
    "vispruner": {
        str(n): _of((0,), (n,), _VISPRUNER, note=f"{n // 2} important and {n // 2} diverse tokens")
        for n in (128, 64, 32)
    },
    "dart": {
        "128": _of(
            (2,), (132,), _DART, note="4 visual pivots, and 16 tokens for each of 8: 132 in truth"
        )
    },
    "divprune": {"0.098": Published({0: 0.098}, (56,), _DIVPRUNE)},
    "holov": {
        "64": _of(
            (0,),
            (64,),
            _HOLOV,
            note="published as 11 % of the tokens; the number of crops is our choice",
        )
    },
    "pact": {
        "k4": Published(
            {4: 0.55},
            (316,),
            _PACT,
            num_layers=28,
            options={"adaptive": True},
            note="55 % at most: as many stay as there are clusters; for LLaVA-OneVision-7B",
        )
    },
    "vidcom2": {
        "0.25": Published(
            {0: 0.25},
            (1568,),
            _VIDCOM2,
            n_visual=32 * 196,
            num_layers=28,
            note="a film of 32 frames of 196 tokens; for LLaVA-OneVision-7B",
        )
    },
    "cdpruner": {str(n): _of((0,), (n,), _CDPRUNER) for n in (128, 64, 32)},
}
