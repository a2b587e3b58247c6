"""Latents in a plate of groups, which the rows index: partial pooling in ordinary Pyro."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.data.order import order
from pyro_vae.errors import UsageError
from pyro_vae.pairs.noise import CounterDraws, SiteNoise, new_key
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import registered
from pyro_vae.training.optimizer import Optimizer

GROUPS, N = 4, 24


class Groups(nn.Module):
    """z_i | u ~ N(u_g, 1), and x_i | z_i ~ N(w z_i, I). The guide of z is exact given its mean."""

    dim, total = -1, None

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.linspace(-1.0, 1.5, GROUPS))
        self.log_scale = nn.Parameter(torch.linspace(-1.0, -0.2, GROUPS))
        self.weight = nn.Parameter(torch.tensor([1.0, -0.5, 0.3]))
        self.slope = nn.Parameter(torch.tensor([0.4, -0.2, 0.1]))

    def groups(self) -> pyro.plate:
        return pyro.plate("groups", GROUPS, dim=self.dim)

    def rows(self, x: Tensor) -> pyro.plate:
        if self.total is None:
            return pyro.plate("data", len(x), dim=-1)
        return pyro.plate("data", self.total, subsample=torch.arange(len(x)), dim=-1)

    def placed(self, value: Tensor) -> Tensor:
        return value if self.dim == -1 else value[:, None]

    def of(self, u: Tensor, group: Tensor) -> Tensor:
        return u[..., group]

    def model(self, x: Tensor, group: Tensor) -> None:
        with self.groups():
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with self.rows(x):
            z = pyro.sample("z", dist.Normal(self.of(u, group), 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * self.weight, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor, group: Tensor) -> None:
        with self.groups():
            pyro.sample("u", dist.Normal(self.placed(self.loc), self.placed(self.log_scale.exp())))
        with self.rows(x):
            pyro.sample("z", dist.Normal(x @ self.slope, 0.8))

    def template(self, n: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(n, 3), torch.zeros(n, dtype=torch.long)

    def predictive(self, x: Tensor, group: Tensor) -> Tensor:
        """The log density of each row, with u drawn from its approximate posterior."""
        w = self.weight.detach().double()
        variance = 1 + self.log_scale.detach().double()[group].exp().square()
        loc = self.loc.detach().double()[group, None] * w
        covariance = torch.eye(3) + variance[:, None, None] * torch.outer(w, w)
        return dist.MultivariateNormal(loc, covariance).log_prob(x.double())


class Plain(Groups):
    """The rows index from the left, which does not broadcast over a plate of samples."""

    def of(self, u: Tensor, group: Tensor) -> Tensor:
        return u[group]


class Left(Groups):
    """The groups are at dimension -2, and u has a trailing 1."""

    dim = -2

    def of(self, u: Tensor, group: Tensor) -> Tensor:
        return u[..., group, 0]


class LeftPlain(Left):
    def of(self, u: Tensor, group: Tensor) -> Tensor:
        return u[group, 0]


class Events(Groups):
    """Each group has a vector of the three weights' signs and sizes, one of which is used."""

    def model(self, x: Tensor, group: Tensor) -> None:
        with self.groups():
            u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with self.rows(x):
            z = pyro.sample("z", dist.Normal(u[..., group, 0], 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * self.weight, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor, group: Tensor) -> None:
        loc, scale = (torch.stack([v, v], -1) for v in (self.loc, self.log_scale.exp()))
        with self.groups():
            pyro.sample("u", dist.Normal(loc, scale).to_event(1))
        with self.rows(x):
            pyro.sample("z", dist.Normal(x @ self.slope, 0.8))


SLOW = [Plain, Left, LeftPlain]
KINDS = [Groups, Plain, Left, LeftPlain, Events]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(0, GROUPS, (N,), generator=generator)
    return torch.randn(N, 3, generator=generator) + group[:, None] / 2, group


@pytest.mark.parametrize("kind", KINDS)
def test_fit_takes_the_steps_of_stock_svi_with_groups_missing_from_minibatches(kind):
    x, group = data()
    pair, stock = kind(), kind()
    stock.total = N
    options = {"epochs": 4, "batch_size": 5, "learning_rate": 0.005, "seed": 3}
    pv.fit(pair, x, group, optimizer=torch.optim.SGD, engine="eager", progress=False, **options)
    optimizer = Optimizer(torch.optim.SGD, dict(stock.named_parameters()), 0.005)
    svi = SVI(registered(stock, stock.model), stock.guide, optimizer, Trace_ELBO())
    lacking = 0
    with pyro.get_param_store().scope(), seeded(3):
        for epoch in range(4):
            for rows in order(3, epoch, N).split(5):
                lacking += len(group[rows].unique()) < GROUPS
                optimizer.learning_rate = 0.005 * len(rows) / N
                with SiteNoise(CounterDraws(new_key())):
                    svi.step(x[rows], group[rows])
    assert lacking > 0
    for name, value in stock.named_parameters():
        assert torch.allclose(pair.get_parameter(name), value, atol=1e-5), name


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", KINDS)
def test_log_p_of_rows_of_few_groups_is_exact(kind):
    pair, (x, group) = kind(), data()
    few = group % 3 != 1  # two of the groups have no rows
    x, group = x[few][:8], group[few][:8]
    found = pv.log_likelihood(pair, x, group, num_samples=400 if kind in SLOW else 4000)
    error = (found.per_datum - pair.predictive(x, group)).abs()
    assert bool((error < 5 * found.standard_errors + 0.01).all())
    assert list(pv.evaluate(pair, x, group, num_samples=20).kl_by_site) == ["z"]


@pytest.mark.parametrize("kind", KINDS)
def test_check_says_that_a_latent_belongs_to_groups_and_what_makes_it_slow(kind):
    report = pv.check(kind(), data())
    assert report.errors == ()
    assert report.notes[0] == (
        "latent site 'u' is a group latent: it has a value for each member of plate 'groups' (4), "
        "and all rows share these values"
    )
    slow = kind in SLOW
    assert len(report.notes) == 1 + slow
    if slow:
        assert "one at a time, which is slower" in report.notes[1]
        assert f"{__file__}:" in report.notes[1]


class Expanded(Groups):
    """It expands z to the samples of u, of which there are none if u has one value."""

    def model(self, x: Tensor, group: Tensor) -> None:
        with pyro.plate("groups", GROUPS, dim=-1):
            u = pyro.sample("u", dist.Normal(x.new_zeros(()), 1.0))[..., group]
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(u, 1.0)).expand(u.shape)
            pyro.sample("x", dist.Normal(z[..., None] * self.weight, 1.0).to_event(1), obs=x)


def test_check_says_that_samples_do_not_broadcast_with_one_value_of_the_groups():
    report = pv.check(Expanded(), data())
    assert report.errors == ()
    assert len(report.notes) == 2
    assert "do not broadcast with one value of the others" in report.notes[1]
    assert f"{__file__}:" in report.notes[1]


def test_means_and_draws_of_rows_are_those_of_their_groups():
    pair, group = Groups(), torch.tensor([0, 3, 3])
    means = pv.sample(pair, 3, group, means=True)
    decoded = pv.decode(pair, {"z": [1.0, 2.0, 3.0]}, group.numpy())
    assert torch.allclose(decoded, torch.tensor([[1.0], [2.0], [3.0]]) * pair.weight)
    assert means.shape == (3, 3)
    drawn = pv.sample(pair, 4000, torch.tensor([3]), seed=0)
    assert torch.allclose(drawn.mean(0), 1.5 * pair.weight, atol=0.2)
    x, group = data()
    again = pv.reconstruct(pair, x, group)
    assert torch.allclose(again, (x @ pair.slope)[:, None] * pair.weight, atol=1e-5)
    assert torch.allclose(pv.encode(pair, x, group)["z"], x @ pair.slope)


def test_check_takes_any_value_of_masked_entries():
    class Masked(Groups):
        def model(self, x: Tensor, group: Tensor, seen: Tensor) -> None:
            with self.groups():
                u = pyro.sample("u", dist.Normal(0.0, 1.0))
            with self.rows(x):
                z = pyro.sample("z", dist.Normal(self.of(u, group), 1.0))
                fn = dist.Normal(z[..., None] * self.weight, 1.0).mask(seen)
                pyro.sample("x", fn.to_event(1), obs=x)

        def guide(self, x: Tensor, group: Tensor, seen: Tensor) -> None:
            super().guide(x * seen, group)  # NaN times 0 is NaN

    x, group = data()
    seen = torch.arange(3) < torch.randint(1, 4, (N, 1))
    holes = x.masked_fill(~seen, torch.nan)
    pair = Masked()
    assert str(pv.check(pair, holes, group, seen)) == str(pv.check(pair, x, group, seen))
    assert "broadcast" not in str(pv.check(pair, holes, group, seen))


def test_decode_takes_values_of_groups():
    pair = Groups()
    u = torch.tensor([-50.0, 0.0, 0.0, 50.0])
    drawn = pv.decode(pair, {"u": u}, torch.tensor([0, 3, 3, 0, 0]), means=False)
    assert (drawn[:, 0] > 0).tolist() == [False, True, True, False, False]
    with pytest.raises(UsageError, match=r"^the value of 'u' must have shape \(4\), got \(3,\)$"):
        pv.decode(pair, {"u": u[:3]}, torch.tensor([0]))
    with pytest.raises(UsageError, match=r"^the value of 'z' must have shape \(n\), got \(3, 1\)$"):
        pv.decode(pair, {"z": torch.zeros(3, 1)}, torch.tensor([0, 1, 2]))


def test_a_latent_in_the_data_plate_at_another_dimension_is_refused():
    class Wrong(Groups):
        def guide(self, x: Tensor, group: Tensor) -> None:
            with self.groups():
                pyro.sample("u", dist.Normal(self.loc, self.log_scale.exp()))
            with pyro.plate("data", len(x), dim=-2):
                pyro.sample("z", dist.Normal((x @ self.slope)[:, None], 0.8))

    assert "which has 1 more dimensions than its plates" in pv.check(Wrong(), data()).errors[0]


@pytest.mark.parametrize("tool", [pv.anneal])
def test_tools_of_one_datum_refuse_groups_in_one_line(tool):
    with pytest.raises(UsageError, match="latent site 'u'") as caught:
        tool(Groups(), *data())
    assert "\n" not in str(caught.value)
