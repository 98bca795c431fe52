"""One model and one method, with the calibration and the held-out questions for both."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch

from vispco import testbed
from vispco.baselines.downsample import evaluate_downsampled
from vispco.budget import Budget
from vispco.calibration import shapes
from vispco.config import PruningConfig
from vispco.evaluate import Record
from vispco.flops import CostModel
from vispco.registry import adapter_for, build_method
from vispco.solvers.evaluator import Evaluator
from vispco.utils.digest import key, of_model

from .cache import MEASURING, SEARCHING, SHRINKING, Cache, code
from .deep import deepen
from .measure import Answers, Questions, ask

#: Where models run, such as "cuda". What one device has measured is not taken for another's.
DEVICE = os.environ.get("VISPCO_REPRODUCTION_DEVICE", "cpu")


@lru_cache(maxsize=2)
def _loaded(name: str, factor: int) -> tuple[Any, str]:
    """A testbed model, deepened, and its digest."""
    model, _ = testbed.load(name)
    if factor > 1:
        model = deepen(model, factor)
    digest = of_model(model)
    if DEVICE != "cpu":
        digest += f" on {DEVICE}"
    return model.eval().to(DEVICE), digest


class Benchmark:
    """Configurations of one method on one model, measured through the cache.

    calibration, test: numbers of questions. factor: times the model's depth (`deepen`).
    tasks: of the calibration questions; None: all eight.
    passes, held_out_passes: forward passes of one question on the calibration and on the held-out
    questions, counted as if nothing had been in the cache. The full model's own pass over the
    calibration questions counts once.
    """

    def __init__(
        self,
        name: str,
        method: str,
        cache: Cache,
        *,
        calibration: int = 128,
        test: int = 256,
        batch: int = 16,
        seed: int = 0,
        factor: int = 1,
        tasks: Sequence[str] | None = None,
    ):
        self.name = name
        self.method = method
        self.cache = cache
        self.seed = seed
        self.model, self.digest = _loaded(name, factor)
        self.calibration = self.questions("calibration", calibration, batch, tasks)
        self._test = test
        adapter, scorer = adapter_for(self.model)(self.model), build_method(method)
        self.layers = len(adapter.layers)
        self.first_layer = scorer.first_layer
        self.cost = CostModel(adapter.dimensions(adapter.config), scorer)
        self.everything = self.limit(1.0)
        self.tokens = self.everything.tokens
        self.least = self.everything.share(self.everything.least)
        self.passes = len(self.calibration)
        self.held_out_passes = 0

    def questions(
        self, split: str, n: int, batch: int = 64, tasks: Sequence[str] | None = None
    ) -> Questions:
        """Questions of a split, for this model."""
        batches = testbed.batches(split, n, batch, self.seed, tasks=tasks, model=self.name)
        return Questions(self.model, batches)

    @cached_property
    def test(self) -> Questions:
        """The held-out questions."""
        return self.questions("test", self._test)

    @cached_property
    def nothing(self) -> PruningConfig:
        """No visual token from the first layer on that the method can prune: least accuracy."""
        return self.config([count / self.tokens for count in self.everything.least])

    def config(self, ratios: Sequence[float]) -> PruningConfig:
        """A configuration of the benchmark's method."""
        return PruningConfig(self.method, ratios)

    def limit(self, budget: float, first_layer: int | None = None) -> Budget:
        """A budget that holds for every calibration question."""
        first = self.first_layer if first_layer is None else first_layer
        return Budget(budget, self.cost, *shapes(self.calibration.prepared), first)

    def reachable(self, budgets: Sequence[float]) -> list[float]:
        """Those of the budgets that the method can hold."""
        return [budget for budget in budgets if budget >= self.least + 1e-6]

    def share(self, config: PruningConfig) -> float:
        """Share of the prunable cost, of the calibration question that costs most."""
        return self.everything.share(config.tokens(self.tokens))

    def kl(self, config: PruningConfig) -> float:
        """KL on the calibration questions."""
        return self.answers(config).kl

    def accuracy(self, config: PruningConfig) -> float:
        """Accuracy on the held-out questions."""
        return self.answers(config, self.test).accuracy

    def answers(
        self,
        config: PruningConfig | None,
        questions: Questions | None = None,
        part: Sequence[int] | None = None,
    ) -> Answers:
        """Answers to the calibration questions, or to others.

        config: None for the full model. part: only these batches (numbers); None: all.
        """
        asked = self.calibration if questions is None else questions
        batches = range(len(asked.prepared)) if part is None else part
        rows = asked.rows(batches)
        if asked is self.calibration:
            self.passes += len(rows)
        else:
            self.held_out_passes += len(rows)
        whole = self._key(config, asked.digest)
        if part is None or whole in self.cache:
            found = self.cache.get(whole, lambda: ask(self.model, config, asked.prepared))
            picked = rows.tolist()
        else:
            name = self._key(config, key(of=asked.digest, part=part))
            chosen = [asked.prepared[i] for i in batches]
            found = self.cache.get(name, lambda: ask(self.model, config, chosen))
            picked = list(range(len(rows)))
        divergence = torch.tensor([found["kl"][i] for i in picked], dtype=torch.float64)
        right = torch.tensor([found["right"][i] == "1" for i in picked])
        return Answers(divergence, asked.count[rows], right)

    def _key(self, config: PruningConfig | None, data: str) -> str:
        """The cache's key for answers to the questions of digest `data`."""
        return key(
            kind="answers",
            code=code(MEASURING),
            model=self.digest,
            data=data,
            method=config and config.method,
            options=config and dict(config.method_options),
            tokens=config and config.tokens(self.tokens),
        )

    def smaller(self, scale: float) -> dict:
        """Accuracy, share and KL on the held-out questions with smaller pictures."""
        self.held_out_passes += len(self.test)
        name = key(
            kind="smaller",
            code=code(SHRINKING),
            model=self.digest,
            data=self.test.digest,
            scale=scale,
        )

        def measure() -> dict:
            record = evaluate_downsampled(self.model, self.test.prepared, scale)
            return {"accuracy": record.accuracy, "share": record.prunable_share, "kl": record.kl}

        return self.cache.get(name, measure)

    def searched(self, what: str, make: Callable[[], Any], **options) -> Any:
        """The JSON-ready result of a search on the calibration questions, by name and options."""
        name = key(
            kind=what,
            code=code(SEARCHING),
            model=self.digest,
            data=self.calibration.digest,
            method=self.method,
            options=options,
        )
        return self.cache.get(name, make)

    def evaluator(self) -> CachedEvaluator:
        """An objective for searchers that only ask for the KL."""
        return CachedEvaluator(self)


class CachedEvaluator(Evaluator):
    """The library's evaluator, measured through the cache.

    `passes` counts as if nothing had been there.
    """

    def __init__(self, benchmark: Benchmark):
        method = {"method": benchmark.method}
        super().__init__(benchmark.model, benchmark.calibration.prepared, method)
        self.benchmark = benchmark

    def _run(self, schedule, part):
        if part is None and schedule in self.records:
            return self.records[schedule]
        config = self.config(schedule)
        answers = self.benchmark.answers(config, part=part)
        share = self.benchmark.share(config)
        self.passes += len(answers.right)
        record = Record(
            accuracy=answers.accuracy,
            kl=answers.kl,
            task_loss=float("nan"),
            flops=0.0,
            share=share,
            prunable_share=share,
            n=len(answers.right),
            correct=answers.right,
        )
        if part is None:
            self.records[schedule] = record
        return record
