"""The profile: what each single drop costs, and what is planned and predicted from it."""

import dataclasses
import itertools
import json
import math
import types

import pytest
import torch
from hypothesis import given, strategies as st

import vispco
import zoo
from tiny import batch, make
from vispco import Profile, Profiled, PruningConfig, SearchOptions, testbed
from vispco.budget import Budget
from vispco.calibration import prepare, run_teacher
from vispco.evaluate import grade
from vispco.flops import CostModel, Dimensions
from vispco.profiling import average, has_films, predicted
from vispco.profiling.measure import AUTO, AUTO_FILMS
from vispco.profiling.race import Race
from vispco.pruning import apply
from vispco.registry import adapter_for, build_method
from vispco.schedule import ramp
from vispco.solvers.alone import best_alone
from vispco.solvers.plan import SCALE, fill, offspring, plans, random_plans, staircases, steps
from vispco.solvers.problem import Problem
from vispco.testbed import video
from vispco.testbed.model import VIDEO
from vispco.utils.journal import Journal

LAYERS, TOKENS = 5, 8


def limit(share=0.5, first_layer=1, layers=LAYERS, tokens=TOKENS):
    cost = CostModel(Dimensions(layers, 16, 2, 2, 8, 32, 40))
    prompts = torch.tensor([tokens, tokens]), torch.tensor([4, 6])
    return Budget(share, cost, *prompts, first_layer)


def made(seed=0, layers=LAYERS, tokens=TOKENS, answers=3, first_layer=1):
    """A profile of random numbers, larger where less is kept."""
    g = torch.Generator().manual_seed(seed)
    rows = {}
    for layer in range(first_layer, layers):
        drawn = torch.rand(3, answers, generator=g).cumsum(0).flip(0).tolist()
        rows[layer] = dict(zip((0, 2, 5), drawn, strict=True))
    return Profile({"fastv": {}}, "llava", layers, tokens, "kl", [0.0] * answers, rows)


# ---- which methods -----------------------------------------------------------------------------
def test_auto_tries_the_methods_for_video_where_there_are_films():
    """In any batch. Named methods are as named, and pictures have what they had."""
    model = testbed.load(VIDEO)[0]
    films = video.batches("calibration", n=2, batch_size=2)
    pictures = testbed.batches("calibration", n=2, batch_size=2, model="testbed-qwen")

    def tried(batches, method="auto"):
        return list(Problem(model, batches, method, "monotone", SearchOptions()).methods)

    assert tried(films) == tried([*pictures, *films]) == AUTO_FILMS != AUTO
    assert {"evs", "vidcom2", "framefusion"} < set(AUTO_FILMS) and len(AUTO_FILMS) <= len(AUTO)
    assert tried(pictures) == AUTO and tried(films, ["fastv", "dart"]) == ["fastv", "dart"]
    # A model of pictures alone.
    llava = make("llava")
    assert not has_films(llava, prepare(llava, [batch()]))


# ---- what is measured ------------------------------------------------------------------------
def check_rows(model, batches, method, **options):
    """Every measurement is that of the configuration, as `evaluate` runs it."""
    found = vispco.profile(model, batches, method, **options)
    prepared = run_teacher(model.eval(), prepare(model, batches))
    for layer, row in found.rows.items():
        for tokens, losses in row.items():
            ratios = [1.0] * layer + [tokens / found.tokens] * (found.layers - layer)
            who = found.ranks[layer][tokens]
            with torch.no_grad(), apply(model, PruningConfig(who, ratios)) as pruner:
                grades = [grade(each, pruner.run(each)) for each in prepared]
            expected = torch.cat([divergence for _, _, divergence, _ in grades])
            assert (torch.tensor(losses) - expected).abs().max() <= 1e-6, (layer, tokens)
    return found


@pytest.mark.parametrize("method", ["fastv", "pdrop", "sparsevlm", "visionzip", "random"])
def test_a_measurement_is_that_of_the_configuration(llava, method):
    batches = [batch(images=(1, 2), text=(9, 6), before=(2, 0), seed=s) for s in range(2)]
    found = check_rows(llava, batches, method)
    assert found.tokens == 32 and all(len(row) > 1 for row in found.rows.values())


SEVERAL = ["fastv", "pdrop", "visionzip", "divprune", "random", "strided"]


def test_of_several_methods_each_measurement_names_its_own(llava):
    """The best of those that were measured on all batches; the first batch decides which."""
    batches, seen = [batch(seed=s) for s in range(2)], []
    found = check_rows(llava, batches, SEVERAL, callback=seen.append)
    whole = [each for each in seen if each["batches"] == 2]
    for layer, row in found.ranks.items():
        for tokens, name in row.items():
            at = [e for e in whole if (e["layer"], e["tokens"]) == (layer, tokens)]
            assert name in {e["method"] for e in at} and len(at) <= 2
            mean = sum(found.rows[layer][tokens]) / len(found.full)
            assert mean == pytest.approx(min(e["loss"] for e in at), abs=1e-9)
    assert len({name for row in found.ranks.values() for name in row.values()}) > 1
    assert {e["method"] for e in seen if e["layer"] == 1} == set(SEVERAL)


def test_a_method_that_the_model_does_not_serve_is_left_out_aloud(llava):
    @vispco.register_method("refuses", overwrite=True)
    class Refuses(vispco.Method):
        """Cannot, from layer 0 on."""

        first_layer = 0

        def score(self, ctx):
            raise ValueError("this model has no such thing")

    try:
        with pytest.warns(UserWarning, match="refuses is left out: this model has no such thing"):
            found = vispco.profile(llava, [batch()], ["refuses", "fastv"])
        with pytest.raises(ValueError, match="this model has no such thing"):
            vispco.profile(llava, [batch()], "refuses")
        assert {name for row in found.ranks.values() for name in row.values()} == {"fastv"}
        assert found.first_layer == 1
        with pytest.warns(UserWarning, match="refuses is left out"):
            given = {"budgets": [0.5], "start": QUICK, "refinement": 2}
            frontier = vispco.search(llava, [batch()], ["refuses", "fastv"], **given)
        assert frontier.points[0].config.method == "fastv"
        assert frontier.config(0.6).keep_ratios[0] == 1
    finally:
        vispco.registry.METHODS.remove("refuses")


@pytest.mark.parametrize("tokens", range(1, 12))
def test_methods_race_where_tokens_are_kept_and_dropped(tokens):
    few, many = Race(types.SimpleNamespace(tokens=tokens)).levels
    assert 0 <= few <= many < tokens and (few > 0 or tokens == 1)


@pytest.mark.parametrize("given", [[], ["fastv", "fastv"], ["fastv", "visionzip+pdrop"], 3])
def test_several_methods_are_different_plain_ones(llava, given):
    with pytest.raises(ValueError, match="method"):
        vispco.profile(llava, [batch()], given)


def pytest_generate_tests(metafunc):
    if "class_name" in metafunc.fixturenames:
        every = metafunc.config.getoption("every")
        names = [name for name, entry in zoo.FAMILIES.items() if every or entry.fast]
        metafunc.parametrize("class_name", names)


def test_in_any_model_passes_that_share_their_first_layers_are_whole_ones(class_name):
    """Also where layers keep states, share keys or make several streams."""
    if lack := zoo.missing(zoo.FAMILIES[class_name]):
        pytest.skip(lack)
    model = zoo.make(class_name)
    inputs, _ = zoo.prompts(class_name)
    if not adapter_for(model)(model).image_token_ids():
        pytest.skip("its visual tokens are told by a mask, which batches of a search do not have")
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    check_rows(model, [{**inputs, "labels": labels}], "strided", measurements=2)


def test_it_goes_on_where_it_was(llava, tmp_path):
    whole = vispco.profile(llava, [batch()], journal=tmp_path / "journal")
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    for kept in (1, len(lines) // 2, len(lines)):
        (tmp_path / "part").write_bytes(b"".join(lines[:kept]))
        again = vispco.profile(llava, [batch()], journal=tmp_path / "part")
        assert again == whole
        assert (tmp_path / "part").read_bytes().count(b"\n") == len(lines)
    with pytest.raises(ValueError, match="another search.*methods was"):
        vispco.profile(llava, [batch()], "pdrop", journal=tmp_path / "part")


def test_shared_passes_are_cheaper_and_counted(llava):
    """A row from layer k on costs (L - k + 1) / L: FastV reads the layer before."""
    found = vispco.profile(llava, [batch()], measurements=1)
    layers = found.layers
    # The full model; then each row begins a layer later, and the layer before it runs once more.
    expected = 3 + sum(layers - max(0, k - 2) for k in range(1, layers)) / layers
    assert found.forward_passes == pytest.approx(2 * expected, abs=2e-3)


# ---- what it says ----------------------------------------------------------------------------
@given(seed=st.integers(0, 99), layer=st.integers(1, LAYERS - 1), tokens=st.sampled_from([0, 2, 5]))
def test_one_drop_is_predicted_exactly(seed, layer, tokens):
    profile = made(seed)
    ratios = torch.tensor([[1.0] * layer + [tokens / TOKENS] * (LAYERS - layer)])
    mean = sum(profile.rows[layer][tokens]) / 3
    assert float(profile.predict(ratios)[0]) == pytest.approx(mean, abs=1e-6)
    assert profile.loss(layer, tokens) == pytest.approx(mean, abs=1e-6)


@given(seed=st.integers(0, 99), data=st.data())
def test_the_prediction_is_the_largest_drop_of_each_answer(seed, data):
    profile = made(seed)
    levels = data.draw(st.lists(st.integers(0, TOKENS), min_size=4, max_size=4))
    counts = [TOKENS, *sorted(levels, reverse=True)]
    table, before = profile.table(), [TOKENS, *counts]
    worst = [
        max([0.0, *(float(table[k, n, a]) for k, n in enumerate(counts) if n < before[k])])
        for a in range(3)
    ]
    found = float(profile.predict(torch.tensor([counts]) / TOKENS)[0])
    assert found == pytest.approx(sum(worst) / 3, abs=1e-9)


positive = st.floats(0, 30)


@given(losses=st.lists(positive, min_size=1, max_size=8), scale=st.floats(0.1, 50))
def test_the_exponential_mean_is_between_the_least_loss_and_the_mean(losses, scale):
    own = torch.tensor(losses, dtype=torch.float64)
    found = float(average(own, scale))
    by_hand = -scale * math.log(sum(math.exp(-x / scale) for x in losses) / len(losses))
    assert found == pytest.approx(by_hand, abs=1e-9)
    assert min(losses) - 1e-9 <= found <= float(average(own)) + 1e-9
    assert float(average(own)) == pytest.approx(sum(losses) / len(losses))
    # The larger the scale, the nearer to the mean.
    assert found <= float(average(own, 2 * scale)) + 1e-9


@given(rest=st.lists(st.floats(0, 10), min_size=1, max_size=8), lost=st.floats(40, 1e6))
def test_a_lost_answer_counts_the_same_however_far_it_is_lost(rest, lost):
    own = torch.tensor([[*rest, lost], [*rest, math.inf]], dtype=torch.float64)
    near, far = average(own, 1.0).tolist()
    assert near == pytest.approx(far, abs=1e-6) and math.isfinite(far)


def test_between_measurements_it_neither_rises_nor_leaves_their_range():
    table = made().table(64)
    assert (table[1:, 1:] <= table[1:, :-1] + 1e-9).all() and (table[:, -1] == 0).all()
    assert table[1, 16].tolist() == pytest.approx(list(made().rows[1][2]), abs=1e-6)


@given(data=st.data())
def test_each_drop_is_ranked_by_the_method_that_was_best_there(data):
    """What the composite says of each layer, against the nearest measurement."""
    names = ["fastv", "pdrop", "strided"]
    profile = made()
    ranks = {
        k: {n: data.draw(st.sampled_from(names)) for n in row} for k, row in profile.rows.items()
    }
    profile = dataclasses.replace(profile, methods=dict.fromkeys(names, {}), ranks=ranks)
    levels = data.draw(st.lists(st.integers(0, TOKENS), min_size=4, max_size=4))
    counts = [TOKENS, *sorted(levels, reverse=True)]
    config = PruningConfig(
        **profile.ranked_by([n / TOKENS for n in counts]), keep_ratios=[n / TOKENS for n in counts]
    )
    method = build_method(config.method, config.method_options)
    for layer, tokens in steps(counts, TOKENS).items():
        if tokens:
            nearest = min((n for n in ranks[layer] if n), key=lambda n: abs(n - tokens))
            assert type(method.at(layer)) is type(build_method(ranks[layer][nearest]))


def test_exit_and_traps():
    free, dear, bad = {0: (0.0,), 4: (0.0,)}, {0: (2.0,), 4: (0.2,)}, {0: (2.0,), 4: (1.5,)}
    rows = {1: dear, 2: bad, 3: dear, 4: free, 5: free}
    whose = {"fastv": {}}, "llava", 6, 8, "kl", [0.0]
    profile = Profile(*whose, rows)
    assert profile.exit() == 4 and profile.traps() == [2]
    last = Profile(*whose, {5: dear})
    assert last.exit() is None and last.first_layer == 5


def test_a_file_gives_it_back_and_a_wrong_one_is_refused(tmp_path):
    profile = made()
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
    data = json.loads((tmp_path / "profile.json").read_text())
    for change, said in (
        ({"rows": {"1": data["rows"]["1"]}}, "one after the other, up to 4"),
        ({"ranks": {"1": {"0": "fastv"}}}, "ranks"),
        ({"ranks": {k: dict.fromkeys(v, "pdrop") for k, v in data["ranks"].items()}}, "of fastv"),
        ({"rows": {**data["rows"], "2": {"3": [0.0] * 3}}}, "from 0, which is there"),
        ({"full": [0.0]}, "1 losses"),
        ({"methods": {"fastw": {}}}, "fastv"),
        ({"methods": {}}, "methods"),
        ({"objective": "best"}, "objective"),
        ({"other": 1}, "unknown keys"),
        ({"rows": []}, "rows"),
        ({"rows": {"1": 3}}, "rows"),
        ({"rows": {**data["rows"], "2": {"0": ["a"] * 3}}}, "numbers"),
        ({"tokens": "8"}, "tokens"),
        ({"model_type": 3}, "model_type"),
        ({"forward_passes": "many"}, "numbers"),
        ({"full": []}, "numbers"),
        ({"rows": {"1": [0.0]}}, "rows"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(ValueError, match=rf"bad\.json: .*{said}"):
            Profile.load(tmp_path / "bad.json")


# ---- plans -----------------------------------------------------------------------------------
shares = st.floats(0.45, 0.95)


def random_counts(seed, own):
    g = torch.Generator().manual_seed(seed)
    first = random_plans(own, 12, 4, g)
    return torch.cat([first, offspring(first, own, 12, 4, g)]), g


@given(seed=st.integers(0, 999), share=shares, first=st.integers(0, 2))
def test_plans_are_schedules_of_few_drops(seed, share, first):
    own = limit(share, first)
    counts, _ = random_counts(seed, own)
    assert (counts >= 0).all() and (counts[:, :first] == TOKENS).all()
    assert (counts[:, 1:] <= counts[:, :-1]).all()
    assert all(len(steps(row, TOKENS)) <= 4 for row in counts.tolist())
    assert torch.equal(staircases([steps(row, TOKENS) for row in counts.tolist()], own), counts)


@given(seed=st.integers(0, 999), share=shares, first=st.integers(0, 2))
def test_filled_plans_are_within_the_budget_and_no_step_can_rise(seed, share, first):
    """An exit stays where it is, and keeps nothing."""
    own = limit(share, first)
    counts, g = random_counts(seed, own)
    filled = fill(counts, own, g)
    assert own.fits(filled).all() and (filled[:, 1:] <= filled[:, :-1]).all()
    for row in filled.tolist():
        stairs = steps(row, TOKENS)
        assert len(stairs) <= 4
        for layer, tokens in stairs.items():
            if not tokens:
                continue
            higher = torch.tensor(
                [n + 1 if n == tokens and i >= layer else n for i, n in enumerate(row)]
            )
            assert not own.fits(higher[None]).item() or tokens == [TOKENS, *row][layer]
    for row in counts:
        for alone in fill(row[None], own, g):
            assert (alone[row == 0] == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_best_plan_is_the_best_there_is(seed):
    """Against all schedules of so few layers and tokens."""
    profile, own = made(seed, layers=4, tokens=6), limit(0.55, layers=4, tokens=6)
    table = profile.table()
    every = [
        row
        for row in itertools.product(range(6, -1, -1), repeat=3)
        if list(row) == sorted(row, reverse=True)
    ]
    every = torch.tensor([[6, *row] for row in every])
    best = predicted(table, every[own.fits(every)] / 6, SCALE).min()
    found = plans(table, own, seed)
    losses = predicted(table, found / 6, SCALE)
    assert (losses[1:] >= losses[:-1]).all()
    assert float(losses[0]) == pytest.approx(float(best), abs=1e-9)


# ---- the search ------------------------------------------------------------------------------
QUICK = Profiled(questions=2)


@pytest.fixture(scope="module")
def batches():
    return [batch(seed=s) for s in range(3)]


def test_every_budget_is_held_and_others_are_planned_with_no_pass_but_their_own(llava, batches):
    found = vispco.search(llava, batches, budgets=[0.4, 0.7, 1.0], start=QUICK, refinement=1)
    assert [point.budget for point in found.points] == [0.4, 0.7, 1.0]
    for point in found.points:
        assert point.share <= point.budget + 1e-9
    assert (
        found.points[-1].config.keep_ratios == (1.0,) * found.profile.layers
        and found.meta["start"] == "profile"
    )
    more = found.frontier([0.5, 0.6])
    # The full model, and for each budget the best plan.
    assert more.meta["forward_passes"] == 6 + 2 * 6
    assert all(point.share <= point.budget for point in more.points)
    assert found.config(0.5) == more.points[0].config


def test_a_search_is_repeatable_and_goes_on(llava, batches, tmp_path):
    given = {"budgets": [0.5], "start": QUICK, "refinement": 1, "seed": 3}
    journal = {"journal": tmp_path / "journal"}
    whole = vispco.search(llava, batches, options=journal, **given)
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    for kept in (2, len(lines) - 2):
        (tmp_path / "journal").write_bytes(b"".join(lines[:kept]))
        again = vispco.search(llava, batches, options=journal, **given)
        assert again.points == whole.points and again.profile == whole.profile
        assert again.meta["forward_passes"] == whole.meta["forward_passes"]


@pytest.mark.parametrize(
    ("kernel", "most"),
    [("single_layer", 1), ({"name": "multi_step", "steps": 2}, 2)],
)
def test_a_kernel_of_steps_gets_so_many(llava, batches, kernel, most):
    found = vispco.search(llava, batches, budgets=[0.5], kernel=kernel, start=QUICK, refinement=2)
    assert 1 <= len(found.points[0].config.steps) <= most
    with pytest.raises(ValueError, match="drops at single layers.*'linear'"):
        vispco.search(llava, batches, budgets=[0.5], kernel="linear", start="profile")


def test_a_given_profile_must_be_of_this_model_and_method(llava, batches):
    profile = vispco.profile(llava, batches[:1])
    start = Profiled(profile=profile)
    found = vispco.search(llava, batches, budgets=[0.5], start=start, refinement=0)
    assert found.profile is profile
    with pytest.raises(ValueError, match="profile is of llava.*'fastv.*search is of llava.*'pdrop"):
        vispco.search(llava, batches, "pdrop", budgets=[0.5], start=start)
    with pytest.raises(ValueError, match="questions must be"):
        Profiled(questions=0)


def test_alone_must_be_of_one_of_several_methods(llava, batches):
    """Before anything is measured: by the profile's method, its options, and how many there are."""
    of = {name: vispco.profile(llava, batches[:1], name, measurements=1) for name in SEVERAL[:2]}
    other = vispco.profile(llava, batches[:1], "random", measurements=1)
    other = [other, dataclasses.replace(of[SEVERAL[0]], objective="task")]

    def search(methods, alone):
        start = Profiled(questions=2, measurements=1, alone=alone)
        return vispco.search(llava, batches[:1], methods, [0.5], start=start, refinement=0)

    found = search(SEVERAL[:2], of[SEVERAL[1]])
    assert found.meta["alone"] == SEVERAL[1]
    with pytest.raises(
        ValueError, match="one of the methods that are searched.*got one of.*random"
    ):
        search(SEVERAL[:2], other[0])
    with pytest.raises(ValueError, match="profile is of .* task; this search is of .* kl"):
        search(SEVERAL[:2], other[1])
    with pytest.raises(ValueError, match="this one is of .*: give the profile as Profiled.profile"):
        search(SEVERAL[0], of[SEVERAL[0]])


def test_a_method_that_reaches_no_budget_alone_is_not_searched_alone(llava, batches):
    """FastV cannot rank before the first layer, so a budget of almost nothing is out of reach."""
    problem = Problem(llava, batches[:1], ["fastv", "strided"], "monotone", SearchOptions())
    with Journal() as journal:
        _, limits, spent = best_alone(problem, ["fastv"], [0.001], [0], journal)
    assert (limits, spent) == ([], 0)
    alone = vispco.profile(llava, batches, "fastv", measurements=1)
    start = Profiled(questions=6, measurements=1, alone=alone)
    found = vispco.search(llava, batches, ["fastv", "strided"], [0.001], start=start, refinement=0)
    assert found.meta["alone"] != "fastv" and found.points[0].share <= 0.001


def test_several_methods_are_searched_at_once(llava, batches):
    found = vispco.search(llava, batches, SEVERAL, budgets=[0.4, 0.7], start=QUICK, refinement=1)
    for point in found.points:
        # With the cost of the rankings that run, not of the dearest method: eight tokens of text.
        report = vispco.count_flops(llava, point.config, 16, 8)
        assert report.prunable_share <= point.budget
        assert PruningConfig.from_dict(point.config.to_dict()) == point.config
        record = vispco.evaluate(llava, batches, point.config)
        assert record.kl == pytest.approx(point.loss, abs=1e-6)
    with pytest.raises(ValueError, match="start='gradient' searches with one method.*'profile'"):
        vispco.search(llava, batches, SEVERAL, budgets=[0.4], start="gradient")


def test_the_method_that_is_best_alone_is_searched_alone(llava, batches, tmp_path):
    """Which is best: by brute force. What is found: the better one of two searches, to the bit."""
    budgets, methods = [0.5, 0.8], ["strided", "random", "visionzip"]
    start = Profiled(questions=6)
    how = {"budgets": budgets, "start": start, "refinement": 1, "seed": 2}
    journal = {"journal": tmp_path / "journal"}
    found = vispco.search(llava, batches, methods, **how, options=journal)
    won = {name for row in found.profile.ranks.values() for name in row.values()}
    scores = {}
    for name in won:
        problem = found.problem.only(name)
        ramps = [PruningConfig(name, x.harden(ramp(x))) for x in map(problem.limit, budgets)]
        losses = [vispco.evaluate(llava, batches, config).kl for config in ramps]
        scores[name] = sum(math.log(loss + 0.01) for loss in losses)
    alone = found.meta["alone"]
    assert alone == min(scores, key=scores.__getitem__)
    one = vispco.search(llava, batches, alone, **how)
    for point, own in zip(found.points, one.points, strict=True):
        assert point.loss <= own.loss
        assert point == own or point.config.method != alone or point.loss < own.loss
    # Another budget has the better plan of the two profiles, each measured once.
    (planned,), (of_one,) = (each.frontier([0.65]).points for each in (found, one))
    assert planned.loss <= of_one.loss
    # Killed, it goes on, in either of the two searches.
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    for kept in (len(lines) // 3, len(lines) - 1):
        (tmp_path / "journal").write_bytes(b"".join(lines[:kept]))
        again = vispco.search(llava, batches, methods, **how, options=journal)
        assert again.points == found.points
        assert again.meta["forward_passes"] == found.meta["forward_passes"]


def test_several_limits_hold_at_once(llava, batches):
    budget = {"flops": 0.6, "kv_cache": 0.5}
    found = vispco.search(llava, batches, budgets=[budget], start=QUICK, refinement=1)
    shares = vispco.budget.limit_for(
        budget,
        vispco.solvers.problem.cost_models(found.problem.adapter, found.problem.scorer),
        found.problem.n_visual,
        found.problem.n_text,
    ).shares(found.points[0].config.tokens(16))
    assert shares["flops"] <= 0.6 and shares["kv_cache"] <= 0.5
