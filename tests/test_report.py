"""The report of a search.

One page that is whole and self-contained, and that shows what came from data as text.
"""

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from vispco import Frontier, FrontierPoint, PruningConfig, testbed
from vispco.data import prompt
from vispco.plot import Overlay, plot_convergence, plot_frontier, plot_tokens, write_report
from vispco.plot.read import dots
from vispco.plot.tokens import kept_patches, seen
from vispco.pruning import Pruner
from vispco.testbed.model import EMBEDDED

torch.set_num_threads(1)
HOSTILE = (
    "</title><script>alert('x')</script><img src=x onerror=\"alert(1)\"> "
    "$\\frac $ & \x1b[31m \ud800"
)
STEPS = [
    {
        "budget": b,
        "step": i,
        "loss": 1 / (1 + i),
        "violation": 0.1 / (1 + i),
        "multiplier": float(i),
        "penalty": 100.0,
        "gradient": 0.5,
    }
    for b in (0.3, 0.7)
    for i in range(3)
]


def frontier(**meta):
    points = [
        FrontierPoint(PruningConfig("fastv", (1, s, s / 2)), s, 1e9 * s, s, 1 - s)
        for s in (0.3, 0.7)
    ]
    return Frontier(
        points,
        {"method": "fastv", "kernel": "monotone", "seed": 3, "versions": {"torch": "2"}, **meta},
    )


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of pictures."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def overlay(title, body="<g id='a'><path clip-path='url(#a)'/></g>"):
    return Overlay(
        title,
        lambda path: path.write_text(
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 9 9'>{body}</svg>"
        ),
    )


def test_hostile_names_and_questions_are_shown_as_text(tmp_path):
    pytest.importorskip("matplotlib")
    named = frontier(model=HOSTILE, data=HOSTILE, label=HOSTILE)
    write_report(
        tmp_path / "r.html",
        named,
        [{**s, "budget": HOSTILE} for s in STEPS],
        HOSTILE,
        [overlay(HOSTILE)],
    )
    page = Page(tmp_path / "r.html")
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "link", "base", "form", "img"}
    assert not [a for _, attrs in page.tags for a in attrs if a.lower().startswith("on")]
    assert page.text.count("<script>alert('x')</script>") >= 5


PAYLOADS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "<svg/onload=alert(1)>",
    "</title><script>alert(1)",
    "</style><script>alert(1)</script>",
    "</pre></td></table><iframe src=//x>",
    "</svg><script>alert(1)</script>",
    "]]><script>alert(1)</script>",
    "<![CDATA[<script>",
    "<!-- <script>",
    "--><script>",
    "javascript:alert(1)",
    "<a href=javascript:alert(1)>x</a>",
    "&lt;script&gt;",
    "&#60;script>",
    "<?xml version='1.0'?>",
    "<!DOCTYPE x [<!ENTITY y SYSTEM 'file:///etc/passwd'>]>&y;",
    "url(javascript:alert(1))",
    "expression(alert(1))",
    "{{7*7}}${7*7}",
    "\0<b>",
    "\u202e<b>",
    "\ud800<b>",
    "<b\n>",
    "\u2028<b>",
    "`<b>`",
    "<plaintext>",
    "<base href=//x>",
    "<meta http-equiv=refresh>",
]


class Outline(HTMLParser):
    """What a page is made of.

    Every element with the names of its attributes; values that could lead or do something; whatever
    is no element.
    """

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.values, self.others, self.text = set(), [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements |= {(tag, name) for name, _ in attrs} | {(tag, None)}
        self.values += [
            (name, value or "") for name, value in attrs if name not in ("aria-label", "content")
        ]

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.others.append(data)

    handle_pi = unknown_decl = handle_comment


def pictured(payload):
    """A page on which everything that a user, a file or a model could have named is `payload`."""
    from vispco.plot.figure import clean

    def drawing(path):
        plot_frontier({payload: frontier(label=payload, floor=payload, floor_kl=1)}, path)

    found = frontier(
        **{
            name: payload
            for name in ("method", "kernel", "label", "model", "data", "objective", "device")
        }
    )
    found.meta |= {
        payload: payload,
        "versions": {payload: payload},
        "nested": {"a": [payload]},
        "list": [payload],
    }
    found.points[0].metrics.update({payload: 0.5, "other": 0.5})
    found.points[1].metrics.update({"other": payload})
    points = [
        FrontierPoint(p.config, b, p.flops, p.share, p.loss, p.metrics)
        for p, b in zip(found.points, (payload, {payload: payload}), strict=True)
    ]
    steps = [{**s, "budget": payload} for s in STEPS]
    return clean(payload), Frontier(points, found.meta), steps, [Overlay(payload, drawing)]


def written(folder, payload):
    _, found, steps, overlays = pictured(payload)
    write_report(folder / "r.html", found, steps, payload, overlays, payload)
    return Outline((folder / "r.html").read_text(encoding="utf-8"))


def check_outline(outline, plain):
    """Nothing is on the page that is not on one with plain words, but for words."""
    assert outline.elements <= plain.elements and not outline.others
    assert not [
        v
        for name, v in outline.values
        if name in ("href", "xlink:href", "src") and not v.startswith(("#", "data:image/"))
    ]
    assert not [v for _, v in outline.values if "alert" in v or "javascript" in v or "<" in v]


def test_no_name_adds_an_element_or_an_attribute_to_the_page(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    plain = written(tmp_path, "words")
    for payload in PAYLOADS:
        outline = written(tmp_path, payload)
        check_outline(outline, plain)
        shown = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in payload)
        # As text, and whole.
        assert outline.text.count(shown) >= 12, payload


def test_no_name_adds_an_element_or_an_attribute_to_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    plain = written(tmp_path, "words")
    assert ("svg", "aria-label") in plain.elements
    for payload in (PAYLOADS[1], PAYLOADS[17] + PAYLOADS[7]):
        check_outline(written(tmp_path, payload), plain)


def test_the_page_needs_no_network(tmp_path):
    pytest.importorskip("matplotlib")
    write_report(
        tmp_path / "r.html", frontier(), STEPS, "vispco search", [overlay("q"), overlay("q")]
    )
    page = Page(tmp_path / "r.html")
    links = [
        v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "xlink:href")
    ]
    assert all(v.startswith(("#", "data:image/")) for v in links)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 20
    assert {v[1:] for v in links if v.startswith("#")} <= set(ids)
    assert [tag for tag, _ in page.tags].count("svg") == 4
    for word in (
        "vispco search",
        "seed",
        "torch 2",
        "violation",
        "multiplier",
        "penalty",
        "gradient",
        "70.0 %",
        "0.3000",
    ):
        assert word in page.text


def test_without_matplotlib_the_report_has_its_tables_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    write_report(tmp_path / "r.html", frontier(), STEPS, "vispco search", [overlay("q")])
    page = Page(tmp_path / "r.html")
    assert "svg" not in {tag for tag, _ in page.tags} and 'pip install "vispco[plot]"' in page.text
    assert [tag for tag, _ in page.tags].count("table") == 3 and "70.0 %" in page.text


def test_what_cannot_be_drawn_is_said(tmp_path):
    pytest.importorskip("matplotlib")

    def tiles(path):
        raise ValueError("5 <tiles>")

    write_report(tmp_path / "r.html", frontier(), overlays=[Overlay("q", tiles)])
    page = Page(tmp_path / "r.html")
    assert "No picture: 5 <tiles>" in page.text and "Nothing was searched step by step" in page.text


def test_refinement_is_a_table_of_its_own_with_and_without_steps(tmp_path):
    tried = [
        {"budget": b, "schedule": i, "loss": 1.0, "best": b / i} for b in (0.3, 0.7) for i in (1, 2)
    ]
    for steps in ([], STEPS):
        write_report(tmp_path / "r.html", frontier(), [*steps, *tried])
        text = "".join(Page(tmp_path / "r.html").text.split())
        assert "schedulesloss,nats0.320.150.720.35" in text
        assert "Nothingwassearched" not in text
        assert ("budgetstepslossviolation" in text) is bool(steps)


def test_the_columns_that_decide_come_first_and_the_recommended_budget_stands_out(tmp_path):
    metrics = {"calibration_accuracy": 0.9, "calibration_agreement": 0.95}
    points = [replace(point, metrics=metrics) for point in frontier().points]
    meta = {"method": "fastv, pdrop", "model": "m", "full_flops": 4e9, "recommended_budget": 0.7}
    write_report(tmp_path / "r.html", Frontier(points, meta))
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    headings = re.findall(r"<th[^>]*>([^<]+)</th>", text)
    assert headings[:4] == ["budget", "accuracy", "agreement", "FLOPs saved"]
    assert re.findall(r'<tr class="best"><td>([^<]+)</td>', text) == ["0.7"]
    assert "<h1>vispco: the best of 2 methods on m</h1>" in text


# ---- kept tokens ---------------------------------------------------------------------------------
def asked(name, side=None):
    Image = pytest.importorskip("PIL.Image")
    from vispco.commands.conversations import from_testbed

    model, processor = testbed.load(name)
    example = testbed.examples("test", 1)[0]
    inputs = prompt(processor, from_testbed(example, "q"))
    return model, processor, inputs, Image.fromarray(example.image)


@pytest.mark.parametrize("name", EMBEDDED)
def test_kept_patches_are_as_many_as_the_configuration_says_and_nested(name):
    model, _, inputs, _ = asked(name)
    layers = model.config.text_config.num_hidden_layers
    config = PruningConfig(
        "fastv",
        [1] * (layers // 2)
        + [0.5] * (layers // 4)
        + [0.125] * (layers - layers // 2 - layers // 4),
    )
    kept = kept_patches(model, inputs, config)
    first, second = kept.layers.values()
    assert list(kept.layers) == [layers // 2, layers // 2 + layers // 4]
    assert (int(first.sum()), int(second.sum())) == (32, 8) and kept.rows == kept.columns == 8
    assert not bool((second & ~first).any())


def test_kept_tokens_stand_where_they_are_in_the_picture(monkeypatch):
    """Of tokens in raster order the first half is the upper half of the picture."""
    model, _, inputs, _ = asked("testbed-llava")
    visual = inputs["input_ids"] == model.config.image_token_id
    monkeypatch.setattr(Pruner, "kept", lambda self: {2: visual & (visual.cumsum(1) <= 32)})
    mask = kept_patches(model, inputs, PruningConfig("fastv", [1, 1, *[0.5] * 6])).layers[2]
    assert bool(mask[:4].all()) and not bool(mask[4:].any())


def test_tokens_are_drawn_and_several_prompts_refused(tmp_path):
    pytest.importorskip("matplotlib")
    model, processor, inputs, picture = asked("testbed-llava")
    config = PruningConfig("fastv", [1, 1, *[0.5] * 6])
    plot_tokens(model, processor, inputs, picture, config, tmp_path / "a.svg", HOSTILE)
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert "layer 2: 32 of 64 enter" in "".join(root.itertext())
    with pytest.raises(ValueError, match="one prompt with a picture"):
        kept_patches(model, testbed.batches("test", 2, 2)[0], config)


def test_what_a_processor_crops_off_is_not_shown():
    Image = pytest.importorskip("PIL.Image")
    images = type(
        "I",
        (),
        {
            "do_center_crop": True,
            "do_resize": True,
            "size": {"shortest_edge": 100},
            "crop_size": {"height": 100, "width": 100},
        },
    )
    assert seen(type("P", (), {"image_processor": images}), Image.new("RGB", (300, 200))).size == (
        200,
        200,
    )
    assert seen(type("P", (), {}), Image.new("RGB", (300, 200))).size == (300, 200)


# ---- several seeds, dominated points -------------------------------------------------------------
def test_seeds_become_means_with_standard_deviations():
    def seeded(loss):
        return Frontier(
            [FrontierPoint(PruningConfig("fastv", (1, 0.5)), 0.5, 1e9, 0.5, loss)], {"seed": loss}
        )

    (dot,) = dots([seeded(0.1), seeded(0.2), seeded(0.3)], "share", "kl")
    assert dot.y == pytest.approx(0.2) and dot.bar == pytest.approx((0.1, 0.3))


def test_a_point_that_costs_more_and_gives_less_is_not_best():
    worse = FrontierPoint(PruningConfig("fastv", (1, 0.9)), 0.9, 2e9, 0.9, 0.8)
    marks = dots([Frontier([*frontier().points, worse])], "share", "kl")
    assert [d.best for d in marks] == [True, True, False]


def test_frontiers_of_other_seeds_are_one_run(tmp_path):
    pytest.importorskip("matplotlib")
    plot_frontier(
        [frontier(seed=0), frontier(seed=1), frontier(seed=0, kernel="linear")], tmp_path / "a.svg"
    )
    text = [
        t.text
        for t in ElementTree.parse(tmp_path / "a.svg").getroot().iter()
        if t.tag.endswith("}text")
    ]
    assert (
        "fastv, monotone kernel (mean ± s.d. of 2 seeds)" in text and "fastv, linear kernel" in text
    )
    with pytest.raises(ValueError, match="no steps"):
        plot_convergence([], tmp_path / "b.svg")


# ---- in a browser --------------------------------------------------------------------------------
def chromium():
    """A browser that is installed: on the path, or playwright's."""
    found = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if found:
        return found
    try:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as driver:
            path = driver.chromium.executable_path
        return path if shutil.which(path) else None
    except Exception:
        return None


def test_chromium_shows_it(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    browser = chromium()
    if browser is None:
        pytest.skip("no Chromium is installed")
    write_report(tmp_path / "r.html", frontier(), STEPS, "vispco search", [overlay("q")])
    subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=1200,2400",
            f"--screenshot={tmp_path / 's.png'}",
            (tmp_path / "r.html").as_uri(),
        ],
        check=True,
        timeout=60,
        capture_output=True,
    )
    picture = Image.open(tmp_path / "s.png").convert("RGB")
    assert picture.width == 1200
    # The first frontier's blue.
    assert (0, 114, 178) in {c for _, c in picture.getcolors(2**24)}
