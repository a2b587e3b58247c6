"""A linear-Gaussian pair with p(x) and p(z | x) in closed form.

    z ~ N(0, I),  x | z ~ N(W z + b, s^2 I)
    x ~ N(b, W W' + s^2 I)
    z | x ~ N(M^-1 W' (x - b), s^2 M^-1),  M = W' W + s^2 I

If W, b and s are parameters, this is probabilistic PCA (Tipping & Bishop, 1999).
"""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


class LinearGaussian(nn.Module):
    """The linear-Gaussian pair; its guide is the exact posterior with scaled standard deviations.

    Arguments:
        weight: W, of shape (data_dim, latent_dim). W and b are parameters in float64.
        noise: s, the standard deviation of the noise.
        spread: the factor of the guide's standard deviations; 1 gives the exact posterior.

    >>> pair = linear_gaussian()
    >>> pair.marginal().sample((3,)).shape
    torch.Size([3, 6])
    """

    def __init__(self, weight: Tensor, noise: float, spread: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.double())
        self.bias = nn.Parameter(torch.zeros(len(weight), dtype=torch.float64))
        self.noise, self.spread = noise, spread

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean (n, d) and the covariance (d, d) of z given x."""
        identity = torch.eye(self.weight.shape[1], dtype=torch.float64)
        m = self.weight.T @ self.weight + self.noise**2 * identity
        covariance = self.noise**2 * torch.linalg.inv(m)
        return (x - self.bias) @ self.weight @ torch.linalg.inv(m), covariance

    def marginal(self) -> torch.distributions.MultivariateNormal:
        """The exact p(x)."""
        identity = torch.eye(len(self.weight), dtype=torch.float64)
        covariance = self.weight @ self.weight.T + self.noise**2 * identity
        return torch.distributions.MultivariateNormal(self.bias, covariance)

    def information(self) -> float:
        """The mutual information I(x; z) of the model in nats, log det(I + W' W / s^2) / 2."""
        identity = torch.eye(self.weight.shape[1], dtype=torch.float64)
        return 0.5 * torch.logdet(identity + self.weight.T @ self.weight / self.noise**2).item()

    def model(self, x: Tensor) -> None:
        d = self.weight.shape[1]
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(d, dtype=x.dtype), 1.0).to_event(1))
            loc = z @ self.weight.T + self.bias
            pyro.sample("x", dist.Normal(loc, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, covariance = self.posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, self.spread**2 * covariance))

    def template(self, n: int) -> tuple[Tensor, ...]:
        return (torch.zeros(n, len(self.weight), dtype=torch.float64),)


def linear_gaussian(data_dim: int = 6, latent_dim: int = 2, spread: float = 1.0) -> LinearGaussian:
    """A linear-Gaussian pair with a fixed random W of this size."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(data_dim, latent_dim, generator=generator, dtype=torch.float64)
    return LinearGaussian(weight, noise=0.5, spread=spread)


CORRELATED = torch.tensor([[1.0, 0.9], [0.8, 1.1], [1.2, 1.0], [0.2, -0.3]]).double()


class Spoiled(LinearGaussian):
    """The linear-Gaussian pair with a guide that differs from the best one by a known amount.

    Arguments:
        family: the family of the guide, "diagonal", "low-rank" or another name for full rank.
        shift: the size of the error of the guide's means, which varies between data.
        stretch: the factor of the guide's standard deviations.
        weight: W, of shape (data_dim, latent_dim).
    """

    def __init__(
        self, family: str, shift: float = 0.0, stretch: float = 1.0, weight: Tensor = CORRELATED
    ) -> None:
        super().__init__(weight, 0.6)
        self.family, self.shift, self.stretch = family, shift, stretch

    def factor(self, x: Tensor) -> Tensor:
        """A factor (d, d) of the covariance of the best normal of the family."""
        _, covariance = self.posterior(x)
        if self.family == "diagonal":
            return torch.linalg.inv(covariance).diagonal().rsqrt().diag()
        return torch.linalg.cholesky(covariance)

    def q(self, x: Tensor) -> dist.MultivariateNormal:
        """The guide as a multivariate normal; the error of its mean varies between data."""
        mean, _ = self.posterior(x)
        off = self.shift * x[:, :1].tanh()
        return dist.MultivariateNormal(mean + off, scale_tril=self.stretch * self.factor(x))

    def guide(self, x: Tensor) -> None:
        q = self.q(x)
        if self.family == "diagonal":
            q = dist.Normal(q.loc, q.scale_tril.diagonal(dim1=-2, dim2=-1)).to_event(1)
        elif self.family == "low-rank":
            # In two dimensions, rank one plus a diagonal represents any covariance exactly.
            (a, b), (_, c) = q.covariance_matrix[0]
            left = (b.abs() * (a / c).sqrt()).sqrt(), -(b.abs() * (c / a).sqrt()).sqrt()
            rest = torch.stack([a - left[0] ** 2, c - left[1] ** 2])
            q = dist.LowRankMultivariateNormal(q.loc, torch.stack(left)[:, None], rest)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", q)

    def kl(self, x: Tensor, q: dist.MultivariateNormal) -> Tensor:
        """The KL from a normal q to the exact posterior, for each datum, in nats."""
        mean, covariance = self.posterior(x)
        exact = dist.MultivariateNormal(mean, covariance)
        return torch.distributions.kl_divergence(q, exact).detach()


def ppca_log_likelihood(x: Tensor, latent_dim: int) -> float:
    """The maximum mean log p(x) of probabilistic PCA on these rows, in nats per example."""
    n, d = x.shape
    centered = x - x.mean(0)
    eigenvalues = torch.linalg.eigvalsh(centered.T @ centered / n).flip(0)
    noise = eigenvalues[latent_dim:].mean()
    log_det = eigenvalues[:latent_dim].log().sum() + (d - latent_dim) * noise.log()
    return -0.5 * float(d * math.log(2 * math.pi) + log_det + d)
