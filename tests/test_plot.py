"""plot_frontier: files that are whole, valid, deterministic and complete, and errors that help."""

import xml.etree.ElementTree as ElementTree

import pytest

from vispco import Frontier, FrontierPoint, PruningConfig
from vispco.plot import plot_frontier
from vispco.plot.trade_off import _side

pytest.importorskip("matplotlib")
BUDGETS = (0.2, 0.5, "1.2 GFLOPs")


def point(budget, ratios=(1, 0.6, 0.2), share=0.5, **metrics):
    return FrontierPoint(
        PruningConfig("fastv", ratios), budget, 1e9 * share, share, 0.5 - share / 3, metrics
    )


def competitors():
    grid = [
        {
            "kind": "grid",
            "label": f"layer 1, keep {k}",
            "share": k / 8,
            "flops": k * 1e8,
            "accuracy": 0.3 + k / 16,
            "kl": 2 - k / 8,
        }
        for k in range(8)
    ]
    chance = [
        {
            "kind": "random",
            "label": f"random {i}",
            "budget": b,
            "share": b,
            "flops": b * 1e9,
            "accuracy": b - i / 20,
            "kl": 1 - b + i / 9,
        }
        for b in (0.2, 0.5)
        for i in range(4)
    ]
    single = {"flops": 6e8, "accuracy": 0.7, "kl": 0.4}
    return (
        grid
        + chance
        + [
            {"kind": "selected", "label": "layer 1, keep 3", "share": 0.3, **single},
            {"kind": "published", "label": "K=2, drop 50%", "share": 0.6, **single},
            {"kind": "published", "label": "K=3, drop 50%", "share": 0.97, **single},
        ]
    )


@pytest.fixture
def full():
    """A frontier with everything that a plot can show."""
    points = [
        point(
            b,
            (1, s, s / 2),
            s,
            accuracy=0.4 + s / 2,
            interval=[0.3 + s / 2, 0.45 + s / 2],
            kl=0.4 - s / 3,
        )
        for b, s in zip(BUDGETS, (0.19, 0.49, 0.8), strict=True)
    ]
    return Frontier(
        points,
        {
            "method": "fastv",
            "kernel": "monotone",
            "competitors": competitors(),
            "full_accuracy": 0.9,
            "floor_accuracy": 0.25,
            "floor": "blind",
            "floor_kl": 3.0,
        },
    )


def texts(path):
    """Every text of an SVG that parses."""
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("svg")
    return ["".join(node.itertext()) for node in root.iter() if node.tag.endswith("}text")]


def test_svg_holds_every_label_as_text(full, tmp_path):
    plot_frontier(full, tmp_path / "a.svg")
    shown = texts(tmp_path / "a.svg")
    for label in (
        "fastv, monotone kernel",
        "full model: 90.0 %",
        "blind: 25.0 %",
        "K=2, drop 50%",
        "K=3, drop 50%",
        "20 %",
        "50 %",
        "1.2 GFLOPs",
        "every single-layer configuration (8; line: best in hindsight; square: by KL)",
        "random schedules (8; bar: mean ± s.d.)",
        "published defaults",
        "held-out accuracy",
        "decoder layer",
        "keep ratio",
    ):
        assert label in shown, label
    assert [p.name for p in tmp_path.iterdir()] == ["a.svg"]


@pytest.mark.parametrize("suffix", ["svg", "png", "SVG"])
@pytest.mark.parametrize("options", [{}, {"y": "kl"}, {"x": "flops"}])
def test_same_input_same_bytes(full, tmp_path, suffix, options):
    import matplotlib

    plot_frontier(full, tmp_path / f"a.{suffix}", **options)
    before = dict(matplotlib.rcParams)
    # A user's own style.
    matplotlib.rcParams["lines.linewidth"] = 9.0
    try:
        plot_frontier(full, tmp_path / f"b.{suffix}", **options)
        assert matplotlib.rcParams["lines.linewidth"] == 9.0
    finally:
        matplotlib.rcParams.update(before)
    first = (tmp_path / f"a.{suffix}").read_bytes()
    assert first == (tmp_path / f"b.{suffix}").read_bytes()
    if suffix == "png":
        from PIL import Image

        assert min(Image.open(tmp_path / "a.png").size) > 500


def test_nothing_is_clipped(full, tmp_path):
    """No ink touches the border of the picture."""
    from PIL import Image, ImageChops

    plot_frontier(
        {"a very long name of a frontier, longer than any kernel's": full, "b": full},
        tmp_path / "a.png",
    )
    picture = Image.open(tmp_path / "a.png").convert("L")
    ink = ImageChops.invert(picture).getbbox()
    assert ink[0] > 0 and ink[1] > 0 and ink[2] < picture.width and ink[3] < picture.height


def test_without_metrics_the_kl_is_drawn(tmp_path):
    plot_frontier(Frontier([point(0.2, share=0.2), point(0.7, share=0.7)]), tmp_path / "a.svg")
    assert "KL to the full model (nats, lower is better)" in texts(tmp_path / "a.svg")


@pytest.mark.parametrize("ratios", [(1.0,), (1, 1, 1), (1, 0, 0), (1.0,) * 32 + (0.1,) * 32])
def test_one_point(tmp_path, ratios):
    plot_frontier(Frontier([point(0.5, ratios, accuracy=0.0)]), tmp_path / "a.svg")
    assert "50 %" in texts(tmp_path / "a.svg")


def test_many_budgets_and_a_kl_of_zero(tmp_path):
    points = [
        FrontierPoint(
            PruningConfig("fastv", [1, i / 15]), i / 15, i, i / 15, max(0, 1 - i / 15) ** 8
        )
        for i in range(16)
    ]
    plot_frontier(Frontier(points), tmp_path / "a.svg")
    assert "100 %" in texts(tmp_path / "a.svg")


def test_several_frontiers_get_a_panel_each(full, tmp_path):
    other = Frontier([point(0.5, accuracy=0.6)], {"method": "pdrop", "kernel": "linear"})
    plot_frontier([full, other, other], tmp_path / "a.svg")
    shown = texts(tmp_path / "a.svg")
    assert shown.count("pdrop, linear kernel") == 2 and shown.count("pdrop, linear kernel (3)") == 2
    assert shown.count("budget") == 3
    plot_frontier({"first": full, "second": other}, tmp_path / "b.svg")
    assert {"first", "second"} <= set(texts(tmp_path / "b.svg"))


def with_meta(**meta):
    return Frontier([point(0.5, accuracy=0.6)], meta)


@pytest.mark.parametrize(
    ("frontiers", "options", "words"),
    [
        (with_meta(), {"x": "latency"}, "x must be one of share, flops"),
        (with_meta(), {"y": "loss"}, "y must be one of accuracy, kl"),
        (Frontier([]), {}, "empty"),
        ([], {}, "empty"),
        (Frontier([point(0.5)]), {"y": "accuracy"}, "no point has an accuracy"),
        (
            Frontier([FrontierPoint(point(0.5).config, 0.5, 1, 1, 1, None)]),
            {},
            "metrics must be an object",
        ),
        (Frontier([point([0.5])]), {}, "budget a number or text"),
        (with_meta(competitors={}), {}, "list of objects"),
        (with_meta(competitors=[{"kind": "rival"}]), {}, "kind must be one of"),
        (
            with_meta(competitors=[{"kind": "grid", "share": "x", "accuracy": 1}]),
            {},
            "share must be a finite",
        ),
        (with_meta(full_accuracy="high"), {}, "full_accuracy must be a finite number"),
        (Frontier([point(0.5, accuracy="high")]), {}, "accuracy must be a finite number"),
    ],
)
def test_bad_input(tmp_path, frontiers, options, words):
    with pytest.raises(ValueError, match=words):
        plot_frontier(frontiers, tmp_path / "a.svg", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.svg.gz"])
def test_wrong_suffix(full, tmp_path, name):
    with pytest.raises(ValueError, match=r"must end in \.svg or \.png"):
        plot_frontier(full, tmp_path / name)


def test_without_matplotlib(full, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "vispco\[plot\]"'):
        plot_frontier(full, tmp_path / "a.svg")


# ---- one look -----------------------------------------------------------------------------------
def drawn(draw):
    """The figure that `draw` made, laid out."""
    from vispco.plot import figure

    kept = []
    figure.render(lambda f: (kept.append(f), draw(f)), 11.5, 5.2, "svg")
    return kept[0]


def many(n=9):
    """As many budgets, whose schedules begin at all tokens and end at none."""
    shares = [(i + 1) / (n + 1) for i in range(n)]
    return Frontier([point(s, (1, 1, s, s / 2, 0), s) for s in shares], {"kernel": "monotone"})


def test_no_schedule_leaves_the_range_from_none_to_all():
    """Lines are set apart, but none is above 100 % or below 0 %, on the page either."""
    from vispco.plot.schedules import draw_schedules, looks

    frontier = many()

    def draw(f):
        draw_schedules(f.add_subplot(), [frontier], looks({"a": [frontier]}), crowded=1)

    (axes,) = drawn(draw).axes
    lines = [line for line in axes.lines if len(line.get_ydata())]
    assert len(lines) == 2 * len(frontier)
    low, high = (axes.transData.transform((0, y))[1] for y in (0, 1))
    heights = set()
    for line in lines:
        shown = line.get_transform().transform(line.get_xydata())[:, 1]
        assert low - 1e-6 <= shown.min() and shown.max() <= high + 1e-6
        heights.add(round(float(shown[-1]), 3))
    # Where all tokens or none are kept, that is what is drawn.
    assert heights == {round(float(low), 3)}


def test_legends_have_six_entries_at_most():
    from vispco.plot.figure import MOST_ENTRIES
    from vispco.plot.frontiers import _draw_legend
    from vispco.plot.read import runs, trade_off
    from vispco.plot.schedules import draw_schedules, looks
    from vispco.plot.trade_off import draw_trade_off

    others = competitors()
    others += [{**others[-1], "kind": kind} for kind in ("fitted", "coarse")]
    found = [
        Frontier(many().points, {"label": f"run {i}", "competitors": others}) for i in range(4)
    ]
    for group in (found[:1], found):
        named = runs(group)
        shown = trade_off(named, "share", "kl")

        def draw(f, named=named, shown=shown):
            left, right = f.subplots(1, 2)
            draw_trade_off(left, shown)
            _draw_legend(f, left, first=shown.curves)
            draw_schedules(right, next(iter(named.values())), looks(named), crowded=1)

        figure = drawn(draw)
        legends = [*figure.legends, figure.axes[1].get_legend()]
        counts = [len(legend.get_texts()) for legend in legends]
        assert max(counts) <= MOST_ENTRIES and min(counts) > 4, counts


def test_model_and_data_are_named(tmp_path):
    plot_frontier(Frontier([point(0.5)], {"model": "m", "data": "d.jsonl"}), tmp_path / "a.svg")
    assert "model: m; data: d.jsonl" in texts(tmp_path / "a.svg")


def test_names_do_not_cut_error_bars(full):
    """The boxes of the published configurations' names are beside every bar."""
    from matplotlib.text import Annotation

    from vispco.plot.read import runs, trade_off
    from vispco.plot.trade_off import draw_trade_off

    shown = trade_off(runs(full), "share", "accuracy")
    figure = drawn(lambda f: draw_trade_off(f.add_subplot(), shown))
    (axes,) = figure.axes
    names = [c for c in axes.get_children() if isinstance(c, Annotation) and "K=" in c.get_text()]
    bars = [dot for curve in shown.curves.values() for dot in curve if dot.bar]
    assert len(names) == 2 and bars
    for name in names:
        box = name.get_window_extent().transformed(axes.transData.inverted())
        for dot in bars:
            outside = box.x1 < dot.x or box.x0 > dot.x
            assert outside or box.y0 > dot.bar[1] or box.y1 < dot.bar[0], name.get_text()


@pytest.mark.parametrize("losses", [(0.31, 0.33), (1e-5, 1e-4), (0.001, 2.0), (0.2, 0.9)])
def test_a_plot_of_two_points_has_numbers_at_its_axis(losses, tmp_path):
    points = [point(b, share=b) for b in (0.3, 0.6)]
    points = [
        FrontierPoint(p.config, p.budget, p.flops, p.share, loss)
        for p, loss in zip(points, losses[::-1], strict=True)
    ]
    plot_frontier(Frontier(points), tmp_path / "a.svg", y="kl")
    numbers = [t.removeprefix("≤ ") for t in texts(tmp_path / "a.svg")]
    ticks = {n for n in numbers if n.replace(".", "").isdigit()} - set(map(str, range(9)))
    assert len(ticks) >= 2, numbers


def test_no_panel_of_kept_tokens_stays_empty_where_that_can_be():
    from vispco.plot.tokens import _columns

    for count in range(1, 13):
        columns = _columns(count)
        assert columns <= 4 and -count % columns <= (2 if count == 10 else 1)


def test_the_name_of_a_line_goes_where_it_covers_nothing():
    covered = [(0.85, 0.93), (0.85, 0.88), (0.1, 0.93)]
    assert _side(0.9, 0.25, []) == ("right", 1)
    assert _side(0.9, 0.25, covered[:1]) == ("left", 1)
    assert _side(0.9, 0.25, covered) == ("left", -1)
