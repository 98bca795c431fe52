"""The surrogate of the search: a Gaussian process and its expected improvement.

The process against the closed form, the improvement against integration.
"""

import math

import torch
from hypothesis import given, strategies as st

from vispco.solvers.surrogate import NOISES, Surrogate, log_loss


def known(count=12, layers=6, seed=0):
    """Schedules (N, L) and their losses, smooth in them."""
    generator = torch.Generator().manual_seed(seed)
    ratios = (
        torch.rand(count, layers, generator=generator, dtype=torch.float64)
        .sort(1, descending=True)
        .values
    )
    return ratios, (ratios - 0.5).square().sum(1)


def test_the_posterior_is_that_of_the_joint_normal_distribution():
    """Mean and variance by conditioning the joint covariance.

    With a matrix inverse, written out pair by pair.
    """
    ratios, losses = known()
    new, _ = known(5, seed=1)
    process = Surrogate(ratios, losses)
    scale = float((process.root @ process.root.T)[0, 0]) - 1
    noise = min(NOISES, key=lambda n: abs(n - scale))

    def covariance(x, y):
        features = [torch.cat([v, v.sqrt()]) / math.sqrt(6) for v in (x, y)]
        d = math.sqrt(3) * float((features[0] - features[1]).norm()) / process.length
        return (1 + d) * math.exp(-d)

    def table(a, b):
        return torch.tensor([[covariance(x, y) for y in b] for x in a], dtype=torch.float64)

    inverse = torch.linalg.inv(table(ratios, ratios) + noise * torch.eye(12, dtype=torch.float64))
    cross, values = table(new, ratios), (losses + 0.01).log()
    mean, deviation = process(new)
    torch.testing.assert_close(mean, values.mean() + cross @ inverse @ (values - values.mean()))
    variance = process.variance * (1 - (cross @ inverse * cross).sum(1))
    torch.testing.assert_close(deviation, variance.sqrt())


def test_length_and_noise_have_the_largest_likelihood_of_the_grid():
    """Against the log density of a multivariate normal.

    It has the variance that is best for each pair.
    """
    from vispco.solvers import surrogate

    ratios, losses = known()
    values = log_loss(losses) - log_loss(losses).mean()
    found = {}
    for length in surrogate.LENGTHS:
        for noise in NOISES:
            points = torch.cat([ratios, ratios.sqrt()], 1) / math.sqrt(6)
            d = math.sqrt(3) * torch.cdist(points, points) / length
            shape = (1 + d) * torch.exp(-d) + noise * torch.eye(12, dtype=torch.float64)
            s2 = values @ torch.linalg.inv(shape) @ values / 12
            normal = torch.distributions.MultivariateNormal(
                torch.zeros(12, dtype=torch.float64), s2 * shape
            )
            found[length, noise] = float(normal.log_prob(values))
    process = Surrogate(ratios, losses)
    noise = float((process.root @ process.root.T)[0, 0]) - 1
    length, best = max(found, key=found.get)
    assert process.length == length and abs(noise - best) < 1e-9


@given(loss=st.floats(0, 3), seed=st.integers(0, 20))
def test_expected_improvement_is_the_integral(loss, seed):
    process = Surrogate(*known())
    new, _ = known(3, seed=seed)
    mean, deviation = process(new)
    x = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    gain = (math.log(loss + 0.01) - (mean[:, None] + deviation[:, None] * x)).clamp(min=0)
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    torch.testing.assert_close(
        process.expected_improvement(new, loss),
        torch.trapezoid(gain * density, x),
        atol=1e-6,
        rtol=1e-4,
    )


def test_it_ranks_schedules_that_it_has_not_seen():
    process, (new, losses) = Surrogate(*known(60)), known(200, seed=5)
    mean, _ = process(new)
    ranks = [v.argsort().argsort().double() for v in (mean, losses)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.9


def test_equal_losses_do_not_break_it():
    ratios, _ = known()
    mean, deviation = Surrogate(ratios, torch.zeros(12))(ratios)
    assert mean.isfinite().all() and deviation.isfinite().all()


def test_a_prior_that_knows_is_trusted_and_one_that_does_not_is_not():
    """What is known beforehand is predicted where nothing was measured; noise is left aside."""
    ratios, losses = known()
    new, truth = known(40, seed=1)

    def exact(ratios):
        return log_loss((ratios - 0.5).square().sum(1)) + 0.7

    def noise(ratios):
        return (1e4 * ratios.sum(1)).sin()

    with_prior, without = Surrogate(ratios, losses, exact), Surrogate(ratios, losses)
    assert with_prior.trust == 1 and Surrogate(ratios, losses, noise).trust < 1
    errors = [(each(new)[0] - log_loss(truth)).abs() for each in (with_prior, without)]
    assert errors[0].max() < 1e-6 < 0.01 < errors[1].mean()
    # A prior of zeros is none.
    zeros = Surrogate(ratios, losses, lambda ratios: torch.zeros(len(ratios)).double())
    torch.testing.assert_close(zeros(new), without(new))
