"""A frontier in Python: a sequence, a table, a picture; and what is no configuration."""

import sys
from unittest import mock

import pytest
import torch

import vispco
from tiny import batch, make
from vispco import Frontier, FrontierPoint, PruningConfig, kernels
from vispco.config import as_config

torch.set_num_threads(1)
LAYERS = 6


def point(budget=0.5, share=0.4, loss=0.1, **metrics):
    config = PruningConfig("fastv", [1, 1, 0.5, 0.5, 0.25, 0], n_visual=16, budget=budget)
    return FrontierPoint(config, budget, share * 5e9, share, loss, metrics)


@pytest.fixture
def curve():
    """Three points, given in another order than that of their FLOPs."""
    return Frontier([point(0.8, 0.7, 0.05), point(0.2, 0.2, 0.4), point(0.5, 0.4, 0.1)])


def test_a_frontier_is_a_sequence_by_flops(curve):
    assert [p.budget for p in curve] == [0.2, 0.5, 0.8] and len(curve) == 3
    assert curve[0].budget == 0.2 and curve[-1] is curve.points[2] and curve[:2] == curve.points[:2]
    with pytest.raises(IndexError):
        curve[3]
    for wrong in (0.5, "50%"):
        with pytest.raises(ValueError, match=r"frontier\.at\("):
            curve[wrong]


@pytest.mark.parametrize("share, budget", [("50%", 0.5), (0.4, 0.5), ("0.69", 0.5), (1, 0.8)])
def test_at_takes_shares_as_numbers_and_texts(curve, share, budget):
    assert curve.at(share).budget == budget


@pytest.mark.parametrize(
    "share, why",
    [
        (50, r"did you mean '50%'\?"),
        ("1 TFLOPs", "takes a share"),
        (True, "a share in"),
        (0.1, "no"),
    ],
)
def test_at_refuses_what_is_no_share(curve, share, why):
    with pytest.raises(ValueError, match=why):
        curve.at(share)


def test_printed_it_is_a_table_of_a_line_a_point(curve):
    lines = str(curve).splitlines()
    assert str(curve) == repr(curve) == curve.table() and len(lines) == 4
    assert lines[0].split("  ")[0].strip() == "budget" and "calibration KL" in lines[0]
    assert "2.000 GFLOPs" in lines[2] and "16 16 8 8 4 0" in lines[2] and "0.1000" in lines[2]
    assert str(Frontier([])) == "an empty frontier"
    assert "task loss" in str(Frontier([point()], {"objective": "task"}))


def test_a_table_shows_what_was_measured_where_it_was():
    points = [point(0.2, 0.2, 0.4, held_out_accuracy=0.5), point(0.8, 0.7, held_out_accuracy="?")]
    meta = {"full_prefill_seconds": 0.5, "prefill_seconds": [0.25, 0.375]}
    header, first, second = map(str.split, Frontier(points, meta).table().splitlines())
    assert header[5:8] == ["held-out", "accuracy", "saved"]
    assert first[6:10] == ["50.0", "%", "250", "ms"] and second[6:9] == ["–", "125", "ms"]
    # Times of other points are not shown.
    assert "saved" not in Frontier(points[:1], meta).table()


def test_a_notebook_shows_it_without_letting_tags_through(curve):
    html = curve._repr_html_()
    assert html.count("<tr>") == 4 and html.count("<td>") == 3 * 5
    evil = FrontierPoint(point().config, "<b>", 1e9, 0.5, 0.1)
    assert "<b>" not in Frontier([evil])._repr_html_()


def test_a_data_frame_has_a_row_a_point(curve):
    pandas = pytest.importorskip("pandas")
    found = Frontier([point(0.5, 0.4, accuracy=0.75, tasks={}), point(0.8, 0.7)])
    found[0].metrics["share"] = 9.0
    table = found.to_dataframe()
    assert isinstance(table, pandas.DataFrame) and list(table.share) == [0.4, 0.7]
    assert table.accuracy[0] == 0.75 and table.accuracy.isna()[1] and "tasks" not in table
    assert table.keep_ratios[1] == [1, 1, 0.5, 0.5, 0.25, 0]


def test_without_pandas_it_says_what_to_install(curve):
    without = mock.patch.dict(sys.modules, {"pandas": None})
    with without, pytest.raises(ImportError, match="pip install pandas"):
        curve.to_dataframe()


def test_it_draws_itself(curve, tmp_path):
    pytest.importorskip("matplotlib")
    picture = curve.plot()
    picture.save(tmp_path / "a.svg")
    curve.plot(tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text() == picture._repr_svg_() and "<svg" in text
    with pytest.raises(ValueError, match=r"\.svg or \.png"):
        picture.save(tmp_path / "c.pdf")


# ---- what is no configuration ---------------------------------------------------------------
def test_a_configuration_may_be_the_path_of_its_file(tmp_path):
    config = PruningConfig.from_fastv(2, 0.5, num_layers=LAYERS)
    path = tmp_path / "config.json"
    config.save(path)
    model = make("llava")
    expected = vispco.evaluate(model, [batch()], config).kl
    for given in (path, str(path)):
        assert vispco.evaluate(model, [batch()], given).kl == expected
        with vispco.apply(model, given) as pruner:
            assert pruner.ratios.tolist() == list(config.keep_ratios)


@pytest.mark.parametrize(
    "wrong, why",
    [
        (Frontier([point()]), r"frontier\.at\(0\.5\)\.config"),
        (point(), r"pass the \.config"),
        (point().config.to_dict(), "from_dict"),
        (0.5, "from which layer"),
        (None, "got NoneType: make one"),
    ],
)
def test_another_type_is_told_what_to_pass(wrong, why):
    with pytest.raises(ValueError, match=why):
        as_config(wrong)


def test_a_frontier_file_is_no_configuration(tmp_path):
    Frontier([point()]).save(tmp_path / "frontier.json")
    with pytest.raises(ValueError, match=r"frontier\.json: this is a frontier.*config-<budget>"):
        as_config(tmp_path / "frontier.json")


def test_the_model_of_a_pipeline_is_pruned_and_the_handle_says_so():
    config = PruningConfig.from_fastv(2, 0.5, num_layers=LAYERS)
    pipeline = type("Pipeline", (), {})()
    pipeline.model = make("llava")
    with vispco.apply(pipeline, config) as pruner:
        assert pruner.model is pipeline.model
        assert repr(pruner).endswith("is pruned: fastv: layer 2 keeps 50.0 % (drops 50.0 %)")
    assert "is not pruned now" in repr(pruner)


# ---- the interface --------------------------------------------------------------------------
def test_dir_shows_the_interface_alone():
    shown = dir(vispco)
    assert {"apply", "search", "evaluate", "Frontier", "pareto", "__version__"} <= set(shown)
    assert not {"alm", "ste", "registry", "utils", "pruning", "solvers"} & set(shown)
    assert all(hasattr(vispco, name) for name in shown)


# ---- kernels of users -----------------------------------------------------------------------
def kernel(formula):
    made = {
        "initial": lambda self: torch.zeros(2),
        "ratios": lambda self, i, theta: formula(i, theta),
    }
    return type("Mine", (vispco.Kernel,), made)


@pytest.mark.parametrize(
    "formula",
    [
        lambda i, theta: theta[0].sigmoid() - theta[1].sigmoid() * i / 8,
        lambda i, theta: theta.sum().sigmoid().expand(len(i)),
        lambda i, theta: theta.sum().sigmoid().expand(*theta.shape[:-1], len(i)),
        lambda i, theta: theta.sum(-1).sigmoid(),
    ],
)
def test_a_formula_for_one_theta_only_is_refused_when_it_is_made(formula):
    with pytest.raises(
        ValueError, match=r"formula of Mine .*Count from the end: theta\[\.\.\., :1\]"
    ):
        kernel(formula)(8)


def test_a_formula_for_many_thetas_is_taken():
    mine = kernel(lambda i, theta: theta[..., :1].sigmoid() - theta[..., 1:].sigmoid() * i / 8)(8)
    assert mine.schedule(torch.zeros(5, 3, 2)).shape == (5, 3, 8)


def test_a_kernel_may_set_its_constants_after_the_base_class():
    class Late(vispco.Kernel):
        def __init__(self, layers, first_layer=1):
            super().__init__(layers, first_layer)
            self.slope = 0.5

        def initial(self):
            return torch.zeros(1)

        def ratios(self, i, theta):
            return theta.sigmoid() - self.slope * i / 8

    assert Late(8)()[0] == 1


@pytest.mark.parametrize("name", vispco.list_kernels())
def test_the_kernels_themselves_pass(name):
    from vispco.registry import KERNELS

    assert isinstance(KERNELS.get(name)(8), kernels.Kernel)
