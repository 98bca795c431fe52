"""`plot_profile`: what a model does with its image, layer by layer, as a heat map; and in words."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from torch import Tensor

from ..config import PruningConfig
from ..utils.console import percent
from .figure import INK, MARKERS, budget_label, clean, percents, save
from .schedules import MARKER, draw_stairs

#: Added to a loss before its logarithm is taken. What is below it is pale: as good as 0.
FLOOR = 0.01
#: Most rows of the map. Models may have thousands of tokens.
ROWS = 128
#: Losses that the colour bar names.
_TICKS = (0, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
#: Shares of the tokens of which a table tells the loss.
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)


# ---- in words -----------------------------------------------------------------------------------
def findings(profile: Any) -> list[str]:
    """What a profile says, in a sentence each: the exit layer, the trap layers, and its price.

    >>> from vispco import Profile
    >>> rows = {1: {0: [2.0]}, 2: {0: [0.0]}}
    >>> findings(Profile({"fastv": {}}, "llava", 3, 8, "kl", [0.0], rows, {}, 12.5))[0]
    'From layer 2 on the image is dead weight: losing all of it costs at most 0.01 nats.'
    """
    said = [_exit(profile), _traps(profile), *_best(profile)]
    return [*said, f"Cost: {_price(profile)}."]


def _exit(profile: Any) -> str:
    layer = profile.exit()
    if layer is None:
        return "The image is needed up to the last layer."
    what = f"on the image is dead weight: losing all of it costs at most {FLOOR} nats."
    return f"From layer {layer} {what}"


def _traps(profile: Any) -> str:
    layers, method = profile.traps(), _ranking(profile)
    if not layers:
        return f"No layer ranks much worse than its neighbours with {method}."
    named = ", ".join(map(str, layers))
    one = len(layers) == 1
    return (
        f"{'Layer' if one else 'Layers'} {named} {'ranks' if one else 'rank'} badly with {method}."
    )


def _ranking(profile: Any) -> str:
    """Who ranks: a method's name, or how many methods were compared."""
    several = len(profile.methods)
    return clean(profile.method) if several == 1 else f"the best of {several} methods"


def _best(profile: Any) -> list[str]:
    """Of several methods, the best one at each layer before the exit, where half is kept."""
    if len(profile.methods) == 1:
        return []
    stop = profile.exit()
    layers = [k for k in profile.rows if stop is None or k < stop]
    runs = groupby(layers, key=lambda layer: profile.ranker(layer, profile.tokens / 2))
    named = []
    for name, run in runs:
        first, *others = run
        named.append(f"{clean(name)} at {first}" + (f" to {others[-1]}" if others else ""))
    return [f"Best where half is kept, by layer: {', '.join(named)}."] if named else []


def _price(profile: Any) -> str:
    measured = sum(map(len, profile.rows.values()))
    passes = f"{profile.forward_passes:,.0f} forward passes of one question"
    return f"{passes}, for {measured} measurements at {len(profile.rows)} layers"


def share_losses(profile: Any) -> dict[int, list[float]]:
    """{layer: the mean losses, in nats, of keeping SHARES of the tokens from it on}."""
    kept = [math.floor(share * profile.tokens) for share in SHARES]
    losses = profile.table()[:, kept].mean(-1)
    return {layer: losses[layer].tolist() for layer in profile.rows}


def losses_table(profile: Any) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of `share_losses`.

    >>> from vispco import Profile
    >>> rows = {1: {0: [2.0]}, 2: {0: [0.0]}}
    >>> losses_table(Profile({"fastv": {}}, "llava", 3, 8, "kl", [0.0], rows))[1][0]
    ['1', '2.000', '2.000', '1.125', '0.500', '0.125', '0.031']
    """
    rows = [[str(k), *(f"{x:.3f}" for x in row)] for k, row in share_losses(profile).items()]
    return ["layer", *(percent(share, 0) for share in SHARES)], rows


# ---- as a picture -------------------------------------------------------------------------------
def plot_profile(
    profile: Any, path: str | os.PathLike, configs: Sequence[PruningConfig] = ()
) -> None:
    """Draw the loss of keeping a share of the visual tokens from a layer on, to `.svg` or `.png`.

    Colour is the mean loss g_k(n) in nats, on the scale log(loss + 0.01): light is free, dark is
    dear. Dots are what was measured; between these it is as `Profile.table` says. Trap layers have
    a triangle above them, and a dashed line is before the exit layer.
    configs: schedules of the same model, drawn over it as stairs.

    The file is written atomically, and the same input gives the same bytes. Raises ValueError for
    another suffix, or a configuration of another number of layers; ImportError without matplotlib.

    >>> import tempfile
    >>> from vispco import Profile
    >>> rows = {1: {0: [2.0], 4: [0.5]}, 2: {0: [0.0]}}
    >>> profile = Profile({"fastv": {}}, "llava", 3, 8, "kl", [0.0], rows)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     plot_profile(profile, f"{folder}/profile.svg", [PruningConfig("fastv", [1, 0.5, 0])])
    """
    configs = list(configs)
    for config in configs:
        if config.num_layers != profile.layers:
            expected = f"configurations of the profile's {profile.layers} layers"
            raise ValueError(f"configs must be {expected}, got one of {config.num_layers}")
    save(path, lambda figure: draw_profile(figure, profile, configs), 6.8, 5.0)


def draw_profile(figure, profile: Any, configs: Sequence[PruningConfig] = ()) -> None:
    """The whole picture, on an empty figure."""
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    axes = figure.add_subplot()
    image = _draw_map(axes, profile)
    _draw_colour_bar(figure, axes, image, profile)
    _draw_measured(axes, profile)
    _mark(axes, profile)
    _draw_schedules(axes, configs)
    about = f"model: {clean(profile.model_type)}; ranked by {_ranking(profile)}"
    figure.suptitle(about, x=0.012, ha="left", fontsize=11, color=INK)
    axes.set_title("Loss of keeping fewer visual tokens", pad=18)
    space = {"handlelength": 2.0, "columnspacing": 1.4, "labelspacing": 0.35}
    columns = 2 if configs else 1
    figure.legend(loc="outside lower left", ncols=columns, **space)


def shades(profile: Any) -> tuple[list[int], Tensor]:
    """What the colours stand for: whole tokens, rising, and log(loss + 0.01) (layers, tokens)."""
    rows = min(profile.tokens, ROWS)
    counts = [round(i * profile.tokens / rows) for i in range(rows + 1)]
    return counts, (profile.table()[:, counts].mean(-1).clamp(min=0) + FLOOR).log()


def _draw_map(axes, profile: Any):
    """The colours, a column for each layer that can be pruned; the others are hatched."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    counts, heights = shades(profile)
    half = 0.5 / (len(counts) - 1)
    first, layers = profile.first_layer, profile.layers
    # Lightness falls all the way, so that grey prints and every kind of colour vision can read it.
    look = ListedColormap(colormaps["magma_r"](np.linspace(0, 0.92, 256)))
    image = axes.imshow(
        heights[first:].T.numpy(),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(first - 0.5, layers - 0.5, -half, 1 + half),
        cmap=look,
        vmin=math.log(FLOOR),
        vmax=max(math.log(1 + FLOOR), float(heights.max())),
    )
    if first:
        style: dict[str, Any] = {"facecolor": "none", "edgecolor": "#b5b5b5", "linewidth": 0}
        axes.axvspan(-0.5, first - 0.5, hatch="///", label="cannot be pruned", **style)
    axes.grid(False)
    axes.set(xlim=(-0.5, layers - 0.5), ylim=(-0.03, 1.03))
    axes.set(xlabel="decoder layer k", ylabel="visual tokens kept from layer k on")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    percents(axes.yaxis)
    return image


def _draw_colour_bar(figure, axes, image, profile: Any) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.06)
    shown = [loss for loss in _TICKS if math.log(loss + FLOOR) <= image.norm.vmax + 1e-9]
    bar.set_ticks([math.log(loss + FLOOR) for loss in shown], labels=[f"{x:g}" for x in shown])
    what = {"kl": "KL from the full model", "task": "loss of the answers"}[profile.objective]
    bar.set_label(f"{what}, nats")
    bar.outline.set_visible(False)


def _draw_measured(axes, profile: Any) -> None:
    places = [(k, n / profile.tokens) for k, row in profile.rows.items() for n in row]
    xs, ys = zip(*places, strict=True)
    size = min(3.5, 90 / profile.layers)
    style: dict[str, Any] = {"color": "white", "markeredgecolor": INK, "markeredgewidth": 0.5}
    axes.plot(xs, ys, "o", markersize=size, zorder=3, label="measured", **style)


def _draw_schedules(axes, configs: Sequence[PruningConfig]) -> None:
    """Stairs from cheap to dear, each on a white edge that sets it off from dark and light."""
    from matplotlib import colormaps

    ranked = sorted(configs, key=lambda config: sum(config.keep_ratios))
    for i, config in enumerate(ranked):
        # Blue to green: the map has neither.
        colour = colormaps["winter"](0.8 * i / max(1, len(ranked) - 1))
        style = {**MARKER, "color": colour, "marker": MARKERS[i % len(MARKERS)], "zorder": 5}
        inches = (i - (len(ranked) - 1) / 2) * min(2.0, 14 / len(ranked)) / 72
        draw_stairs(axes, config.keep_ratios, inches, 1.8, style, halo=1.2)
        label = "schedule" if config.budget is None else f"budget {budget_label(config.budget)}"
        axes.plot([], [], linewidth=1.8, label=label, **style)


def _mark(axes, profile: Any) -> None:
    """Trap layers and the exit layer, on the map and in words."""
    above = axes.get_xaxis_transform()
    if traps := profile.traps():
        style: dict[str, Any] = {"color": INK, "clip_on": False, "transform": above}
        axes.plot(traps, [1.03] * len(traps), "v", label=_traps(profile).rstrip("."), **style)
    if (layer := profile.exit()) is not None:
        line: dict[str, Any] = {"color": INK, "linestyle": (0, (4, 2)), "linewidth": 1.4}
        axes.axvline(layer - 0.5, label=_exit(profile).split(":")[0], **line)
        words: dict[str, Any] = {"ha": "left", "va": "bottom", "fontsize": 9, "transform": above}
        axes.text(layer - 0.5, 1.01, "exit", **words)
