"""A profile as a picture and in words: the colours are the losses, and nothing is left unsaid."""

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from vispco import Frontier, FrontierPoint, Profile, PruningConfig
from vispco.plot import plot_profile, write_report
from vispco.plot.profile import ROWS, SHARES, draw_profile, findings, losses_table, shades

TOKENS = 16


def profile(rows, tokens=TOKENS, layers=None, model="llava", **more):
    """A profile of two answer tokens, of which the second loses half as much."""
    rows = {k: {n: [loss, loss / 2] for n, loss in row.items()} for k, row in rows.items()}
    layers = layers or 1 + max(rows)
    return Profile({"fastv": {}}, model, layers, tokens, "kl", [0.0, 0.0], rows, **more)


def trapped(**more):
    """Layers 2 and 4 rank badly; from layer 6 on nothing is lost."""
    half = {1: 0.2, 2: 2.0, 3: 0.1, 4: 1.0, 5: 0.02}
    rows = {k: {0: 3.0, TOKENS // 2: loss} for k, loss in half.items()}
    return profile({**rows, 6: {0: 0.0}, 7: {0: 0.0}}, **more)


def texts(path):
    root = ElementTree.parse(path).getroot()
    return ["".join(node.itertext()) for node in root.iter() if node.tag.endswith("}text")]


# ---- in words ------------------------------------------------------------------------------------
def test_findings_name_traps_exit_and_price():
    said = findings(trapped(forward_passes=1234.0))
    assert said[0].startswith("From layer 6 on the image is dead weight")
    assert said[1] == "Layers 2, 4 rank badly with fastv."
    assert said[2] == (
        "Cost: 1,234 forward passes of one question, for 12 measurements at 7 layers."
    )
    alone = profile({1: {0: 9, 8: 0.1}, 2: {0: 9, 8: 4}, 3: {0: 9, 8: 0.1}})
    assert findings(alone)[:2] == [
        "The image is needed up to the last layer.",
        "Layer 2 ranks badly with fastv.",
    ]
    assert findings(profile({0: {0: 1.0}}))[1].startswith("No layer ranks much worse")


def test_the_table_is_of_the_mean_losses():
    header, rows = losses_table(trapped())
    assert len(header) == len(rows[0]) == 1 + len(SHARES)
    # At no token both losses are measured; at half of them too.
    where = {"0 %": 0, "50 %": TOKENS // 2}
    for share, tokens in where.items():
        column = header.index(share)
        for k, *_ in rows:
            row = trapped().rows[int(k)]
            if tokens in row:
                assert rows[int(k) - 1][column] == f"{sum(row[tokens]) / 2:.3f}"


# ---- as a picture --------------------------------------------------------------------------------
@st.composite
def profiles(draw):
    layers, first = draw(st.integers(2, 9)), draw(st.integers(0, 1))
    losses = st.floats(0, 12)
    counts = st.sets(st.integers(1, TOKENS - 1), max_size=4)
    rows = {k: {0: draw(losses)} for k in range(first, layers)}
    for row in rows.values():
        row |= {n: draw(losses) for n in sorted(draw(counts))}
    return profile(rows)


def interpolated(found, layer, tokens):
    """The mean loss between the measurements, by numpy: the root of each is linear."""
    row = {**found.rows[layer], found.tokens: found.full}
    xs = sorted(row)
    roots = [np.interp(tokens, xs, [row[n][a] ** 0.5 for n in xs]) for a in range(2)]
    return sum(root**2 for root in roots) / 2


@settings(max_examples=8)
@given(profiles())
def test_every_colour_is_the_loss_at_its_place(found):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    draw_profile(figure, found)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    axes, bar = figure.axes
    (image,) = axes.images
    # What the colour bar says: the height of a label is the loss that it names.
    for tick, label in zip(bar.get_yticks(), bar.get_yticklabels(), strict=True):
        assert tick == pytest.approx(math.log(float(label.get_text()) + 0.01))
    scale = np.linspace(image.norm.vmin, image.norm.vmax, 1024)
    colours = image.cmap(image.norm(scale))[:, :3]
    for layer in found.rows:
        for tokens in range(0, TOKENS + 1, 3):
            # Beside the dots, which are in the middle of a column.
            x, y = axes.transData.transform((layer + 0.3, tokens / TOKENS))
            seen = pixels[pixels.shape[0] - 1 - int(y), int(x)]
            shown = scale[np.abs(colours - seen).sum(1).argmin()]
            expected = math.log(interpolated(found, layer, tokens) + 0.01)
            assert shown == pytest.approx(expected, abs=0.06)


def test_darker_is_always_worse():
    """In grey too: lightness (CIE L*) falls by about the same from step to step."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    draw_profile(figure, trapped())
    colours = figure.axes[0].images[0].cmap(np.linspace(0, 1, 32))[:, :3]
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16
    falls = -np.diff(lightness)
    assert falls.min() > 1 and falls.max() < 3 * falls.min()


def test_the_picture_says_what_it_shows(tmp_path):
    pytest.importorskip("matplotlib")
    ratios = {0.3: [1, 0.5, 0.2, 0, 0, 0, 0, 0], 0.7: [1] * 6 + [0] * 2}
    configs = (PruningConfig("fastv", r, budget=b) for b, r in ratios.items())
    plot_profile(trapped(), tmp_path / "a.svg", configs)
    shown = texts(tmp_path / "a.svg")
    for text in (
        "model: llava; ranked by fastv",
        "Loss of keeping fewer visual tokens",
        "Layers 2, 4 rank badly with fastv",
        "From layer 6 on the image is dead weight",
        "exit",
        "measured",
        "cannot be pruned",
        "budget 30 %",
        "budget 70 %",
        "decoder layer k",
        "visual tokens kept from layer k on",
        "KL from the full model, nats",
        "100 %",
        "0.01",
        "0.1",
        "1",
    ):
        assert text in shown, text
    plot_profile(profile({0: {0: 1.0}, 1: {0: 1.0}}), tmp_path / "b.svg")
    plain = texts(tmp_path / "b.svg")
    assert not [t for t in plain if re.search("exit|badly|dead|budget|pruned", t)]


def test_files_are_whole_and_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    for kind, begins in (("svg", b"<?xml"), ("png", b"\x89PNG")):
        plot_profile(trapped(), tmp_path / f"a.{kind}")
        trapped().plot(tmp_path / f"b.{kind}")
        first, second = ((tmp_path / f"{name}.{kind}").read_bytes() for name in "ab")
        assert first == second and first.startswith(begins)
    assert len(list(tmp_path.iterdir())) == 4


def test_thousands_of_tokens_are_few_rows():
    counts, heights = shades(profile({0: {0: 1.0}, 1: {0: 0.0}}, tokens=5000))
    assert counts[0] == 0 and counts[-1] == 5000 and len(counts) == ROWS + 1
    assert heights.shape == (2, ROWS + 1)
    assert torch.equal(heights[1], torch.full_like(heights[1], math.log(0.01)))
    assert shades(profile({0: {0: 1.0}}))[0] == list(range(TOKENS + 1))


def test_what_cannot_be_drawn_is_refused(tmp_path, monkeypatch):
    for name in ("a.pdf", "a"):
        with pytest.raises(ValueError, match=r"must end in \.svg or \.png"):
            trapped().plot(tmp_path / name)
    with pytest.raises(ValueError, match="the profile's 8 layers, got one of 2"):
        plot_profile(trapped(), tmp_path / "a.svg", [PruningConfig("fastv", [1, 0.5])])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "vispco\[plot\]"'):
        trapped().plot(tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


# ---- on the page of a search ---------------------------------------------------------------------
HOSTILE = "</svg><script>alert('x')</script>"


def frontier():
    config = PruningConfig("fastv", [1, 0.5, *[0.2] * 6])
    return Frontier([FrontierPoint(config, 0.5, 1e9, 0.5, 0.25)], {"method": "fastv"})


@pytest.mark.parametrize("pictures", [True, False])
def test_the_report_has_a_section_about_the_model(tmp_path, monkeypatch, pictures):
    if pictures:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    write_report(tmp_path / "a.html", frontier(), profile=trapped(model=HOSTILE))
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    section = page.split("What your model does with its image")[1].split("<h2>")[0]
    assert "<li>Layers 2, 4 rank badly with fastv.</li>" in section and "<table>" in section
    assert "<script" not in page
    # The map, and the frontier's schedule over it.
    assert ("budget 50 %" in section and 'role="img"' in section) is pictures
    assert ("pip install &quot;vispco[plot]&quot;" in section) is not pictures
    write_report(tmp_path / "b.html", frontier())
    assert "What your model does" not in (tmp_path / "b.html").read_text(encoding="utf-8")


def test_of_several_methods_the_best_are_named_by_layer():
    """Consecutive layers together, up to the exit; the picture's title stays short."""
    rows = {k: {0: [2.0 * (k < 5), 2.0 * (k < 5)], 4: [0.3, 0.3]} for k in range(1, 6)}
    names = {1: "fastv", 2: "pdrop", 3: "pdrop", 4: "fastv", 5: "pdrop"}
    ranks = {k: {0: "fastv", 4: name} for k, name in names.items()}
    methods = dict.fromkeys(["fastv", "pdrop", "visionzip"], {})
    several = Profile(methods, "llava", 6, 8, "kl", [0.0, 0.0], rows, ranks)
    said = "Best where half is kept, by layer: fastv at 1, pdrop at 2 to 3, fastv at 4."
    assert said in findings(several)
    figure = pytest.importorskip("matplotlib.figure").Figure(layout="constrained")
    draw_profile(figure, several)
    assert figure.get_suptitle() == "model: llava; ranked by the best of 3 methods"
