"""The search end to end on a tiny model: budgets, gradients, determinism, and every refusal."""

import json
import sys

import pytest
import torch

import vispco
from tiny import batch, make, our_hooks, search_with, tiny_llava
from vispco.calibration import prepare, run_teacher
from vispco.frontier import Frontier, FrontierPoint
from vispco.pruning import Masking
from vispco.pruning.forward import kl_divergence
from vispco.registry import adapter_for
from vispco.schedule import to_whole_tokens


@pytest.fixture(scope="module")
def batches():
    return [batch(images=(1, 2), text=(9, 6), before=(2, 0), seed=s) for s in range(2)]


@pytest.mark.parametrize("kernel", vispco.list_kernels())
def test_never_above_the_budget(llava, batches, kernel):
    frontier = vispco.search(
        llava, batches, kernel=kernel, budgets=[0.4, "80%"], start=vispco.Gradient(steps=4)
    )
    assert [p.budget for p in frontier.points] == [0.4, "80%"]
    for point, limit in zip(frontier.points, (0.4, 0.8), strict=True):
        assert limit - 0.05 < point.share <= limit
        record = vispco.evaluate(llava, batches, point.config)
        assert (
            record.kl == pytest.approx(point.loss)
            and record.flops == point.flops == point.config.flops
        )
        assert record.prunable_share <= limit


@pytest.mark.parametrize("method", vispco.list_methods())
def test_every_method_can_be_searched(llava, batches, method):
    frontier = vispco.search(
        llava, batches, method=method, budgets=[0.5], start=vispco.Gradient(steps=3)
    )
    assert 0.4 < frontier.points[0].share <= 0.5 and frontier.points[0].config.method == method


def test_search_improves_on_its_start():
    """On a model whose image matters early or late.

    There the KL falls below that of the untrained schedule.
    """
    model = tiny_llava(layers=6, scale=0.5)
    batches = [batch(images=(1,) * 8, text=(9,) * 8, before=(2,) * 8, seed=s) for s in range(2)]
    before = vispco.search(
        model,
        batches,
        budgets=[0.5],
        refinement=0,
        start=vispco.Gradient(steps=1, learning_rate=1e-9),
    ).points[0]
    after = vispco.search(
        model, batches, budgets=[0.5], refinement=0, start=vispco.Gradient(steps=40)
    ).points[0]
    assert after.loss < 0.9 * before.loss


def test_same_seed_same_frontier_and_the_model_is_untouched(batches):
    model = make("llava")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    model.train()
    one, two = (
        vispco.search(model, batches, budgets=[0.5], seed=3, start=vispco.Gradient(steps=5))
        for _ in range(2)
    )
    assert one.points == two.points and model.training
    model.eval()
    assert flags == [p.requires_grad for p in model.parameters()] and all(
        p.grad is None for p in model.parameters()
    )
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not our_hooks(model)


def test_callback_sees_every_step_and_the_cost_is_counted(llava, batches):
    seen = []
    frontier = vispco.search(
        llava,
        batches,
        budgets=[0.4, 0.6],
        refinement=0,
        callback=seen.append,
        start=vispco.Gradient(steps=6, inner=3),
    )
    assert [(s["budget"], s["step"]) for s in seen] == [
        (b, i) for b in (0.6, 0.4) for i in range(6)
    ]
    assert {"loss", "slack", "multiplier", "penalty", "gradient"} <= set(seen[0])
    json.dumps(seen)
    # The full model once. Per budget: 6 steps of 2 samples, backward counted twice; of 4 samples,
    # up to three starts and four schedules after the updates; of one prepared_batch of 2, up to
    # seven more starts and the best of them.
    assert (
        4 + 2 * (6 * 2 * 3 + 4)
        <= frontier.meta["forward_passes"]
        <= 4 + 2 * (6 * 2 * 3 + 7 * 4 + 8 * 2)
    )


@pytest.mark.parametrize("kernel", vispco.list_kernels())
def test_without_steps_refinement_alone_and_nothing_is_kept_for_a_gradient(batches, kernel):
    model, seen, kept = tiny_llava(layers=6, scale=0.5), [], []
    hook = model.register_forward_hook(
        lambda module, args, out: kept.append(out.logits.requires_grad)
    )
    first = vispco.search(
        model,
        batches,
        kernel=kernel,
        budgets=[0.4, 0.6],
        refinement=0,
        start=vispco.Gradient(steps=0),
    )
    frontier = vispco.search(
        model,
        batches,
        kernel=kernel,
        budgets=[0.4, 0.6],
        refinement=6,
        callback=seen.append,
        start=vispco.Gradient(steps=0),
    )
    hook.remove()
    assert kept and not any(kept)
    assert (
        {s["budget"] for s in seen} <= {0.4, 0.6}
        and 0 < len(seen) <= 12
        and all("step" not in s for s in seen)
    )
    for start, point in zip(first.points, frontier.points, strict=True):
        own = [s for s in seen if s["budget"] == point.budget]
        assert [s["schedule"] for s in own] == [*range(1, len(own) + 1)]
        best = [min([start.loss, *(s["loss"] for s in own[: i + 1])]) for i in range(len(own))]
        assert (
            [s["best"] for s in own] == best
            and point.loss == min([start.loss, *best])
            and point.share <= point.budget
        )
    assert frontier.meta["forward_passes"] == first.meta["forward_passes"] + 4 * len(seen)
    if kernel == "monotone":
        assert sum(p.loss for p in frontier.points) < sum(p.loss for p in first.points)


def test_budget_one_needs_no_search(llava, batches):
    point = vispco.search(
        llava,
        batches,
        budgets=[1.0],
        callback=lambda _: pytest.fail("ran"),
        start=vispco.Gradient(steps=3),
    ).points[0]
    assert point.config.keep_ratios == (1.0,) * 6 and point.loss == pytest.approx(0, abs=1e-6)


def test_whole_rounds_forward_and_passes_gradients():
    r = torch.tensor([1.0, 0.52, 0.31], requires_grad=True)
    out = to_whole_tokens(r, 16)
    assert torch.equal(out.detach() * 16, (r.detach() * 16).round())
    out.sum().backward()
    assert torch.equal(r.grad, torch.ones(3))


def test_gradient_points_the_way_of_finite_differences(llava):
    """More tokens, less divergence: the straight-through gradient and the hard loss agree."""
    prepared = run_teacher(
        llava, prepare(llava, [batch(images=(1,) * 8, text=(9,) * 8, before=(2,) * 8)])
    )
    adapter, method = adapter_for(llava)(llava), vispco.registry.METHODS.get("fastv")()

    def loss(ratios):
        with Masking(adapter, method, ratios).install() as pruner:
            return kl_divergence(pruner.run(prepared[0]), prepared[0].log_probs).mean()

    base = torch.tensor([1, 0.75, 0.75, 0.5, 0.5, 0.25], requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(base), base)
    step = torch.tensor([0, 1, 1, 1, 1, 1]) / 8
    with torch.no_grad():
        more, fewer = loss(base + step), loss(base - step)
    assert torch.isfinite(gradient).all() and (gradient[1:] != 0).all() and gradient[0] == 0
    assert float(gradient.sum()) < 0 and more < fewer


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(method="fastvv"), "did you mean 'fastv'"),
        (dict(kernel="multistep"), "did you mean 'multi_step'"),
        (dict(budgets=0.5), "must be a sequence"),
        (dict(budgets=[]), "must be a sequence"),
        (dict(budgets=[2.0]), "over 1"),
        (dict(budgets=[-1]), "got -1"),
        (dict(budgets=[0]), "reachable range"),
        (dict(budgets=[0.01]), "reachable range"),
        (dict(steps=-1), "at least 0"),
        (dict(inner=0), "at least 1"),
        (dict(estimator={"sigma": -1}), "sigma"),
        (dict(constraint={"penalty": 0}), "penalty"),
    ],
)
def test_refusals(llava, batches, change, message):
    with pytest.raises(ValueError, match=message):
        search_with(llava, batches, **{"budgets": [0.5], "steps": 1, **change})
    assert not our_hooks(llava)


def test_bad_batches(llava):
    good = batch()
    text = batch(images=(0, 0))
    cases = [
        ([], "empty"),
        (good, "pass \\[batch\\]"),
        ([text], "no visual tokens"),
        ([{"labels": 1}], "input_ids"),
        ([{**good, "labels": torch.full_like(good["labels"], -100)}], "all labels are -100"),
        ([{**good, "labels": good["labels"][:, 1:]}], "must be the same"),
        ([batch(text=(2, 2), before=(0, 0))], "right after a visual token"),
    ]
    for batches, message in cases:
        with pytest.raises(ValueError, match=message):
            vispco.evaluate(llava, batches)
        with pytest.raises(ValueError, match=message):
            vispco.search(llava, batches, budgets=[0.5], start=vispco.Gradient(steps=1))


def test_a_model_without_an_adapter():
    with pytest.raises(ValueError, match="expected a model of Hugging Face.*got Linear"):
        vispco.search(torch.nn.Linear(2, 2), [], budgets=[0.5])


def test_not_finite_stops_with_the_step(batches):
    model = tiny_llava()
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        vispco.search(model, batches, budgets=[0.5], start=vispco.Gradient(steps=1))


def test_frontier_round_trip(tmp_path, llava, batches):
    frontier = vispco.search(llava, batches, budgets=["30%", 0.7], start=vispco.Gradient(steps=2))
    frontier.save(tmp_path / "frontier.json")
    assert Frontier.load(tmp_path / "frontier.json") == frontier
    assert frontier.at(0.7).budget == 0.7 and frontier.at(0.5).budget == "30%"
    with pytest.raises(ValueError, match="no point within 0.1"):
        frontier.at(0.1)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda d: d.update(schema_version=99), "schema_version 99"),
        (lambda d: d.pop("points"), "lacks points"),
        (lambda d: d.update(extra=1), "unknown keys: extra"),
        (lambda d: d["points"][0].pop("loss"), "exactly"),
        (lambda d: d["points"][0].update(loss="low"), "must be a finite number"),
        (lambda d: d.update(points={}), "list of points"),
        (lambda d: d["points"][0]["config"].update(keep_ratios=[0.1, 0.5]), "must not increase"),
    ],
)
def test_hand_edited_frontier(tmp_path, edit, message):
    path = tmp_path / "f.json"
    Frontier([FrontierPoint(vispco.PruningConfig("fastv", [1, 0.5]), 0.5, 1.0, 0.5, 0.1)]).save(
        path
    )
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        Frontier.load(path)
    assert "f.json" in str(error.value)


def test_truncated_frontier(tmp_path):
    path = tmp_path / "f.json"
    path.write_text('{"schema_version": 1, "points": [')
    with pytest.raises(ValueError, match="f.json"):
        Frontier.load(path)


def test_a_bar_is_shown_where_somebody_looks_or_asks(llava, monkeypatch, capsys):
    """And the caller hears of the same steps as without it."""
    from vispco.utils import progress

    heard, shown = [], []
    for asked, looking in ((None, False), (None, True), (True, False), (False, True)):
        monkeypatch.setattr(progress, "visible", lambda looking=looking: looking)
        monkeypatch.setitem(vispco.search.__globals__, "visible", progress.visible)
        found = []
        frontier = vispco.search(
            llava, [batch()], budgets=[0.5], start="ramp", callback=found.append, progress=asked
        )
        err = capsys.readouterr().err
        heard.append([{k: v for k, v in step.items() if k != "seconds"} for step in found])
        shown.append("search" in err and "full model on 2 questions" in err)
        assert len(frontier) == 1
    assert shown == [False, True, True, False] and heard[0] and all(h == heard[0] for h in heard)


def test_in_a_notebook_somebody_looks(monkeypatch):
    from types import SimpleNamespace

    from vispco.utils import progress

    for shell, expected in ((SimpleNamespace(kernel=1), True), (SimpleNamespace(), False)):
        kernel = SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython", kernel)
        assert progress.in_notebook() is expected
