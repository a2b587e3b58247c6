"""The checks of `selftest`, by group: each compares an estimator with a closed form."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_vae.diagnostics.calibration import calibration
from pyro_vae.diagnostics.evaluation import evaluate
from pyro_vae.diagnostics.gaps import gaps
from pyro_vae.diagnostics.information import kl_parts
from pyro_vae.diagnostics.uncertainty import uncertainty
from pyro_vae.inference.annealing import anneal, sandwich
from pyro_vae.inference.encoding import encode, predict
from pyro_vae.inference.generation import reconstruct, sample
from pyro_vae.inference.importance import log_likelihood
from pyro_vae.inference.nuts import Posterior, nuts
from pyro_vae.inference.pareto import pareto_shape
from pyro_vae.models.exact import LinearGaussian, Spoiled, linear_gaussian, ppca_log_likelihood
from pyro_vae.models.vae import VAE
from pyro_vae.pairs.scope import registered, scope
from pyro_vae.parts.bijections import Affine, Spline
from pyro_vae.parts.distributions import LevelLogistic
from pyro_vae.parts.flows import AutoregressiveLayer, CouplingLayer
from pyro_vae.parts.likelihoods import Gaussian
from pyro_vae.parts.priors import FlowPrior
from pyro_vae.training.elbo import EnumeratedELBO
from pyro_vae.training.engine import Engine
from pyro_vae.training.fit import fit
from pyro_vae.training.importance_bounds import ImportanceWeightedELBO
from pyro_vae.training.schedules import CosineSchedule

EXACT = 1e-8
"""Allowed error in float64 of an estimate without Monte Carlo error."""


class Check(NamedTuple):
    """An estimate and the true value."""

    name: str
    estimate: float
    """The estimate; its mean if there are many values."""
    truth: float
    """The true value; its mean if there are many values."""
    error: float
    """The largest error over data and coordinates, relative to its tolerance."""
    tolerance: float
    """The allowed error: rounding, or five standard errors."""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; false for NaN."""
        return self.error <= self.tolerance


def check_of(name: str, estimate: Any, truth: Any, tolerance: Any) -> Check:
    """Check numbers, or tensors by the error that is largest relative to its tolerance."""
    estimate, truth, tolerance = (
        torch.as_tensor(part, dtype=torch.float64).detach() for part in (estimate, truth, tolerance)
    )
    errors = (estimate - truth).abs()
    worst = (errors / tolerance).nan_to_num(torch.inf).flatten().argmax()
    error, allowed = (part.expand(errors.shape).flatten()[worst] for part in (errors, tolerance))
    return Check(name, estimate.mean().item(), truth.mean().item(), error.item(), allowed.item())


def _exact(spread: float = 1.0, n: int = 50) -> tuple[LinearGaussian, Tensor, Tensor]:
    """Return the linear-Gaussian pair, data drawn from it, and their log p(x)."""
    pair = linear_gaussian(spread=spread)
    x = pair.marginal().sample((n,)).detach()
    return pair, x, pair.marginal().log_prob(x).detach()


def bounds_checks() -> Iterator[Check]:
    pair, x, log_p = _exact()
    result = evaluate(pair, x, num_samples=1)
    yield check_of("ELBO, exact guide", result.elbo, log_p.mean(), EXACT)
    for k in (1, 20):
        bound = -ImportanceWeightedELBO(k).loss(pair.model, pair.guide, x) / len(x)
        yield check_of(f"importance-weighted bound, K = {k}", bound, log_p.mean(), EXACT)
    pair, x, log_p = _exact(spread=1.3)
    estimate = log_likelihood(pair, x, num_samples=2000)
    kl = 0.5 * 2 * (1.3**2 - 1) - 2 * torch.tensor(1.3).log()
    errors = 5 * estimate.elbo_standard_errors
    yield check_of("ELBO, guide 1.3 times as wide", estimate.elbo_per_datum, log_p - kl, errors)


def gradients_checks() -> Iterator[Check]:
    """Check gradients: with the exact guide the ELBO is log p(x), for all parameters and draws."""
    for name, words in (("eager", "stock Pyro"), ("traced", "traced")):
        pair, x, _ = _exact()
        (truth,) = torch.autograd.grad(pair.marginal().log_prob(x).sum(), pair.weight)
        engine = Engine(pair, Trace_ELBO(), name)
        with scope(pair):
            engine.loss_and_grads(registered(pair, pair.model), pair.guide, x)
        if engine.engine != name or pair.weight.grad is None:
            raise RuntimeError(f"the {name} engine gave no gradient")
        yield check_of(f"gradient of the ELBO, {words}", -pair.weight.grad, truth, 1e-7)


def log_likelihoods_checks() -> Iterator[Check]:
    pair, x, log_p = _exact()
    found = log_likelihood(pair, x, num_samples=5000)
    yield check_of("log p(x), exact guide", found.per_datum, log_p, 1e-4)
    yield check_of("Pareto k, exact guide", found.pareto_k, 0.0, 0.1)
    for spread in (0.8, 1.3):
        pair, x, log_p = _exact(spread)
        found = log_likelihood(pair, x, num_samples=5000)
        words = f"log p(x), guide {spread} times as wide"
        yield check_of(words, found.per_datum, log_p, 5 * found.standard_errors)
    uniform = torch.arange(0.5, 5000, dtype=torch.float64) / 5000
    for k in (0.3, 0.7):
        yield check_of(
            f"Pareto k of weights of shape {k}", pareto_shape(-k * uniform.log()[None]), k, 0.1
        )


def information_checks() -> Iterator[Check]:
    pair, x, _ = _exact(n=2000)
    found = kl_parts(pair, x)["z"]
    mean, covariance = pair.posterior(x)
    posterior = dist.MultivariateNormal(mean, covariance)
    prior = dist.MultivariateNormal(torch.zeros_like(mean[0]), torch.eye(2).to(mean))
    kl = torch.distributions.kl_divergence(posterior, prior).mean()
    yield check_of("KL of the guide", found.kl.value, kl, 5 * found.kl.standard_error)
    low, high = found.mutual_information, found.mutual_information_upper
    middle, half = (high.value + low.value) / 2, (high.value - low.value) / 2
    errors = 5 * max(low.standard_error, high.standard_error)
    yield check_of("mutual information", middle, pair.information(), half + errors)


def annealing_checks() -> Iterator[Check]:
    pair, x, log_p = _exact(spread=1.3, n=10)
    found = anneal(pair, x, num_temperatures=100, num_chains=8, progress=False)
    yield check_of("annealing, a lower bound", found.value, log_p.mean(), 5 * found.standard_error)
    both = sandwich(pair, num_examples=10, num_temperatures=100, num_chains=8, progress=False)
    truth = pair.marginal().log_prob(both.batch[0]).mean()
    slack = 5 * both.upper.standard_error
    yield check_of("reverse annealing, an upper bound", both.upper.value, truth, slack)


def nuts_checks() -> Iterator[Check]:
    pair, x, _ = _exact(n=1)
    found = nuts(pair, x, num_draws=200, warmup=100, num_chains=2, progress=False)
    assert isinstance(found, Posterior)
    mean, covariance = pair.posterior(x)
    scale = covariance.diagonal().sqrt().expand_as(mean)
    moments = found.moments
    yield check_of("NUTS, means", moments.mean, mean, 5 * found.mean_standard_error)
    slack = 5 * scale / (2 * found.effective_sample_size).sqrt()
    yield check_of("NUTS, scales", moments.standard_deviation, scale, slack)
    yield check_of("NUTS, R-hat", found.r_hat, 1.0, 0.05)


def calibration_checks() -> Iterator[Check]:
    for spread, words in ((1.0, "exact guide"), (0.8, "guide 0.8 times as wide")):
        pair, _, _ = _exact(spread)
        found = calibration(pair, num_simulations=1000, num_draws=39, progress=False)
        # In posterior standard deviations, the interval has half-width spread * quantile.
        normal = dist.Normal(0.0, 1.0)
        half = spread * normal.icdf(torch.tensor(0.95))
        truth = 2 * normal.cdf(half) - 1
        slack = 5 * (truth * (1 - truth) / 1000).sqrt() + 0.01
        yield check_of(f"coverage of 90 %, {words}", found.coverage[:2, 2], truth, slack)
        rejected = float(len(found.failures) > 0)
        yield check_of(f"rejected, {words}", rejected, float(spread != 1), EXACT)


def gaps_checks() -> Iterator[Check]:
    pair = Spoiled("diagonal", shift=0.6, stretch=1.4, weight=_MILD)
    x = pair.marginal().sample((40,)).detach()
    best = Spoiled("diagonal", weight=_MILD)
    least = best.kl(x, best.q(x))
    found = gaps(pair, x, steps=150, num_samples=2000, progress=False)
    yield check_of("approximation gap", found.approximation.value, least.mean(), 0.02)
    put_in = (pair.kl(x, pair.q(x)) - least).mean()
    slack = 0.02 + 5 * found.amortization.standard_error
    yield check_of("amortization gap", found.amortization.value, put_in, slack)
    elbo = (pair.marginal().log_prob(x) - least).mean()
    slack = 0.01 + 5 * found.refined.standard_error
    yield check_of("ELBO of the refined guide", found.refined.value, elbo, slack)


_MILD = torch.tensor([[1.0, 0.2], [0.8, 1.1], [0.1, 1.0], [0.2, -0.3]]).double()


class _Categories(nn.Module):
    """A discrete latent, with its exact posterior in the guide or only in the model."""

    prior: Tensor
    centers: Tensor

    def __init__(self, in_guide: bool) -> None:
        super().__init__()
        self.in_guide = in_guide
        self.register_buffer("prior", torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64))
        self.register_buffer("centers", torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64))

    def joint(self, x: Tensor) -> Tensor:
        """Return log p(x, k), of shape (n, 3)."""
        return dist.Normal(self.centers, 0.8).log_prob(x[:, None]) + self.prior.log()

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            fn = dist.Categorical(self.prior)
            k = pyro.sample("k", fn, infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(self.centers[k], 0.8), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            if self.in_guide:
                fn = dist.Categorical(logits=self.joint(x))
                pyro.sample("k", fn, infer={"enumerate": "parallel"})


def enumeration_checks() -> Iterator[Check]:
    x = torch.linspace(-2, 3, 20, dtype=torch.float64)
    for in_guide in (True, False):
        pair = _Categories(in_guide)
        joint, where = pair.joint(x), "the guide" if in_guide else "the model"
        log_p = joint.logsumexp(1)
        found = log_likelihood(pair, x, num_samples=1)
        yield check_of(f"log p(x), a class summed out in {where}", found.per_datum, log_p, EXACT)
        objective: Any = EnumeratedELBO()
        bound = -objective.loss(pair.model, pair.guide, x) / len(x)
        yield check_of(f"ELBO, a class summed out in {where}", bound, log_p.mean(), EXACT)
        posterior = joint.softmax(1)
        yield check_of(f"posterior of that class, {where}", predict(pair, x), posterior, EXACT)


class _SharedMean(nn.Module):
    """A global mean w with a given posterior, and a local latent."""

    spread: Tensor

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.register_buffer("spread", torch.tensor(spread, dtype=torch.float64))

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(w + z, 0.5), obs=x)

    def guide(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_ones(()), self.spread))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal((x - w) / 1.25, 0.2**0.5))


def shared_checks() -> Iterator[Check]:
    """Check global latents: E[x' | w] is w + (x - w) / 1.25, a fifth of w's deviation."""
    pair, x = _SharedMean(2.0), torch.linspace(-2, 3, 20, dtype=torch.float64)
    found = uncertainty(pair, x, num_weights=1000, num_samples=20, progress=False)
    # The relative error of a variance of so many draws is sqrt(2 / 999).
    yield check_of("variance from global latents", found.weights, 0.16, 5 * 0.16 * 0.045)
    yield check_of("variance from local latents", found.latent, 0.2, 0.02)
    yield check_of("variance from noise", found.noise, 0.25, EXACT)
    density = log_likelihood(pair, x, num_samples=20_000)
    truth = dist.Normal(1.0, (4 + 1.25) ** 0.5).log_prob(x)
    yield check_of("predictive density", density.per_datum, truth, 5 * density.standard_errors)


def use_checks() -> Iterator[Check]:
    pair, x, _ = _exact()
    mean, covariance = pair.posterior(x)
    yield check_of("encode, means", encode(pair, x)["z"], mean, EXACT)
    scale = covariance.diagonal().sqrt().expand_as(mean)
    yield check_of("encode, scales", encode(pair, x, what="scale")["z"], scale, EXACT)
    again = mean @ pair.weight.T + pair.bias
    yield check_of("reconstruct, means", reconstruct(pair, x), again, EXACT)
    n = 20_000
    drawn, marginal = sample(pair, n, seed=0), pair.marginal()
    sd = marginal.variance.sqrt()
    yield check_of("sample, means", drawn.mean(0), marginal.mean, 5 * sd / n**0.5)
    # For a product of normals, var(ab) = var(a) var(b) + cov(a, b)^2.
    truth = marginal.covariance_matrix
    errors = 5 * ((sd[:, None] * sd).square() + truth.square()).sqrt() / n**0.5
    yield check_of("sample, covariances", drawn.T.cov(), truth, errors)


def fit_checks() -> Iterator[Check]:
    x = linear_gaussian(data_dim=5).marginal().sample((500,)).detach()
    vae = VAE.mlp((5,), latent_dim=2, hidden=(), likelihood=Gaussian(1.0, learned=True)).double()
    fit(
        vae,
        x,
        epochs=60,
        batch_size=125,
        learning_rate=5e-2,
        learning_rate_schedule=CosineSchedule(60),
        progress=False,
    )
    found = log_likelihood(vae, x, num_samples=500).value
    yield check_of("fit, log p(x) of probabilistic PCA", found, ppca_log_likelihood(x, 2), 0.03)


def densities_checks() -> Iterator[Check]:
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid, cell = torch.cartesian_prod(axis, axis), (axis[1] - axis[0]) ** 2
    for layer, bijection in ((CouplingLayer, Spline(4)), (AutoregressiveLayer, Affine())):
        prior = FlowPrior(2, layer, bijection, layers=2, hidden=(8,)).double()
        for parameter in prior.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        with torch.no_grad():
            total = prior().log_prob(grid).exp().sum() * cell
        kinds = f"{layer.__name__}, {type(bijection).__name__}"
        yield check_of(f"integral of a flow, {kinds}", total, 1.0, 3e-3)
    loc, scale = torch.rand(2, 30, dtype=torch.float64)
    levels = torch.arange(256, dtype=torch.float64)[:, None] / 255
    total = LevelLogistic(loc, scale + 0.05, 256).log_prob(levels).exp().sum(0)
    yield check_of("sum of a discretized logistic", total, 1.0, 1e-6)
