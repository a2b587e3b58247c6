"""Idioms of sequences and visits: Markov models, flows in the guide, plates inside a datum."""

import pyro
import pyro.distributions as dist
import torch
from idiom import STEPS, Batch, Idiom, rows
from pairs_local import LINE, STEP
from pyro.distributions.transforms import affine_autoregressive
from torch import Tensor, nn
from torch.nn.functional import softplus

import pyro_vae as pv


class Dmm(nn.Module):
    """A deep Markov model of ragged sequences, with a recurrent guide; padding is masked."""

    dim, steps = 1, 3

    def __init__(self) -> None:
        super().__init__()
        self.move, self.emit = nn.Linear(self.dim, self.dim), nn.Linear(self.dim, 1)
        self.read, self.code = nn.GRU(1, 4, batch_first=True), nn.Linear(4 + self.dim, 2 * self.dim)

    def transition(self, z: Tensor) -> dist.Distribution:
        return dist.Normal(self.move(z).tanh(), 0.8).to_event(1)

    def emission(self, z: Tensor) -> dist.Distribution:
        return dist.Normal(self.emit(z)[..., 0], 0.7)

    def model(self, x: Tensor, lengths: Tensor) -> None:
        pyro.module("dmm", self)
        with pyro.plate("data", len(x)):
            z = x.new_zeros(self.dim)
            for t in pyro.markov(range(self.steps)):
                with pyro.poutine.mask(mask=lengths > t):
                    z = pyro.sample(f"z{t}", self.transition(z))
                    pyro.sample(f"x{t}", self.emission(z), obs=x[:, t])

    def posterior(self, z: Tensor, hidden: Tensor) -> dist.Distribution:
        shape = torch.broadcast_shapes(z.shape[:-1], hidden.shape[:-1])
        wide = [z.expand(*shape, self.dim), hidden.expand(*shape, 4)]
        loc, raw = (0.5 * self.code(torch.cat(wide, -1))).chunk(2, -1)
        return dist.Normal(loc, softplus(raw + 0.5)).to_event(1)

    def guide(self, x: Tensor, lengths: Tensor) -> None:
        seen = torch.where(torch.arange(self.steps) < lengths[:, None], x, 0.0)
        hidden = self.read(seen.flip(1)[..., None])[0].flip(1)
        with pyro.plate("data", len(x)):
            z = x.new_zeros(self.dim)
            for t in pyro.markov(range(self.steps)):
                with pyro.poutine.mask(mask=lengths > t):
                    z = pyro.sample(f"z{t}", self.posterior(z, hidden[:, t]))

    def template(self, n: int) -> Batch:
        return torch.zeros(n, self.steps), torch.full((n,), self.steps)

    def points(self) -> Tensor:
        return LINE[:, None]

    def log_p(self, x: Tensor, lengths: Tensor) -> Tensor:
        z, area = self.points().to(x), STEP**self.dim
        emit = self.emission(z).log_prob(x[..., None])
        forward = self.transition(x.new_zeros(self.dim)).log_prob(z) + emit[:, 0]
        move = self.transition(z[:, None]).log_prob(z).exp() * area
        for t in range(1, self.steps):
            ahead = (forward.exp() @ move).log() + emit[:, t]
            forward = torch.where((lengths > t)[:, None], ahead, forward)
        return forward.logsumexp(-1) + torch.tensor(area).log()


class Iaf(Dmm):
    """The same with an inverse autoregressive flow in the guide, and codes of two numbers."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.flow = affine_autoregressive(2, hidden_dims=[4])

    def posterior(self, z: Tensor, hidden: Tensor) -> dist.Distribution:
        return dist.TransformedDistribution(super().posterior(z, hidden), [self.flow])

    def points(self) -> Tensor:
        return torch.cartesian_prod(LINE[8:-8], LINE[8:-8])


class Walk(nn.Module):
    """A random walk in ``pyro.markov``, drawn and not enumerated."""

    steps = 3

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def model(self, x: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("data", len(x)):
            z = x.new_zeros(())
            for t in pyro.markov(range(self.steps)):
                z = pyro.sample(f"z{t}", dist.Normal(z, 1.0))
                pyro.sample(f"x{t}", dist.Normal(z, 0.5), obs=x[:, t])

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(self.steps)):
                pyro.sample(f"z{t}", dist.Normal(self.slope * x[:, t], 0.6))

    def template(self, n: int) -> Batch:
        return (torch.zeros(n, self.steps),)

    def log_p(self, x: Tensor) -> Tensor:
        steps = torch.arange(1, self.steps + 1)
        walk = torch.minimum(steps[:, None], steps).to(x) + 0.25 * torch.eye(3, dtype=x.dtype)
        return dist.MultivariateNormal(x.new_zeros(self.steps), walk).log_prob(x)


class Visits(nn.Module):
    """Visits of a patient in a plate inside the datum, at dimension -2; absent ones are masked."""

    number = 3

    def __init__(self) -> None:
        super().__init__()
        self.line, self.spread = (
            nn.Parameter(torch.tensor([0.1, 0.4])),
            nn.Parameter(torch.zeros(2)),
        )

    def model(self, x: Tensor, here: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("patients", len(x), dim=-1):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            with pyro.plate("visits", self.number, dim=-2), pyro.poutine.mask(mask=here.mT):
                z = pyro.sample("z", dist.Normal(u, 0.6))
                pyro.sample("x", dist.Normal(z, 0.7), obs=x.mT)

    def guide(self, x: Tensor, here: Tensor) -> None:
        seen = torch.where(here, x, 0.0)
        scale = softplus(self.spread + 0.5)
        with pyro.plate("patients", len(x), dim=-1):
            pyro.sample("u", dist.Normal(self.line[0] + self.line[1] * seen.mean(-1), scale[0]))
            with pyro.plate("visits", self.number, dim=-2), pyro.poutine.mask(mask=here.mT):
                pyro.sample("z", dist.Normal(self.line[1] * x.mT, scale[1]))

    def template(self, n: int) -> Batch:
        return torch.zeros(n, self.number), torch.ones(n, self.number, dtype=torch.bool)

    def log_p(self, x: Tensor, here: Tensor) -> Tensor:
        u = LINE.to(x)[:, None, None]
        each = torch.where(here, dist.Normal(u, 0.85**0.5).log_prob(x), 0.0).sum(-1)
        return (dist.Normal(0.0, 1.0).log_prob(u[..., 0]) + each + STEP_LOG).logsumexp(0)


STEP_LOG = torch.tensor(STEP).log().item()


class Inner(Visits):
    """The same with the visits at dimension -1, and the patients at dimension -2."""

    @pv.data_plate_at(-2)
    def model(self, x: Tensor, here: Tensor) -> None:
        pyro.module("pair", self)
        with pyro.plate("patients", len(x), dim=-2):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            with pyro.plate("visits", self.number, dim=-1), pyro.poutine.mask(mask=here):
                z = pyro.sample("z", dist.Normal(u, 0.6))
                pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    @pv.data_plate_at(-2)
    def guide(self, x: Tensor, here: Tensor) -> None:
        seen = torch.where(here, x, 0.0).mean(-1, keepdim=True)
        scale = softplus(self.spread + 0.5)
        with pyro.plate("patients", len(x), dim=-2):
            pyro.sample("u", dist.Normal(self.line[0] + self.line[1] * seen, scale[0]))
            with pyro.plate("visits", self.number, dim=-1), pyro.poutine.mask(mask=here):
                pyro.sample("z", dist.Normal(self.line[1] * x, scale[1]))


def ragged() -> Batch:
    lengths = torch.randint(1, 4, (24,), generator=torch.Generator().manual_seed(7))
    return rows(24, 3), lengths


def visits() -> Batch:
    x, lengths = ragged()
    return x, torch.arange(3) < lengths[:, None]


IDIOMS = [
    Idiom("DMM of ragged sequences, padding masked", Dmm, ragged, **STEPS),
    Idiom("DMM with an IAF in the guide", Iaf, ragged, **STEPS),
    Idiom("`pyro.markov` without enumeration", Walk, lambda: (rows(24, 3),), **STEPS),
    Idiom("Visits inside a datum, at dimension −2, ragged by masks", Visits, visits),
    Idiom(
        "Visits inside a datum, at dimension −1, with the data at −2",
        Inner,
        visits,
        needs="model and guide are decorated with `pyro_vae.data_plate_at(-2)`",
    ),
]
