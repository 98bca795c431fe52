"""Bias and variance of the gradient estimators, against exact differences of the hard loss.

    python -m tests.reproduction.estimators --model testbed-llava --seed 0 --output FOLDER

Coordinates. A schedule is a list of drops d_p >= 0, the tokens that leave before layer p: k_i = N -
sum of d_p, p <= i. In keep counts k_i the loss has kinks: where k_i = k_{i-1}, one token more
changes nothing (it is gone already), one less means one less in all later layers of the plateau
too, and no gradient in k can say both. In drops every direction is a schedule, and the loss has a
slope in each: two-sided where d_p > 0, to the right where d_p = 0.

Truth. With k_i rounded at random to the whole numbers around it (E k_i = k_i), the expected loss is
piecewise linear, and its slope in d_p is the difference KL(d + e_p) - KL(d), measured here in whole
tokens, in the deployed forward pass: [KL(d + h e_p) - KL(d - h e_p)] / 2h, h = 1, 4, 8 tokens (to
the right where d_p < h). One token is what "gradient" means literally; 4 and 8 are what an
optimiser moves by.

What matters to a search on a budget is the part of the gradient along it: the component along the
gradient of the FLOPs (in drops) is taken out of truth and estimates alike.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vispco import testbed
from vispco.budget import Budget
from vispco.calibration import frozen, prepare, run_teacher, shapes
from vispco.flops import CostModel
from vispco.pruning import Dropping, Masking
from vispco.pruning.forward import kl_divergence
from vispco.registry import adapter_for, build_method
from vispco.ste import build_estimator
from vispco.utils.files import write_text

from . import estimator_zoo  # noqa: F401
from .estimator_candidates import BATCH, CANDIDATES, REACHES, STEPPED
from .estimator_scores import compare, cosine, table
from .gradients import central_difference


class Ground:
    """One schedule of one model on some questions: KL of its neighbours, and gradients."""

    def __init__(self, model, scorer, prepared, limit: Budget, counts: list[int]):
        self.model, self.scorer, self.prepared, self.limit = model, scorer, prepared, limit
        self.adapter, self.first, self.tokens = (
            adapter_for(model)(model),
            limit.first_layer,
            limit.tokens,
        )
        self.drops = (
            -torch.tensor(counts).diff(prepend=torch.tensor([self.tokens]))[self.first :].double()
        )  # (P,)
        self._known: dict[tuple, Tensor] = {}

    def counts(self, drops: Tensor) -> Tensor:
        """Keep counts (..., L) of drops (..., P)."""
        kept = (self.tokens - drops.clamp(min=0).cumsum(-1)).clamp(min=0)
        return torch.cat(
            [
                torch.full_like(kept[..., :1], self.tokens).expand(*kept.shape[:-1], self.first),
                kept,
            ],
            -1,
        )

    def losses(self, prepared_batch, counts: Tensor) -> Tensor:
        """KL (B,) of each question, under keep counts (L,) or (B, L)."""
        with Dropping(self.adapter, self.scorer, counts / self.tokens).install() as pruner:
            return self._kl(
                prepared_batch, kl_divergence(pruner.run(prepared_batch), prepared_batch.log_probs)
            ).detach()

    def gradient(self, prepared_batch, counts: Tensor, estimator, seed: int = 0) -> Tensor:
        """An estimator's gradient of those in the keep counts (B, L)."""
        with Masking(
            self.adapter, self.scorer, counts / self.tokens, estimator
        ).install() as pruner:
            kl = self._kl(prepared_batch, pruner.losses(prepared_batch, seed=seed))
            return torch.autograd.grad(kl.sum(), counts)[0]

    def _kl(self, prepared_batch, divergence: Tensor) -> Tensor:
        """Mean KL of each question's answer (B,)."""
        share = (
            1
            / torch.bincount(prepared_batch.rows, minlength=len(prepared_batch))[
                prepared_batch.rows
            ]
        )
        return torch.zeros(len(prepared_batch)).index_add(
            0, prepared_batch.rows, divergence * share
        )

    @torch.no_grad()
    def kl(self, drops: Tensor, part: slice = slice(None)) -> Tensor:
        """KL (questions,) of whole drops (P,), each schedule measured once."""
        counts = self.counts(drops).round()
        key = (tuple(counts.tolist()), part.stop)
        if key not in self._known:
            self._known[key] = torch.cat(
                [self.losses(prepared_batch, counts) for prepared_batch in self.prepared[part]]
            )
        return self._known[key]

    def truth(self, reach: int) -> Tensor:
        """Slopes (questions, P) in each drop."""
        slopes = []
        for p, drop in enumerate(self.drops.tolist()):
            step = torch.zeros_like(self.drops)
            step[p] = reach
            back = step if drop >= reach else torch.zeros_like(step)
            slopes.append(
                (self.kl(self.drops + step) - self.kl(self.drops - back)) / (reach + back.sum())
            )
        return torch.stack(slopes, 1).double()

    def gradients(self, candidate, seed: int) -> Tensor:
        """What an estimator says (questions, P), in drops."""
        generator = torch.Generator().manual_seed(seed)
        estimator = (
            build_estimator({**candidate, "seed": seed}) if isinstance(candidate, dict) else None
        )
        return torch.cat(
            [
                self._gradient(prepared_batch, candidate, estimator, generator, number)
                for number, prepared_batch in enumerate(self.prepared)
            ]
        )

    def _gradient(self, prepared_batch, candidate, estimator, generator, number: int) -> Tensor:
        if estimator is None:
            function, options = candidate

            def loss(drops: Tensor) -> Tensor:  # whole tokens, rounded at random: right on average
                return self.losses(
                    prepared_batch, self._rounded(self.counts(drops), generator)
                ).double()

            with torch.no_grad():
                return function(
                    loss,
                    self.drops,
                    len(prepared_batch),
                    generator=generator,
                    mean=False,
                    **options,
                )
        counts = self.counts(self.drops).expand(len(prepared_batch), -1).clone().requires_grad_()
        in_counts = self.gradient(prepared_batch, counts, estimator, number).double() * (counts > 0)
        return -in_counts.flip(-1).cumsum(-1).flip(-1)[:, self.first :]

    @staticmethod
    def _rounded(counts: Tensor, generator) -> Tensor:
        return (counts + torch.rand(len(counts), 1, generator=generator).to(counts)).floor()

    def tangent(self, slopes: Tensor) -> Tensor:
        """`slopes` (..., P) without their component along the FLOPs."""
        drops = self.drops.clone().requires_grad_()
        (normal,) = torch.autograd.grad(self.limit.slack(self.counts(drops) / self.tokens), drops)
        normal = normal / normal.norm()
        return slopes - (slopes @ normal)[..., None] * normal

    def stepped(self, direction: Tensor, tokens: float = 8.0) -> Tensor:
        """The schedule after a step down `direction` (P,) that moves so many tokens in all, back on
        the budget.
        """
        drops = (self.drops - tokens * direction / direction.abs().sum()).clamp(min=0)
        counts = torch.tensor(self.limit.harden(self.counts(drops) / self.tokens)) * self.tokens
        return (
            -counts.double().diff(prepend=counts.new_full((1,), self.tokens))[self.first :].round()
        )


def schedules(layers: int, first: int) -> dict[str, tuple[float, Tensor]]:
    """{label: (budget, keep ratios before hardening)}: early and late drops, and a drop at every
    layer.
    """
    i = torch.arange(layers)
    middle = layers // 2
    return {
        "early, .3": (0.3, 1 - 0.7 * (i >= first) - 0.2 * (i >= middle)),
        "early, .5": (0.5, 1 - 0.45 * (i >= first + 1) - 0.3 * (i >= middle + 1)),
        "every layer, .5": (0.5, 1 - (i - first + 1).clamp(min=0) / (layers - first + 1)),
        "late, .7": (0.7, 1 - 0.4 * (i >= middle) - 0.4 * (i >= layers - 2)),
    }


def study(
    model_name: str,
    method: str,
    seed: int,
    questions: int,
    only: str | None = None,
    steps: int = 8,
    report: Callable[[str], None] = print,
) -> dict:
    """Everything, JSON-ready: {"schedules": {label: {...}}, "estimators": {label: {schedule:
    {...}}}}.
    """
    started = time.process_time()
    model, _ = testbed.load(model_name)
    scorer = build_method(method)
    adapter = adapter_for(model)(model)
    every = prepare(
        model,
        testbed.batches("calibration", 4 * questions, BATCH, seed, model=model_name),
        keep_features=True,
    )
    found: dict = {
        "model": model_name,
        "method": method,
        "seed": seed,
        "questions": 4 * questions,
        "schedules": {},
        "estimators": {},
    }
    with frozen(model):
        run_teacher(model, every)
        for number, (label, (share, ratios)) in enumerate(
            schedules(len(adapter.layers), scorer.first_layer).items()
        ):
            prepared = every[number * questions // BATCH : (number + 1) * questions // BATCH]
            cost = CostModel(adapter.dimensions(adapter.config), scorer)
            limit = Budget(share, cost, *shapes(prepared), scorer.first_layer)
            counts = [round(r * limit.tokens) for r in limit.harden(ratios)]
            ground = Ground(model, scorer, prepared, limit, counts)
            truths = {reach: ground.truth(reach) for reach in REACHES}
            means = {reach: ground.tangent(slopes).mean(0) for reach, slopes in truths.items()}
            found["schedules"][label] = {
                "counts": counts,
                "kl": float(ground.kl(ground.drops).mean()),
                "slopes": {str(reach): slopes.mean(0).tolist() for reach, slopes in truths.items()},
                "along the budget": {str(reach): mean.tolist() for reach, mean in means.items()},
                "cosine of h = 1 with": {
                    str(reach): float(cosine(means[1], mean)) for reach, mean in means.items()
                },
            }
            report(f"{label}: {counts}, {time.process_time() - started:.0f} s")
            # It takes 2 P + 1 passes a question: a limit, no competitor.
            own = {"truth on a batch, h = 4": (truths[4], 3.0)}
            for name, candidate in CANDIDATES.items():
                if only is None or only in name:
                    passes = (
                        2.0
                        if not isinstance(candidate, dict) and candidate[0] is central_difference
                        else 3.0
                    )
                    own[name] = (ground.gradients(candidate, seed), passes)
            for name, (gradients, passes) in own.items():
                row = compare(ground, gradients, truths, passes, seed, steps * (name in STEPPED))
                found["estimators"].setdefault(name, {})[label] = row
                score, of_batch = row["cosine"]["4"], row["cosine of a batch"]["4"]
                report(f"  {name:36} cosine {score:5.2f}, of a batch {of_batch:5.2f}")
    found["seconds"] = round(time.process_time() - started, 1)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="testbed-llava")
    parser.add_argument("--method", default="fastv")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=128, help="for each schedule")
    parser.add_argument("--only", help="estimators whose name contains this")
    parser.add_argument(
        "--steps", type=int, default=8, help="real steps to try for each estimator and schedule"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.questions < 1 or options.questions % BATCH:
        parser.error(f"--questions must be a multiple of {BATCH}, got {options.questions}")
    torch.set_num_threads(1)
    found = study(
        options.model, options.method, options.seed, options.questions, options.only, options.steps
    )
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        write_text(options.output / "estimators.json", json.dumps(found, indent=1) + "\n")
        write_text(options.output / "estimators.md", table(found))


if __name__ == "__main__":
    main()
