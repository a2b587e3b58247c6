"""Idioms with continuous local latents: encoders, supports, masks, factors, deterministic sites."""

import pyro
import pyro.distributions as dist
import torch
from idiom import UNREFINED, Batch, Idiom, Refusal, integral, rows
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor, nn
from torch.nn.functional import softplus

LINE = torch.linspace(-6, 6, 61, dtype=torch.float64)
STEP = 0.2


def plane() -> Tensor:
    """Points of a square grid, of shape (points, 2); each has an area of ``STEP`` squared."""
    return torch.cartesian_prod(LINE, LINE).to(torch.get_default_dtype())


class Vae(nn.Module):
    """The VAE of Pyro's first tutorial, on three pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)

    def observation(self, z: Tensor) -> dist.Distribution:
        return dist.Bernoulli(logits=self.decoder(z)).to_event(1)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", self.observation(z), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        loc, raw = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, softplus(raw + 1)).to_event(1))

    def template(self, n: int) -> Batch:
        return (torch.zeros(n, 3),)

    def log_p(self, x: Tensor) -> Tensor:
        z = plane()
        prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        return integral(prior[:, None] + self.observation(z[:, None]).log_prob(x), STEP**2)


class Topics(Vae):
    """ProdLDA: topics of a document are a softmax of normals, and words are counts."""

    def observation(self, z: Tensor, words: Tensor | None = None) -> dist.Distribution:
        topics = torch.cat([z, z[..., :1] * 0], -1).softmax(-1)
        return topics @ self.topics.softmax(-1)

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.topics = nn.Linear(5, 4), nn.Parameter(torch.randn(3, 5))

    def model(self, x: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            longest = int(x.sum(-1).max())
            pyro.sample("x", dist.Multinomial(longest, self.observation(z)), obs=x)

    def guide(self, x: Tensor) -> None:
        loc, raw = self.encoder(x / 5).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, softplus(raw + 1)).to_event(1))

    def template(self, n: int) -> Batch:
        return (torch.ones(n, 5),)

    def log_p(self, x: Tensor) -> Tensor:
        z = plane()
        prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        orders = (x.sum(-1) + 1).lgamma() - (x + 1).lgamma().sum(-1)
        words = self.observation(z).log() @ x.mT
        return integral(prior[:, None] + words, STEP**2) + orders


class Conditional(nn.Module):
    """A conditional VAE whose data have missing entries, which a mask hides."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(7, 2), nn.Linear(2, 3)

    def observation(self, z: Tensor, c: Tensor) -> dist.Distribution:
        wide = c.expand(*z.shape, 1)
        return dist.Normal(self.decoder(torch.cat([z[..., None], wide], -1)), 0.8)

    def model(self, x: Tensor, c: Tensor, seen: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", self.observation(z, c).mask(seen).to_event(1), obs=x)

    def guide(self, x: Tensor, c: Tensor, seen: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        filled = torch.where(seen, x, 0.0)
        loc, raw = self.encoder(torch.cat([filled, seen.to(x), c], -1)).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, softplus(raw + 1)))

    def template(self, n: int) -> Batch:
        return torch.zeros(n, 3), torch.zeros(n, 1), torch.ones(n, 3, dtype=torch.bool)

    def log_p(self, x: Tensor, c: Tensor, seen: Tensor) -> Tensor:
        z = LINE.to(x)
        each = self.observation(z[:, None].expand(-1, len(x)), c).log_prob(x)
        prior = dist.Normal(0.0, 1.0).log_prob(z)
        return integral(prior[:, None] + torch.where(seen, each, 0.0).sum(-1), STEP)


class Imputing(Conditional):
    """The same with ``obs_mask``: Pyro makes a latent of the missing entries."""

    def model(self, x: Tensor, c: Tensor, seen: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            fn, row = self.observation(z, c).to_event(1), seen.all(-1)
            pyro.sample("x", fn, obs=x, obs_mask=row)

    def guide(self, x: Tensor, c: Tensor, seen: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        row = seen.all(-1)
        filled = torch.where(row[:, None], x, 0.0)
        loc, raw = self.encoder(torch.cat([filled, seen.to(x) * 0, c], -1)).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, softplus(raw + 1)))
            with pyro.poutine.mask(mask=~row):
                pyro.sample("x_unobserved", dist.Normal(x.new_zeros(3), 1.5).to_event(1))

    def log_p(self, x: Tensor, c: Tensor, seen: Tensor) -> Tensor:
        every = super().log_p(x, c, torch.ones_like(seen))
        return torch.where(seen.all(-1), every, 0.0)


class Supported(nn.Module):
    """A local latent with a support of its own; x is normal around a linear map of it."""

    width = 1

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 3), nn.Linear(self.width, 3)

    def prior(self) -> dist.Distribution:
        raise NotImplementedError

    def posterior(self, numbers: Tensor) -> dist.Distribution:
        raise NotImplementedError

    def points(self) -> tuple[Tensor, float]:
        """Values of the latent on a grid, and the volume of each."""
        raise NotImplementedError

    def features(self, z: Tensor) -> Tensor:
        return z[..., None]

    def observation(self, z: Tensor) -> dist.Distribution:
        return dist.Normal(self.decoder(self.features(z)), 1.0).to_event(1)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.observation(pyro.sample("z", self.prior())), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(0.3 * self.encoder(x)))

    def template(self, n: int) -> Batch:
        return (torch.zeros(n, 3),)

    def log_p(self, x: Tensor) -> Tensor:
        z, volume = self.points()
        prior = self.prior().log_prob(z)
        each = self.observation(z[:, None]).log_prob(x)
        return integral(prior[:, None] + each, volume)


class LogNormal(Supported):
    def prior(self) -> dist.Distribution:
        return dist.LogNormal(0.0, 0.5)

    def posterior(self, numbers: Tensor) -> dist.Distribution:
        return dist.LogNormal(numbers[..., 0], softplus(numbers[..., 1]))

    def points(self) -> tuple[Tensor, float]:
        return torch.linspace(0.001, 12, 6001), 0.002


class Gamma(LogNormal):
    def prior(self) -> dist.Distribution:
        return dist.Gamma(2.0, 2.0)

    def posterior(self, numbers: Tensor) -> dist.Distribution:
        return dist.Gamma(2 * numbers[..., 0].exp(), 2 * numbers[..., 1].exp())


class Beta(Supported):
    def prior(self) -> dist.Distribution:
        return dist.Beta(2.0, 3.0)

    def posterior(self, numbers: Tensor) -> dist.Distribution:
        return dist.Beta(2 * numbers[..., 0].exp(), 3 * numbers[..., 1].exp())

    def points(self) -> tuple[Tensor, float]:
        return (torch.arange(1000) + 0.5) / 1000, 1 / 1000


class VonMises(Supported):
    width = 2

    def prior(self) -> dist.Distribution:
        return dist.VonMises(0.0, 3.0)

    def posterior(self, numbers: Tensor) -> dist.Distribution:
        return dist.VonMises(numbers[..., 0], 3 * numbers[..., 1].exp())

    def points(self) -> tuple[Tensor, float]:
        return torch.linspace(-torch.pi, torch.pi, 401)[:-1], 2 * torch.pi / 400

    def features(self, z: Tensor) -> Tensor:
        return torch.stack([z.cos(), z.sin()], -1)


class Simplex(Supported):
    width = 3

    def prior(self) -> dist.Distribution:
        return dist.Dirichlet(torch.full((3,), 2.0))

    def posterior(self, numbers: Tensor) -> dist.Distribution:
        return dist.Dirichlet(2 * numbers.exp())

    def points(self) -> tuple[Tensor, float]:
        ticks = (torch.arange(120) + 0.5) / 120
        free = torch.cartesian_prod(ticks, ticks)
        free = free[free.sum(-1) < 1 - 1e-4]
        return torch.cat([free, 1 - free.sum(-1, keepdim=True)], -1), 1 / 120**2

    def features(self, z: Tensor) -> Tensor:
        return z


class Real(Supported):
    """A normal latent, for the idioms below."""

    def prior(self) -> dist.Distribution:
        return dist.Normal(0.0, 1.0)

    def posterior(self, numbers: Tensor) -> dist.Distribution:
        return dist.Normal(numbers[..., 0], softplus(numbers[..., 1] + 0.5))

    def points(self) -> tuple[Tensor, float]:
        return LINE.to(torch.get_default_dtype()), STEP


class Deterministic(Real):
    """The mean of x is a ``pyro.deterministic`` site, as in many tutorials."""

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            loc = pyro.deterministic("loc", self.decoder(self.features(z)), event_dim=1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


class Energy(Real):
    """A ``pyro.factor`` of the model multiplies p(x, z)."""

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.factor("energy", -0.5 * z.square())
            pyro.sample("x", self.observation(z), obs=x)

    def log_p(self, x: Tensor) -> Tensor:
        z, volume = self.points()
        terms = self.prior().log_prob(z) - 0.5 * z.square()
        return integral(terms[:, None] + self.observation(z[:, None]).log_prob(x), volume)


class Penalty(Real):
    """A ``pyro.factor`` of the guide is a term of the loss, as in the scANVI tutorial."""

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        numbers = 0.3 * self.encoder(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(numbers))
            pyro.factor("penalty", -numbers[..., 0].square(), has_rsample=False)


class Noncentered(Real):
    """``poutine.reparam`` replaces z by a standardized latent, and z becomes deterministic."""

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            with pyro.poutine.reparam(config={"z": LocScaleReparam(0.0)}):
                z = pyro.sample("z", dist.Normal(0.5, 0.7))
            pyro.sample("x", self.observation(z), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z_decentered", self.posterior(0.3 * self.encoder(x)))

    def prior(self) -> dist.Distribution:
        return dist.Normal(0.5, 0.7)


class Tabled(Real):
    """Parameters of the guide with a row for each datum, indexed by row numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(24, 3)

    def model(self, x: Tensor, numbers: Tensor) -> None:
        super().model(x)

    def guide(self, x: Tensor, numbers: Tensor) -> None:
        super().guide(numbers)

    def template(self, n: int) -> Batch:
        return torch.zeros(n, 3), torch.zeros(n, dtype=torch.long)

    def log_p(self, x: Tensor, numbers: Tensor) -> Tensor:
        return super().log_p(x)


class Sizeless(Real):
    """``pyro.plate("data")`` without a size, which Pyro takes from the distributions."""

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", dim=-1):
            z = pyro.sample("z", self.prior().expand(x.shape[:1]))
            pyro.sample("x", self.observation(z), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", dim=-1):
            pyro.sample("z", self.posterior(0.3 * self.encoder(x)))


class Declared(Real):
    """A positive parameter that ``pyro.param`` declares at each call."""

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        width = pyro.param("width", x.new_tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.decoder(z[..., None]), width).to_event(1), obs=x)

    def log_p(self, x: Tensor) -> Tensor:
        z, volume = self.points()
        width = dict(self.named_parameters())["pyro_param.width"].exp()
        each = dist.Normal(self.decoder(z[:, None, None]), width).log_prob(x).sum(-1)
        return integral(self.prior().log_prob(z)[:, None] + each, volume)


class Amortized(EasyGuide):
    """An ``EasyGuide`` of a local latent, whose auxiliary site reads x."""

    def __init__(self, model: object, encoder: nn.Module) -> None:
        super().__init__(model)
        self.encoder = encoder

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        loc, raw = (0.3 * self.encoder(x)).unbind(-1)
        with self.plate("data", len(x), dim=-1):
            self.group(match="z").sample(
                "z_aux", dist.Normal(loc[:, None], softplus(raw + 0.5)[:, None]).to_event(1)
            )


class Easy(nn.Module):
    """A pair whose guide is an ``EasyGuide``."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(1, 3)
        self.guide = Amortized(self.model, nn.Linear(3, 2))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(self.decoder(z[..., None]), 1.0).to_event(1), obs=x)

    def template(self, n: int) -> Batch:
        return (torch.zeros(n, 3),)

    def log_p(self, x: Tensor) -> Tensor:
        z = LINE.to(x)
        each = dist.Normal(self.decoder(z[:, None, None]), 1.0).log_prob(x).sum(-1)
        return integral(dist.Normal(0.0, 1.0).log_prob(z)[:, None] + each, STEP)


def binary() -> Batch:
    return ((rows(24, 3) > 0).to(torch.get_default_dtype()),)


def real() -> Batch:
    return (rows(24, 3),)


def masked() -> Batch:
    seen = rows(24, 3, seed=2) > -0.8
    return rows(24, 3), rows(24, 1, seed=3), seen


def counts() -> Batch:
    generator = torch.Generator().manual_seed(4)
    return (torch.randint(0, 4, (24, 5), generator=generator).to(torch.get_default_dtype()),)


UNNORMALIZED = Refusal("so its density is not normalized", "the density is not normalized")

IDIOMS = [
    Idiom("VAE", Vae, binary),
    Idiom("Conditional VAE with masked entries", Conditional, masked),
    Idiom("`obs_mask` of rows", Imputing, masked),
    Idiom("ProdLDA: a softmax of normals, and counts of words", Topics, counts),
    Idiom("Log-normal latent", LogNormal, real),
    Idiom("Gamma latent", Gamma, real),
    Idiom("Beta latent", Beta, real),
    Idiom(
        "Von Mises latent",
        VonMises,
        real,
        refuses={"refine": UNREFINED, "gaps": UNREFINED},
    ),
    Idiom("Latent on the simplex (`Dirichlet`)", Simplex, real),
    Idiom("`pyro.deterministic`", Deterministic, real),
    Idiom(
        "`pyro.factor` in the model",
        Energy,
        real,
        needs="you read log p(x) as the logarithm of an integral: the density is not normalized",
        refuses={"sample": UNNORMALIZED, "calibration": UNNORMALIZED},
    ),
    Idiom("`pyro.factor` in the guide", Penalty, real),
    Idiom("`poutine.reparam` of a local latent", Noncentered, real),
    Idiom(
        "Guide parameters with a row for each datum",
        Tabled,
        lambda: (rows(24, 3), torch.arange(24)),
        needs="row numbers are part of the batch and index the parameters",
    ),
    Idiom('`pyro.plate("data")` without a size', Sizeless, real),
    Idiom("`pyro.param` in model or guide", Declared, real),
    Idiom("`EasyGuide` of a local latent", Easy, real),
]
