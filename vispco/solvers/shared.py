"""`start="shared"`: learn the whole frontier in one run, then ask for any budget.

    minimise over f   E_{x, B} log KL(pruned || full),   r = R(i; f(x, B)) stretched so that F(r) = B

Every sample of a batch draws a budget of its own. Its schedule is projected onto that budget (`vispco.schedule.project`), so the
constraint holds at every step and needs no multiplier. The logarithm gives all budgets a say: small ones have a divergence
a hundred times that of large ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..budget import Budget, Limit
from ..calibration import PreparedBatch, answer_logits, before_answer, during
from ..pruning import Masking
from ..registry import adapter_for
from ..schedule import project, ramp, to_whole_tokens
from ..ste import build_estimator
from ..utils.distributed import gathered, processes, rank, total
from ..utils.journal import Journal, decode_tensor, digest_tensors, encode_tensor
from .evaluator import Evaluator
from .predictor import RatioPredictor
from .problem import Problem
from .steps import batch_order, decay, gradients

#: Added to a divergence before its logarithm is taken: what is near 0 nats is as good as 0.
EPSILON = 1e-2


@dataclass(frozen=True)
class Shared:
    """Options of `start="shared"`: one predictor of the keep ratios for all budgets, learned in one run.

    steps: gradient steps in all, one batch each. Small batches and many steps do better than the reverse: 200 batches of 8
    questions, say.
    learning_rate: of the predictor's table of thetas. Its network, if it looks at the prompts, learns at a twentieth.
    between: the least and the largest budget that will be asked for, as shares of the prunable cost; None: all that can be
    reached, up to 0.95.
    conditioned: whether the predictor looks at the prompts, or at the budget alone.
    estimator, checkpoint: see `Gradient`.
    With a free kernel every budget starts at its `vispco.schedule.ramp`.
    Raises ValueError for bad values.
    """

    name: ClassVar[str] = "shared"
    #: Whether it answers other budgets afterwards.
    any_budget: ClassVar[bool] = True

    steps: int = 200
    learning_rate: float = 0.1
    between: tuple[float, float] | None = None
    conditioned: bool = False
    estimator: str | Mapping | None = None
    checkpoint: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        build_estimator(self.estimator)

    def solver(self, problem: Problem, limits: Sequence[Limit], seed: int) -> Training:
        """The training on a problem.

        Raises ValueError for budgets that are no shares of the prunable cost, another objective than "kl", or a bad `between`.
        """
        check_shares(problem, limits)
        return Training(self, problem, seed)


def check_shares(problem: Problem, limits: Sequence[Limit]) -> None:
    """Raise ValueError unless every budget is a share of the prunable FLOPs, and the objective "kl"."""
    options = problem.options
    if options.objective != "kl" or options.relative_to != "prunable":
        raise ValueError("start='shared' minimises the divergence over shares of the prunable cost: leave objective 'kl' and "
                         f"relative_to 'prunable', got {options.objective!r} and {options.relative_to!r}")
    for limit in limits:
        if isinstance(limit.value, bool) or not isinstance(limit.value, int | float) or limit.value > 1:
            raise ValueError(f"start='shared' takes budgets that are shares such as 0.5, got {limit.value!r}")


class Learned:
    """What a shared search has learned: a schedule for any budget. It is a start of its own.

    predictor: the network. kernel: the curve whose theta it gives. passes: forward passes that learning took.
    """

    name = "learned"
    any_budget, checkpoint, propose = True, False, None

    def __init__(self, problem: Problem, predictor: RatioPredictor):
        self.problem, self.kernel, self.predictor = problem, problem.kernel, predictor
        self.passes = 0

    def arguments(self) -> dict[str, Any]:
        """What decides the result, for the journal."""
        return {"predictor": digest_tensors(*self.predictor.parameters())}

    def solver(self, problem: Problem, limits: Sequence[Limit], seed: int) -> Learned:
        """Itself. Raises ValueError for budgets that are no shares."""
        check_shares(problem, limits)
        return self

    def run(self, evaluators: Sequence[Evaluator], limits: Sequence[Limit], journal: Journal) -> int:
        """Measure the predicted schedule of every limit; returns the forward passes that learning took."""
        for limit, evaluator in zip(limits, evaluators, strict=True):
            evaluator.losses([tuple(limit.harden(self.ratios(limit.value)))])
        return self.passes

    @torch.no_grad()
    def ratios(self, budget: float) -> Tensor:
        """The schedule (L,) for a share of the prunable cost, not yet in whole tokens.

        A predictor that looks at prompts gives the mean over the calibration data.
        """
        prepared = self.problem.prepared if self.predictor.conditioned else self.problem.prepared[:1]
        schedules = []
        for batch in prepared:
            budgets = torch.full((len(batch),), float(budget))
            theta = self.predictor(budgets, *features(self.problem.model, batch, self.predictor))
            schedules.append(self.kernel.schedule(theta))
        return gathered(torch.cat(schedules).double()).mean(0)


class Training:
    """Learns the predictor, then measures what it predicts. learned: the result, which learns no more."""

    propose = None

    def __init__(self, options: Shared, problem: Problem, seed: int):
        self.options, self.problem, self.seed = options, problem, seed
        everything = self._limit(1.0)
        self.least = everything.share(everything.least)
        self.between = self._checked_range(problem.method)
        self.predictor = self._predictor()
        self.learned = Learned(problem, self.predictor)

    def _limit(self, share: float) -> Budget:
        problem = self.problem
        return Budget(share, problem.costs["flops"], problem.n_visual, problem.n_text, problem.first_layer)

    def _checked_range(self, method: str) -> tuple[float, float]:
        low, high = self.options.between or (self.least, 0.95)
        if not self.least <= low + 1e-9 < high <= 1:
            raise ValueError(f"between must be two increasing shares in [{self.least:.4g}, 1], what {method!r} can reach on this "
                             f"model, got {self.options.between!r}")
        return low, high

    def _predictor(self) -> RatioPredictor:
        problem = self.problem
        dimensions = problem.adapter.dimensions(problem.adapter.config)
        hidden = dimensions.hidden if self.options.conditioned else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            predictor = RatioPredictor(problem.kernel, hidden, self.between)
        inverse = getattr(problem.kernel, "inverse", None)
        if inverse is not None:
            reachable = [max(knot, self.least + 1e-3) for knot in predictor.knots]
            ramps = [ramp(self._limit(share)) for share in reachable]
            predictor.begin(torch.stack([inverse(ratios) for ratios in ramps]))
        return predictor

    def arguments(self) -> dict[str, Any]:
        """What decides the result, for journal and frontier."""
        return {**asdict(self.options), "between": list(self.between)}

    def run(self, evaluators: Sequence[Evaluator], limits: Sequence[Limit], journal: Journal) -> int:
        """Train, then measure the predicted schedules; returns the passes of the training, a backward pass counting two."""
        self.learned.passes = 3 * self._train(journal)
        self.predictor.eval()
        return self.learned.run(evaluators, limits, journal)

    def _train(self, journal: Journal) -> int:
        """Fit the predictor; returns the samples seen."""
        problem, steps = self.problem, self.options.steps
        parameters = list(self.predictor.parameters())
        table, *network = parameters
        rate = self.options.learning_rate
        optimizer = torch.optim.Adam([{"params": [table], "lr": rate}, {"params": network, "lr": rate / 20}])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay(step, steps))
        generator = torch.Generator().manual_seed(self.seed)
        order = batch_order(len(problem.prepared), generator)
        everything_kept = torch.ones(1, requires_grad=True)
        seen = 0
        with Masking(problem.adapter, problem.scorer, everything_kept, self.options.estimator).install() as pruner:
            for step in range(steps):
                number = next(order)
                batch = problem.prepared[number]
                samples = total(len(batch))
                budgets = self._draw_budgets(samples, generator)
                asked = {"step": step, "batch": number, "budgets": digest_tensors(budgets),
                         "predictor": digest_tensors(*parameters)}
                found = journal.recall(asked, lambda: self._step(pruner, batch, budgets, parameters, step))
                for parameter, gradient in zip(parameters, found["gradients"], strict=True):
                    parameter.grad = decode_tensor(gradient, parameter)
                optimizer.step()
                schedule.step()
                seen += samples
                if problem.callback:
                    problem.callback({"step": step, "steps": steps, "loss": found["loss"], "log": found["log"]})
        return seen

    def _draw_budgets(self, samples: int, generator: torch.Generator) -> Tensor:
        """One budget (samples,) for each sample of all processes, stratified over the range."""
        low, high = self.between
        places = torch.rand(samples, generator=generator) + torch.randperm(samples, generator=generator)
        return low + (high - low) * places / samples

    def _step(self, pruner: Masking, batch: PreparedBatch, budgets: Tensor, parameters: list[nn.Parameter],
              step: int) -> dict:
        """All that a step costs: the mean divergence, the loss, and the gradients."""
        problem, cost = self.problem, self.problem.costs["flops"]
        own = budgets[rank() :: processes()]
        theta = self.predictor(own, *features(problem.model, batch, self.predictor))
        text = cost.text_only(batch.n_text).double()
        full = cost.full(batch.n_visual, batch.n_text).double()
        limit = text + own * (full - text)
        ratios = project(problem.kernel.schedule(theta), cost, batch.n_visual, batch.n_text, limit)
        with during(f"step {step}"):
            divergence = mean_divergence(pruner, batch, to_whole_tokens(ratios, problem.tokens), step)
            loss = (divergence + EPSILON).log().sum() / total(len(divergence))
            found = gradients(loss, parameters)
        return {"loss": float(gathered(divergence.detach()).mean()), "log": float(total(loss.detach())),
                "gradients": [encode_tensor(gradient) for gradient in found]}


def mean_divergence(pruner: Masking, batch: PreparedBatch, ratios: Tensor, seed: int) -> Tensor:
    """Mean KL(pruned || full) of each sample that has an answer (samples,), in nats, differentiable in the ratios."""
    losses = pruner.losses(batch, ratios, seed, "kl")  # (A,)
    rows = batch.rows.to(losses.device)
    answers = torch.bincount(rows, minlength=len(batch)).to(losses)
    sums = torch.zeros(len(batch), device=rows.device).index_add(0, rows, losses)
    return (sums / answers.clamp(min=1))[answers > 0]


@torch.no_grad()
def features(model: nn.Module, batch: PreparedBatch, predictor: RatioPredictor) -> tuple[Tensor, Tensor] | tuple[()]:
    """What a predictor that looks at prompts sees: input embeddings (B, S, hidden), and which are of the prompt (B, S).

    A predictor that looks at the budget alone needs nothing: ().
    """
    if not predictor.conditioned:
        return ()
    embeddings = []

    def catch(module, args, kwargs):
        embeddings.append(kwargs["inputs_embeds"])
        raise Caught

    hook = adapter_for(model)(model).decoder.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        answer_logits(model, batch)
    except Caught:
        pass
    finally:
        hook.remove()
    mask = batch.inputs.get("attention_mask")
    real = torch.ones_like(batch.labels, dtype=torch.bool) if mask is None else mask.bool()
    prompt = before_answer(real, batch.labels).to(predictor.table.device)
    return embeddings[0].to(predictor.table), prompt


class Caught(Exception):
    """The embeddings are known. The rest of the forward pass is not needed."""
