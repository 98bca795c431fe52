"""`start="shared"`: learn the whole frontier in one run, then ask for any budget.

    minimise over f   E_{x, B} log KL(pruned || full)
    with              r = R(i; f(x, B)) stretched so that F(r) = B

Every sample of a batch draws a budget of its own. Its schedule is projected onto that budget
(`vispco.schedule.project`), so the constraint holds at every step and needs no multiplier. The
logarithm gives all budgets a say: small ones have a divergence a hundred times that of large ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..budget import Budget
from ..calibration import PreparedBatch, answer_logits, before_answer, during
from ..pruning import Masking
from ..registry import adapter_for
from ..schedule import project, ramp, to_whole_tokens
from ..ste import build_estimator
from ..utils.distributed import gathered, processes, rank, total
from ..utils.journal import Journal, decode_tensor, digest_tensors, encode_tensor
from .evaluator import Evaluator
from .predictor import RatioPredictor
from .problem import Problem, Start
from .steps import batch_order, decay, gradients

#: Added to a divergence before its logarithm is taken: what is near 0 nats is as good as 0.
EPSILON = 1e-2


@dataclass(frozen=True)
class Shared(Start):
    """Options of `start="shared"`: one predictor of the keep ratios for all budgets.

    steps: gradient steps in all, one batch each. Small batches and many steps do better than the
        reverse: 200 batches of 8 questions, say.
    learning_rate: of the predictor's table of thetas. Its network, if it looks at the prompts,
        learns at a twentieth of it.
    between: the least and the largest budget that will be asked for, as shares of the prunable
        cost. None: all that can be reached, up to 0.95.
    conditioned: whether the predictor looks at the prompts, or at the budget alone.
    estimator, checkpoint: see `Gradient`.
    With a free kernel every budget starts at its `vispco.schedule.ramp`.
    Raises ValueError for bad values.
    """

    name: ClassVar[str] = "shared"
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

    def solver(self, problem: Problem, limits: Sequence[Budget], seed: int) -> Learned:
        """A predictor for the problem, which learns when it first runs.

        Raises ValueError for budgets that are no shares of the prunable cost, another objective
        than "kl", or a bad `between`.
        """
        check_shares(problem, limits)
        everything = share_limit(problem, 1.0)
        least = everything.share(everything.least)
        low, high = self.between or (least, 0.95)
        if not least <= low + 1e-9 < high <= 1:
            raise ValueError(
                f"between must be two increasing shares in [{least:.4g}, 1], what "
                f"{problem.method!r} can reach on this model, got {self.between!r}"
            )
        dimensions = problem.adapter.dimensions(problem.adapter.config)
        hidden = dimensions.hidden if self.conditioned else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            predictor = RatioPredictor(problem.kernel, hidden, (low, high))
        inverse = getattr(problem.kernel, "inverse", None)
        if inverse is not None:
            reachable = [max(knot, least + 1e-3) for knot in predictor.knots]
            ramps = [ramp(share_limit(problem, share)) for share in reachable]
            predictor.begin(torch.stack([inverse(ratios) for ratios in ramps]))
        return Learned(problem, predictor, partial(train, self, problem, predictor, seed))


def share_limit(problem: Problem, share: float) -> Budget:
    """The limit of a share of the prunable FLOPs."""
    prompts = problem.n_visual, problem.n_text
    return Budget(share, problem.costs["flops"], *prompts, problem.first_layer)


def check_shares(problem: Problem, limits: Sequence[Budget]) -> None:
    """Raise ValueError unless every budget is a share of the prunable FLOPs, the objective "kl"."""
    options = problem.options
    if options.objective != "kl" or options.relative_to != "prunable":
        raise ValueError(
            "start='shared' minimises the divergence over shares of the prunable cost: leave "
            "objective 'kl' and relative_to 'prunable', got "
            f"{options.objective!r} and {options.relative_to!r}"
        )
    for limit in limits:
        value = limit.value
        if not isinstance(value, int | float) or value > 1:
            raise ValueError(
                f"start='shared' takes budgets that are shares such as 0.5, got {value!r}"
            )


class Learned:
    """What a shared search learns: a schedule for any budget. It can start further searches.

    predictor: the network. train: called when it first runs, with the journal; it fits the
        predictor and returns the forward passes that this took.
    """

    name = "learned"
    any_budget = True
    largest_first = checkpoint = False
    guidance: ClassVar[dict] = {}

    def __init__(self, problem: Problem, predictor: RatioPredictor, train: partial[int]):
        self.problem, self.predictor, self.train = problem, predictor, train
        self.passes: int | None = None

    def arguments(self) -> dict[str, Any]:
        """What decides the result, for journal and frontier."""
        if self.passes is None:
            options = asdict(self.train.args[0])
            return {**options, "between": list(self.predictor.between)}
        return {"predictor": digest_tensors(*self.predictor.parameters())}

    def solver(self, problem: Problem, limits: Sequence[Budget], seed: int) -> Learned:
        """This start itself. Raises ValueError for budgets that are no shares."""
        check_shares(problem, limits)
        return self

    def run(
        self, evaluators: Sequence[Evaluator], limits: Sequence[Budget], journal: Journal
    ) -> int:
        """Learn, the first time; then measure the predicted schedule of every limit.

        Returns the forward passes that learning took.
        """
        if self.passes is None:
            self.passes = self.train(journal)
        for limit, evaluator in zip(limits, evaluators, strict=True):
            evaluator.losses([tuple(limit.harden(self.ratios(limit.value)))])
        return self.passes

    @torch.no_grad()
    def ratios(self, budget: float) -> Tensor:
        """The schedule (L,) for a share of the prunable cost, not yet in whole tokens.

        A predictor that looks at prompts gives the mean over the calibration data.
        """
        problem = self.problem
        prepared = problem.prepared if self.predictor.conditioned else problem.prepared[:1]
        schedules = []
        for batch in prepared:
            budgets = torch.full((len(batch),), float(budget))
            theta = self.predictor(budgets, *features(problem.model, batch, self.predictor))
            schedules.append(problem.kernel.schedule(theta))
        return gathered(torch.cat(schedules).double()).mean(0)


def train(
    options: Shared, problem: Problem, predictor: RatioPredictor, seed: int, journal: Journal
) -> int:
    """Fit a predictor; returns the forward passes, a backward pass counting two."""
    steps, rate = options.steps, options.learning_rate
    parameters = list(predictor.parameters())
    table, *network = parameters
    groups = [{"params": [table], "lr": rate}, {"params": network, "lr": rate / 20}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay(step, steps))
    generator = torch.Generator().manual_seed(seed)
    order = batch_order(len(problem.prepared), generator)
    everything = torch.ones(1, requires_grad=True)
    pruner = Masking(problem.adapter, problem.scorer, everything, options.estimator)
    seen = 0
    with pruner.install():
        for step in range(steps):
            number = next(order)
            batch = problem.prepared[number]
            samples = total(len(batch))
            budgets = draw_budgets(samples, predictor.between, generator)
            asked = {"step": step, "batch": number, "budgets": digest_tensors(budgets)}
            asked["predictor"] = digest_tensors(*parameters)
            make = partial(_step, problem, predictor, pruner, batch, budgets, step)
            found = journal.recall(asked, make)
            for parameter, gradient in zip(parameters, found["gradients"], strict=True):
                parameter.grad = decode_tensor(gradient, parameter)
            optimizer.step()
            schedule.step()
            seen += samples
            if problem.callback:
                losses = {"loss": found["loss"], "log": found["log"]}
                problem.callback({"step": step, "steps": steps, **losses})
    predictor.eval()
    return 3 * seen


def draw_budgets(samples: int, between: tuple[float, float], generator: torch.Generator) -> Tensor:
    """One budget (samples,) for each sample of all processes, stratified over the range."""
    low, high = between
    places = torch.rand(samples, generator=generator)
    places += torch.randperm(samples, generator=generator)
    return low + (high - low) * places / samples


def _step(problem: Problem, predictor, pruner, batch, budgets: Tensor, step: int) -> dict:
    """All that a step costs: the mean divergence, the loss, and the gradients."""
    cost = problem.costs["flops"]
    own = budgets[rank() :: processes()]
    theta = predictor(own, *features(problem.model, batch, predictor))
    text = cost.text_only(batch.n_text).double()
    full = cost.full(batch.n_visual, batch.n_text).double()
    limit = text + own * (full - text)
    ratios = problem.kernel.schedule(theta)
    ratios = project(ratios, cost, batch.n_visual, batch.n_text, limit)
    ratios = to_whole_tokens(ratios, problem.tokens)
    with during(f"step {step}"):
        divergence = mean_divergence(pruner, batch, ratios, step)
        loss = (divergence + EPSILON).log().sum() / total(len(divergence))
        found = gradients(loss, list(predictor.parameters()))
    return {
        "loss": float(gathered(divergence.detach()).mean()),
        "log": float(total(loss.detach())),
        "gradients": [encode_tensor(gradient) for gradient in found],
    }


def mean_divergence(pruner: Masking, batch: PreparedBatch, ratios: Tensor, seed: int) -> Tensor:
    """Mean KL(pruned || full) (samples,) of each sample with an answer, in nats.

    Differentiable in the ratios (B, L).
    """
    losses = pruner.losses(batch, ratios, seed, "kl")  # (A,)
    rows = batch.rows.to(losses.device)
    answers = torch.bincount(rows, minlength=len(batch)).to(losses)
    sums = torch.zeros(len(batch), device=rows.device).index_add(0, rows, losses)
    return (sums / answers.clamp(min=1))[answers > 0]


@torch.no_grad()
def features(
    model: nn.Module, batch: PreparedBatch, predictor: RatioPredictor
) -> tuple[Tensor, Tensor] | tuple[()]:
    """What a predictor that looks at prompts sees; () for one that looks at the budget alone.

    Returns input embeddings (B, S, hidden), and which positions are of the prompt (B, S).
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
