"""What vispco promises of budgets, and the page of all promises.

A budget is never exceeded, and the result is within one token of the best.

10,000 random cases: `pytest tests/test_promises.py -m slow`; by default every eighth of them.
"""

import functools
import importlib
import itertools
import math
import random
import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vispco
from tiny import PER_IMAGE, batch, make, without_labels
from vispco.budget import limit_for
from vispco.config import PruningConfig
from vispco.flops import CostModel, Dimensions, KVCacheMemory
from vispco.kernels import Kernel
from vispco.latency.table import LatencyTable
from vispco.registry import KERNELS, METHODS, adapter_for
from vispco.solvers.descent import harden_theta

UNITS = {"flops": "FLOPs", "kv_cache": "bytes", "latency": "s"}
LENGTHS, SECONDS = (8, 40, 300), (0.001, 0.0013, 0.0104)


# ---- counted again, in Python's own numbers ------------------------------------------------------
class Naive:
    """Costs of one sample, n visual tokens beside t of text, when `counts` enter the layers."""

    def __init__(self, size, method):
        self.size, self.method = size, method

    def flops(self, counts, n, t):
        s, total = self.size, 2 * self.size.hidden * self.size.vocab
        for before, now in pairwise([n, *counts]):
            width = s.heads * s.head_dim
            matrices = (
                2 * s.hidden * width + 2 * s.hidden * s.kv_heads * s.head_dim + 3 * s.hidden * s.ffn
            )
            total += 2 * (now + t) * matrices + 4 * (now + t) ** 2 * width
            total += int(self.method.flops(s, before, t)) if now < before else 0
        return total

    def kv_cache(self, counts, n, t):
        return sum(2 * (now + t) * self.size.kv_heads * self.size.head_dim * 2 for now in counts)

    def latency(self, counts, n, t):
        return math.fsum(map(seconds, (now + t for now in counts)))


def seconds(tokens):
    """Of one layer: between two measurements, or beyond the last, on their line."""
    if tokens <= LENGTHS[0]:
        return SECONDS[0]
    i = 0 if tokens < LENGTHS[1] else 1
    slope = (SECONDS[i + 1] - SECONDS[i]) / (LENGTHS[i + 1] - LENGTHS[i])
    return SECONDS[i] + slope * (tokens - LENGTHS[i])


def limits_of(naive, name, number, form, sample):
    """What the budget `number` (four decimals) means for one sample, as an exact fraction."""
    cost, layers = getattr(naive, name), naive.size.layers
    full, text = (
        Fraction(cost([sample[0]] * layers, *sample)),
        Fraction(cost([0] * layers, 0, sample[1])),
    )
    floor = 0 if form == "total" else text
    return number if form == "absolute" else floor + number * (full - floor)


class Case:
    """One random case; what it asks of the library, and what it should get."""

    def __init__(self, seed, layers=16, tokens=64, samples=4):
        rng = self.rng = random.Random(seed)
        self.name = rng.choice(vispco.list_methods())
        self.method = METHODS.get(self.name)()
        self.first = self.method.first_layer
        self.size = Dimensions(
            rng.randint(self.first + 1, layers),
            rng.choice([8, 32, 96]),
            heads=4,
            kv_heads=rng.choice([1, 2, 4]),
            head_dim=8,
            ffn=rng.choice([16, 88, 256]),
            vocab=60,
            vision_head_dim=8,
        )
        self.samples = [
            (rng.randint(1, tokens), rng.randint(0, 40)) for _ in range(rng.randint(1, samples))
        ]
        self.tokens = max(n for n, _ in self.samples)
        self.naive, self.form = (
            Naive(self.size, self.method),
            rng.choice(["share", "percent", "total", "absolute"]),
        )
        kinds = rng.choice(
            [["flops"], ["flops"], ["kv_cache"], ["latency"], ["flops", "kv_cache"], list(UNITS)]
        )
        self.numbers = {name: self.number(name) for name in kinds}

    def number(self, name):
        """A budget that mostly can be reached."""
        cost, least = (
            getattr(self.naive, name),
            [self.tokens] * self.first + [0] * (self.size.layers - self.first),
        )
        lowest = 0.0
        for n, t in self.samples:
            full, text = cost([n] * self.size.layers, n, t), cost([0] * self.size.layers, 0, t)
            floor = 0 if self.form == "total" else text
            own = cost(self.own(least, n), n, t)
            lowest = max(
                lowest, own if self.form == "absolute" else (own - floor) / max(full - floor, 1e-9)
            )
            high = (
                max(cost([n] * self.size.layers, n, t) for n, t in self.samples)
                if self.form == "absolute"
                else 1.0
            )
        value = lowest + self.rng.uniform(-0.05, 1) * (high - lowest)
        digits = 0 if self.form == "absolute" and name != "latency" else 4
        # Dear ranking: the least may cost more than all.
        value = max(0.0, value if self.form == "absolute" else min(value, 1.0))
        return Fraction(round(value * 10**digits), 10**digits)

    def own(self, counts, n):
        """Whole tokens of a sample of n, for counts out of the largest sample's."""
        return [max(1, c * n // self.tokens) if c else 0 for c in counts]

    def within(self, counts, slack=0):
        """Whether every sample is within budget, by our own count.

        slack: measured times are sums of floats, and get a hair of it.
        """
        return all(
            getattr(self.naive, name)(self.own(counts, n), n, t)
            <= limits_of(self.naive, name, number, self.form, (n, t))
            * (1 + (slack if name == "latency" else 0))
            for name, number in self.numbers.items()
            for n, t in self.samples
        )

    def limit(self):
        """The library's own."""
        costs = {
            "flops": CostModel(self.size, self.method),
            "kv_cache": KVCacheMemory(self.size),
            "latency": LatencyTable(self.size, LENGTHS, SECONDS),
        }
        written = {
            name: {
                "percent": f"{float(100 * x):.8g}%",
                "absolute": f"{float(x)!r} {UNITS[name]}",
            }.get(self.form, float(x))
            for name, x in self.numbers.items()
        }
        n_visual, n_text = map(torch.tensor, zip(*self.samples, strict=True))
        return limit_for(
            written if list(written) != ["flops"] else written["flops"],
            costs,
            n_visual,
            n_text,
            self.first,
            "total" if self.form == "total" else "prunable",
        )

    def kernel(self) -> tuple[Kernel, torch.Tensor]:
        """Any curve."""
        curve = KERNELS.get(self.rng.choice(vispco.list_kernels()))(self.size.layers, self.first)
        generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        return curve, self.rng.choice([0.3, 1, 4]) * torch.randn(
            curve.theta.shape, generator=generator
        )

    def harden(self, limit):
        """Whole tokens, as deployed to every sample.

        Now and then they come by way of the kernel's own form.
        """
        curve, theta = self.kernel()
        hardened = (
            harden_theta(curve, theta, limit)
            if self.rng.random() < 0.05
            else limit.harden(
                curve.schedule(theta) if self.rng.random() < 0.5 else curve.settled(theta)
            )
        )
        config = PruningConfig(self.name, hardened)
        counts = config.tokens(self.tokens)
        assert all(config.tokens(n) == self.own(counts, n) for n, _ in self.samples)
        assert counts[: self.first] == [self.tokens] * self.first
        return counts

    def raised(self, counts):
        """All that one token more in one layer can give."""
        above = [self.tokens, *counts]
        return [
            [c + (i == j) for j, c in enumerate(counts)]
            for i in range(self.first, len(counts))
            if counts[i] < above[i]
        ]


def check(seeds):
    """Check the cases; returns how many were refused, and how many were full.

    Every case is refused if nothing fits. Else it is within its budget, and within one token of the
    best.
    """
    refused = spare = 0
    for seed in seeds:
        case = Case(seed)
        least = [case.tokens] * case.first + [0] * (case.size.layers - case.first)
        try:
            limit = case.limit()
        except ValueError as error:
            refused += 1
            assert "cannot be reached" in str(error) or "pruning saves none" in str(error), (
                f"seed {seed}: {error}"
            )
            assert "saves none" in str(error) or not case.within(least, -1e-12), (
                f"seed {seed} was refused and fits"
            )
            continue
        counts = case.harden(limit)
        assert case.within(counts, 1e-12), (
            f"seed {seed}: {counts} exceeds {case.form} {case.numbers}"
        )
        assert not any(case.within(more, -1e-12) for more in case.raised(counts)), (
            f"seed {seed}: {counts} wastes a token"
        )
        spare += counts == [case.tokens] * len(counts)
    return refused, spare


def test_hardened_schedules_never_exceed_and_are_within_one_token_of_the_best():
    refused, full = check(range(0, 10_000, 8))
    # Nearly all cases are about something.
    assert 20 < refused < 200 and full < 200


@pytest.mark.slow
def test_ten_thousand_hardened_schedules():
    refused, full = check(range(10_000))
    assert 160 < refused < 1600 and full < 1600


def test_nothing_that_keeps_more_fits_by_brute_force():
    """Over all schedules of a few layers and tokens.

    Of costs to which a drop adds nothing; what ranking adds is little.
    """
    seen = wasted = ranked = 0
    for seed in range(200):
        case = Case(seed, layers=4, tokens=7, samples=2)
        try:
            counts = case.harden(case.limit())
        except ValueError:
            continue
        free = "flops" not in case.numbers or not case.method.flops(case.size, 7, 7)
        more = [
            s
            for s in itertools.product(*(range(c, case.tokens + 1) for c in counts))
            if s != tuple(counts)
            and list(s) == sorted(s, reverse=True)
            and s[: case.first] == (case.tokens,) * case.first
        ]
        fitting = [s for s in more if case.within(s, -1e-12)]
        assert not (free and fitting), f"seed {seed}: {counts}, but {fitting[0]} fits"
        seen, ranked, wasted = seen + free, ranked + (not free), wasted + bool(fitting)
    assert seen > 80 and ranked > 40 and wasted <= 0.05 * ranked


# ---- measured by PyTorch's own counter -----------------------------------------------------------
@functools.cache
def measured(images, text, config=None):
    """FLOPs of the tiny LLaVA's prefill by the counter.

    Those of its vision tower and projector are left out.
    """
    model, inputs = make("llava"), without_labels(batch((images,), (text,), (0,), answer=0))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        if config is None:
            model(**inputs, logits_to_keep=1)
        else:
            with vispco.apply(model, config):
                model(**inputs, logits_to_keep=1)
    report = vispco.count_flops(model, config, images * PER_IMAGE, text + 1)
    return counter.get_total_flops() - (report.vision + report.projector if images else 0)


def test_the_flop_counter_finds_no_hardened_schedule_above_its_budget():
    """A real model under `apply`.

    The counter on the pruned, the full and the text-only prompt decides.
    """
    model = make("llava")
    size, layers = (
        adapter_for(model)(model).dimensions(model.config),
        len(model.get_decoder().layers),
    )
    for seed in range(2 * len(vispco.list_methods())):
        rng, name = random.Random(seed), vispco.list_methods()[seed % len(vispco.list_methods())]
        method = METHODS.get(name)()
        samples = [(rng.randint(1, 2), rng.randint(1, 12)) for _ in range(2)]
        n_visual, n_text = (
            torch.tensor(x) for x in zip(*((PER_IMAGE * i, t + 1) for i, t in samples), strict=True)
        )
        curve = KERNELS.get(rng.choice(vispco.list_kernels()))(layers, method.first_layer)
        share = rng.randint(30, 95)
        limit = limit_for(
            f"{share}%", {"flops": CostModel(size, method)}, n_visual, n_text, method.first_layer
        )
        torch.manual_seed(seed)
        config = PruningConfig(
            name, limit.harden(curve.settled(2 * torch.randn(curve.theta.shape)))
        )
        for images, text in samples:
            full, alone = measured(images, text), measured(0, text)
            assert 100 * (pruned(images, text, config) - alone) <= share * (full - alone), (
                f"seed {seed}: {config}"
            )


def pruned(images, text, config):
    """`measured` of a configuration, which is not hashable."""
    return measured.__wrapped__(images, text, config)


# ---- the page of promises ------------------------------------------------------------------------
def test_every_promise_names_what_states_it_and_tests_that_exist():
    """docs/promises.md: each row has a promise.

    Also a name or page that states it, and tests that are there.
    """
    root = Path(__file__).parent.parent
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in (root / "docs" / "promises.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    assert rows.pop(0) == ["promise", "where it is stated", "test"] and len(rows) >= 8
    for promise, stated, tests in rows:
        for name in re.findall(r"`(vispco[\w.]*)`", stated):
            owner = vispco
            for part in name.split(".")[1:]:
                owner = getattr(owner, part, None) or importlib.import_module(f"vispco.{part}")
            assert owner.__doc__, f"{name} says nothing"
        named = re.findall(r"`tests/(test_\w+\.py)::(test_\w+)`", tests)
        assert named and len(named) == tests.count("`") / 2, f"no test holds: {promise}"
        for file, test in named:
            assert re.search(
                rf"^def {test}\(", (root / "tests" / file).read_text(encoding="utf-8"), re.M
            ), f"{file} lacks {test}"
