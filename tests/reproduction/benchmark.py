"""Where everybody meets: one model, one method, one set of calibration questions and one of held-out questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from vispco import testbed
from vispco.baselines.downsample import evaluate_downsampled
from vispco.budget import Budget
from vispco.config import PruningConfig
from vispco.evaluate import Record, grade
from vispco.flops import CostModel
from vispco.pruning import apply
from vispco.registry import adapter_for, build_method
from vispco.utils.digest import key, of_batches, of_model
from vispco.solvers.refine import Evaluator
from vispco.calibration import PreparedBatch, prepare, shapes, run_teacher
from .cache import MEASURING, SEARCHING, SHRINKING, Cache, code
from .deep import deepen



@dataclass(frozen=True)
class Answers:
    """What one configuration answers to some questions, question by question.

    divergence: (N,) sum of KL(pruned || full) over the answer tokens. count: (N,) answer tokens. right: (N,) bool.
    """

    divergence: Tensor
    count: Tensor
    right: Tensor

    @property
    def kl(self) -> float:
        """Mean over the answer tokens, as of `vispco.evaluate`."""
        return float((self.divergence.sum() / self.count.sum()).clamp(min=0))

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.double().mean())


class Questions:
    """Batches of questions, answered once by the full model; `digest` names them."""

    def __init__(self, model, batches: Sequence[dict]):
        self.batches, self.prepared = list(batches), prepare(model, batches, keep_features=True)
        self.digest = of_batches(batches)
        self.count = torch.cat([torch.bincount(prepared_batch.rows, minlength=len(prepared_batch)) for prepared_batch in self.prepared])

    def __len__(self) -> int:
        return len(self.count)

    def rows(self, part: Sequence[int]) -> Tensor:
        """Numbers of the questions in some batches, in the order of these."""
        ends = torch.tensor(list(map(len, self.prepared))).cumsum(0).tolist()
        return torch.cat([torch.arange(ends[i] - len(self.prepared[i]), ends[i]) for i in part])


@lru_cache(maxsize=2)
def _loaded(name: str, factor: int) -> tuple[Any, str]:
    model, _ = testbed.load(name)
    if factor > 1:
        model = deepen(model, factor)
    return model.eval(), of_model(model)


class Arena:
    """Configurations of one method on one model, measured through the cache.

    factor: times the model's depth (`deepen`). tasks: of the calibration questions; None: all eight.
    passes, held_out_passes: forward passes of one question on the calibration and on the held-out questions, counted
    as if nothing had been in the cache. The full model's own pass over the calibration data counts, once.
    """

    def __init__(self, name: str, method: str, cache: Cache, *, calibration: int = 128, test: int = 256, batch: int = 16,
                 seed: int = 0, factor: int = 1, tasks: Sequence[str] | None = None):
        self.name, self.method, self.cache, self.seed = name, method, cache, seed
        self.model, self.digest = _loaded(name, factor)
        self.calibration = self.questions("calibration", calibration, batch, tasks)
        self._test = test
        adapter, scorer = adapter_for(self.model)(self.model), build_method(method)
        self.adapter, self.layers, self.first_layer = adapter, len(adapter.layers), scorer.first_layer
        self.cost = CostModel(adapter.dimensions(adapter.config), scorer)
        self.everything = self.limit(1.0)
        self.tokens = self.everything.tokens
        self.least = self.everything.share(self.everything.least)
        self.passes, self.held_out_passes = len(self.calibration), 0

    def questions(self, split: str, n: int, batch: int = 64, tasks: Sequence[str] | None = None) -> Questions:
        """Questions of a split for this model."""
        return Questions(self.model, testbed.batches(split, n, batch, self.seed, tasks=tasks, model=self.name))

    @cached_property
    def test(self) -> Questions:
        """The held-out questions."""
        return self.questions("test", self._test)

    @cached_property
    def nothing(self) -> PruningConfig:
        """No visual token from the first layer on that the method can prune: the floor of every accuracy."""
        return self.config([count / self.tokens for count in self.everything.least])

    def config(self, ratios: Sequence[float]) -> PruningConfig:
        """A configuration of the arena's method."""
        return PruningConfig(self.method, ratios)

    def limit(self, budget: float, first_layer: int | None = None) -> Budget:
        """A budget that holds for every calibration question."""
        first = self.first_layer if first_layer is None else first_layer
        return Budget(budget, self.cost, *shapes(self.calibration.prepared), first)

    def reachable(self, budgets: Sequence[float]) -> list[float]:
        """Those of the budgets that the method can hold."""
        return [b for b in budgets if b >= self.least + 1e-6]

    def share(self, config: PruningConfig) -> float:
        """Of the prunable cost of the costliest calibration question."""
        return self.everything.share(config.tokens(self.tokens))

    def kl(self, config: PruningConfig) -> float:
        """On the calibration questions."""
        return self.answers(config).kl

    def accuracy(self, config: PruningConfig) -> float:
        """On the held-out questions."""
        return self.answers(config, self.test).accuracy

    def answers(self, config: PruningConfig | None, questions: Questions | None = None,
                part: Sequence[int] | None = None) -> Answers:
        """To the calibration questions, or to others; None: of the full model. part: only these batches (numbers)."""
        asked = self.calibration if questions is None else questions
        rows = asked.rows(range(len(asked.prepared)) if part is None else part)
        count = asked.count[rows]
        if asked is self.calibration:
            self.passes += len(count)
        else:
            self.held_out_passes += len(count)
        names = [key(kind="answers", code=code(MEASURING), model=self.digest, data=data, method=config and config.method,
                     options=config and dict(config.method_options), tokens=config and config.tokens(self.tokens))
                 for data in (asked.digest, key(of=asked.digest, part=part))]
        if part is None or names[0] in self.cache:
            found = self.cache.get(names[0], lambda: self._ask(config, asked.prepared))
            found = {"kl": torch.tensor(found["kl"], dtype=torch.float64)[rows], "right": [found["right"][i] for i in rows.tolist()]}
        else:
            found = self.cache.get(names[1], lambda: self._ask(config, [asked.prepared[i] for i in part]))
        return Answers(torch.as_tensor(found["kl"], dtype=torch.float64), count,
                       torch.tensor([c == "1" for c in found["right"]]))

    def smaller(self, scale: float) -> dict:
        """The held-out questions with smaller pictures: accuracy and share."""
        self.held_out_passes += len(self.test)
        name = key(kind="smaller", code=code(SHRINKING), model=self.digest, data=self.test.digest, scale=scale)

        def measure() -> dict:
            record = evaluate_downsampled(self.model, self.test.prepared, scale)
            return {"accuracy": record.accuracy, "share": record.prunable_share, "kl": record.kl}

        return self.cache.get(name, measure)

    def searched(self, what: str, make, **options) -> Any:
        """The JSON-ready result of a search on the calibration data, by its name and its options."""
        name = key(kind=what, code=code(SEARCHING), model=self.digest, data=self.calibration.digest, method=self.method,
                   options=options)
        return self.cache.get(name, make)

    def evaluator(self) -> CachedEvaluator:
        """An objective for searchers that only ask for the KL."""
        return CachedEvaluator(self)

    @torch.no_grad()
    def _ask(self, config: PruningConfig | None, prepared: list[PreparedBatch]) -> dict:
        run_teacher(self.model, prepared)
        divergence, right = [], []
        if config is None:
            graded = [grade(prepared_batch, prepared_batch.log_probs) for prepared_batch in prepared]
        else:
            with apply(self.model, config) as pruner:
                graded = [grade(prepared_batch, pruner.run(prepared_batch)) for prepared_batch in prepared]
        for prepared_batch, (correct, kl, *_) in zip(prepared, graded):
            sums = torch.zeros(len(prepared_batch), dtype=torch.float64).index_add_(0, prepared_batch.rows, kl.double())
            divergence += [float(f"{v:.7g}") for v in sums.tolist()]
            right += correct.tolist()
        return {"kl": divergence, "right": "".join("01"[r] for r in right)}


class CachedEvaluator(Evaluator):
    """The library's objective, measured through the cache; `passes` counts as if there were none."""

    def __init__(self, arena: Arena):
        super().__init__(arena.model, arena.calibration.prepared, {"method": arena.method})
        self.arena = arena

    def _run(self, schedule, part):
        if part is None and schedule in self.records:
            return self.records[schedule]
        config = self.config(schedule)
        answers, share = self.arena.answers(config, part=part), self.arena.share(config)
        self.passes += len(answers.right)
        record = Record(accuracy=answers.accuracy, kl=answers.kl, task_loss=float("nan"), flops=0.0, share=share,
                        prunable_share=share, n=len(answers.right), correct=answers.right)
        if part is None:
            self.records[schedule] = record
        return record
