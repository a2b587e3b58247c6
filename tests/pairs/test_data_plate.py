"""The data plate is the plate of the site that observes x, even if there are other plates."""

from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import UsageError

TOPICS = 16


class Plain(nn.Module):
    """x = z + noise: p(x) is N(0, 2) for each of three columns."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.4))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, 0.8))

    def template(self, n: int) -> tuple[Tensor]:
        return (torch.zeros(n),)


class Topics(Plain):
    """A plate of topics at dimension -1, with as many topics as a minibatch has rows."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.linspace(-1.0, 2.0, TOPICS))

    def model(self, x: Tensor) -> None:
        with pyro.plate("topics", TOPICS):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + w.mean(-1, keepdim=True), 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("topics", TOPICS):
            pyro.sample("w", dist.Normal(self.loc, 0.1))
        super().guide(x)


class Events(Topics):
    """The same model with the topics as an event dimension."""

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(TOPICS), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + w.mean(-1), 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("w", dist.Normal(self.loc, 0.1).to_event(1))
        Plain.guide(self, x)


def fitted(kind: type[nn.Module], x: Tensor) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    pair = kind()
    options = {"epochs": 2, "batch_size": TOPICS, "seed": 0, "progress": False}
    return pair, pv.fit(pair, x, engine="eager", **options)


def test_as_many_topics_as_rows_change_no_number():
    x = torch.randn(3 * TOPICS, generator=torch.Generator().manual_seed(1))
    (plates, one), (events, other) = fitted(Topics, x), fitted(Events, x)
    assert one["elbo"] == pytest.approx(other["elbo"], rel=1e-5)
    assert torch.allclose(plates.loc, events.loc, atol=1e-6)
    few = x[:TOPICS]
    found, wanted = (pv.evaluate(pair, few, num_samples=50) for pair in (plates, events))
    assert found.log_likelihood == pytest.approx(wanted.log_likelihood, rel=1e-5)
    assert found.elbo == pytest.approx(wanted.elbo, rel=1e-5)
    assert list(found.num_units) == ["z"]


def test_the_predictive_density_of_a_plate_of_topics_is_exact():
    pair, x = Topics(), torch.randn(TOPICS, generator=torch.Generator().manual_seed(2))
    found = pv.log_likelihood(pair, x, num_samples=20_000)
    exact = dist.Normal(pair.loc.mean().item(), (2 + 0.01 / TOPICS) ** 0.5).log_prob(x)
    assert torch.allclose(found.per_datum.float(), exact, atol=0.05)


def test_encode_and_uncertainty_tell_topics_from_data():
    pair, x = Topics(), torch.randn(TOPICS)
    codes, scales = pv.encode(pair, x), pv.encode(pair, x, what="scale")
    assert list(codes) == ["z", "w"]  # local latents first
    assert torch.equal(codes["w"], pair.loc)
    assert torch.equal(scales["w"], torch.full((TOPICS,), 0.1))
    spread = pv.uncertainty(pair, x, num_weights=50, progress=False)
    assert spread.epistemic.shape == (TOPICS,)
    assert bool((spread.epistemic < spread.latent).all())


class OtherName(Plain):
    """The guide has another name for the data plate."""

    def guide(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, 0.8))


class NoSize(Plain):
    def model(self, x: Tensor) -> None:
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(self.slope * x, 0.8))


class Subsample(Plain):
    """The rows are a subsample of 40 data."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", 40, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", 40, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, 0.8))


class Deterministic(Plain):
    """pyro.deterministic sites of model and guide are neither data nor latents."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = pyro.deterministic("loc", z)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.slope * x, 0.8))
            pyro.deterministic("twice", 2 * z)


@pytest.mark.parametrize("kind", [OtherName, NoSize, Subsample, Deterministic])
def test_a_plate_written_otherwise_gives_the_same_numbers(kind):
    x = 1.4 * torch.randn(30, generator=torch.Generator().manual_seed(3))
    assert pv.check(kind(), x).errors == ()
    found, wanted = (pv.evaluate(pair, x, num_samples=30) for pair in (kind(), Plain()))
    assert found.log_likelihood == pytest.approx(wanted.log_likelihood, abs=0.02)
    assert found.kl_by_site.keys() == {"z"}
    assert pv.encode(kind(), x)["z"].tolist() == pv.encode(Plain(), x)["z"].tolist()
    assert pv.reconstruct(kind(), x).shape == (30,)
    assert pv.sample(kind(), 200, seed=0).shape == (200,)
    assert pv.predictive_check(kind(), x, progress=False).observed.shape[0] == 30
    assert pv.calibration(kind(), num_simulations=100, progress=False).names[0] == "z"
    assert list(pv.to_arviz(kind(), x[:5], num_samples=5).posterior_predictive) == ["x"]
    before, after = Plain(), kind()
    for pair in (before, after):
        torch.manual_seed(0)
        pv.fit(pair, x, epochs=2, batch_size=10, engine="eager", progress=False)
    if kind is not Subsample:  # Pyro draws the rows, so later noise differs
        assert after.slope.item() == pytest.approx(before.slope.item(), abs=1e-6)


class OwnSubsample(Plain):
    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=10) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=10) as rows:
            pyro.sample("z", dist.Normal(self.slope * x[rows], 0.8))


class VisitsRight(Plain):
    """The data plate at dimension -2, and a plate of as many visits as rows at -1."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("visits", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("visits", 3, dim=-1):
            pyro.sample("z", dist.Normal(self.slope * x, 0.8))


@pytest.mark.parametrize(
    ("pair", "x", "words"),
    [
        (OwnSubsample(), torch.randn(30), "draws 10 of the"),
        (VisitsRight(), torch.randn(3, 3), "data plate 'data' has dim=-2"),
        (VisitsRight(), torch.randn(8, 3), "data plate 'data' has dim=-2"),
    ],
)
def test_a_plate_that_is_not_supported_is_refused_by_every_tool(pair, x, words):
    assert words in pv.check(pair, x).errors[0]
    for tool in (
        lambda: pv.fit(pair, x, epochs=1, progress=False, engine="eager"),
        lambda: pv.evaluate(pair, x),
        lambda: pv.encode(pair, x),
        lambda: pv.log_likelihood(pair, x),
        lambda: pv.refine(pair, x, progress=False),
    ):
        with pytest.raises(UsageError, match=words):
            tool()


class Visits(nn.Module):
    """Three visits of each datum in a plate at dimension -2; p(x) is N(0, 2) at each visit."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), pyro.plate("visits", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), pyro.plate("visits", 3, dim=-2):
            pyro.sample("z", dist.Normal(self.slope * x.T, 0.6))

    def template(self, n: int) -> tuple[Tensor]:
        return (torch.zeros(n, 3),)


def test_values_of_a_datum_with_visits_have_the_data_first():
    pair = Visits()
    x = torch.randn(1500, 3, generator=torch.Generator().manual_seed(4))
    codes = pv.encode(pair, x)["z"]
    assert torch.allclose(codes, 0.3 * x)
    assert torch.allclose(pv.reconstruct(pair, x), 0.3 * x)
    assert torch.allclose(pv.decode(pair, {"z": codes}), codes)
    drawn = pv.sample(pair, 3000, seed=0)
    assert drawn.shape == (3000, 3)
    assert drawn.var().item() == pytest.approx(2.0, abs=0.1)
    assert pv.traverse(pair, x[:1], values=(0.0, 1.0)).shape == (3, 2, 3)
    line = pv.interpolate(pair, x[:2], x[2:4], steps=3)
    assert torch.allclose(line[:, 1], 0.15 * (x[:2] + x[2:4]))


def test_the_tools_of_a_datum_with_visits_agree_with_closed_forms():
    pair = Visits()
    x = 1.4 * torch.randn(40, 3, generator=torch.Generator().manual_seed(5))
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum(1)
    found = pv.log_likelihood(pair, x, num_samples=20_000)
    assert torch.allclose(found.per_datum.float(), exact, atol=0.1)
    data = pv.to_arviz(pair, x[:6], num_samples=50, num_particles=200)
    assert data.posterior["z"].shape == (1, 50, 6, 3)
    assert data.posterior["z"].values[0].mean(0) == pytest.approx(x[:6].numpy() / 2, abs=0.6)
    estimates = torch.from_numpy(data.log_likelihood["x"].values).logsumexp(1)[0] - log(50)
    assert torch.allclose(estimates.float(), exact[:6], atol=0.1)
    refined = pv.refine(pair, x, steps=300, num_samples=50, engine="eager", progress=False)
    assert refined.after.elbo_per_datum.mean().item() == pytest.approx(
        exact.mean().item(), abs=0.03
    )
    checked = pv.predictive_check(pair, x, progress=False)
    assert torch.allclose(checked.replicated_mean[:, 0].float(), 0.3 * x.mean(1), atol=0.5)


class Pieces(nn.Module):
    """y is one bit and x is three bits; quadrature over the latent gives p(y, x)."""

    def __init__(self, x_first: bool) -> None:
        super().__init__()
        self.x_first = x_first
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            sites = [
                ("y", dist.Bernoulli(logits=z), y),
                ("x", dist.Bernoulli(logits=z[..., None] * self.weight).to_event(1), x),
            ]
            for name, fn, value in reversed(sites) if self.x_first else sites:
                pyro.sample(name, fn, obs=value)

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * (y - 0.5) + 0 * self.weight.sum(), 1.0))

    def template(self, n: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(n, 3), torch.zeros(n)

    def exact(self, x: Tensor, y: Tensor) -> Tensor:
        z = torch.linspace(-8, 8, 2001)
        logits = z[:, None] * torch.cat([torch.ones(1), self.weight.detach()])
        data = torch.cat([y[:, None], x], 1)
        terms = dist.Bernoulli(logits=logits).log_prob(data[:, None]).sum(-1)
        return (terms + dist.Normal(0.0, 1.0).log_prob(z)).logsumexp(1) + log(16 / 2000)


def bits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return torch.rand(50, 3, generator=generator).round(), torch.rand(
        50, generator=generator
    ).round()


@pytest.mark.parametrize("x_first", [False, True])
def test_several_observed_sites_are_one_datum(x_first):
    pair, (x, y) = Pieces(x_first), bits()
    exact = pair.exact(x, y)
    found = pv.evaluate(pair, x, y, num_samples=5000)
    assert found.log_likelihood == pytest.approx(exact.mean().item(), abs=0.01)
    assert found.bits_per_dim == pytest.approx(-exact.mean().item() / (4 * log(2)), abs=0.005)
    assert pv.reconstruct(pair, x, y).shape == (50, 3)
    assert pv.reconstruct(pair, x, y, site="y").shape == (50,)
    assert pv.sample(pair, 4, seed=0).shape == (4, 3)
    data = pv.to_arviz(pair, x[:9], y[:9], num_samples=10, num_particles=500)
    assert list(data.log_likelihood) == ["joint"]
    means = torch.from_numpy(data.log_likelihood["joint"].values).mean((0, 1))
    assert torch.allclose(means.float(), exact[:9], atol=0.1)
    assert set(data.posterior_predictive) == {"x", "y"}
    checked = pv.predictive_check(pair, x, y, progress=False)
    assert torch.allclose(checked.observed[:, 0], x.mean(1).double())


class Posterior(Pieces):
    """The guide is the posterior on a grid."""

    def guide(self, x: Tensor, y: Tensor) -> None:
        z = torch.linspace(-6, 6, 601)
        logits = z[:, None] * torch.cat([torch.ones(1), self.weight])
        data = torch.cat([y[..., None], x], -1)
        terms = dist.Bernoulli(logits=logits).log_prob(data[..., None, :]).sum(-1)
        weights = (terms + dist.Normal(0.0, 1.0).log_prob(z)).softmax(-1)
        mean = (weights * z).sum(-1)
        scale = ((weights * z**2).sum(-1) - mean**2).sqrt()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean, scale))


def test_calibration_draws_every_observed_site():
    options = {"num_simulations": 1000, "num_draws": 19, "progress": False}
    assert pv.calibration(Posterior(False), **options).calibrated
    wrong = pv.calibration(Pieces(False), **options)
    assert not wrong.calibrated  # this guide sees only y


def test_a_report_of_several_observed_sites(tmp_path):
    pair, (x, y) = Pieces(False), bits()
    pv.fit(pair, x, y, epochs=1, out=tmp_path / "run", engine="eager", progress=False)
    page = pv.write_report(pair, x, y, run=tmp_path / "run")
    assert "Reconstructions" in page.read_text()


class Columns(Plain):
    """Each column of x has its own site."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for t in range(2):
                pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[:, t])

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x.mean(-1), 0.8))


def test_a_site_must_be_named_if_several_observe_parts_of_x():
    pair, x = Columns(), torch.randn(20, 2)
    cov = torch.eye(2) + 1
    exact = dist.MultivariateNormal(torch.zeros(2), cov).log_prob(x)
    assert torch.allclose(
        pv.log_likelihood(pair, x, num_samples=20_000).per_datum.float(), exact, atol=0.05
    )
    with pytest.raises(UsageError, match=r"several sites \(x0, x1\), but one site"):
        pv.reconstruct(pair, x)
    assert pv.reconstruct(pair, x, site="x1").shape == (20,)


def test_check_reports_the_fault_of_a_program_without_data():
    class Broken(Plain):
        def model(self, x: Tensor) -> None:
            raise RuntimeError("no such thing")

    assert "no such thing" in pv.check(Broken(), torch.randn(4)).errors[0]


class OwnRows(Plain):
    """The guide has a parameter with a row for each datum."""

    def guide(self, x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))


class AutoRows(nn.Module):
    """An AutoGuide of a local latent."""

    model = Plain.model

    def __init__(self) -> None:
        super().__init__()
        self.guide = AutoNormal(self.model)


class RowNumbers(Plain):
    """Row numbers index the rows of a parameter, as the error message advises."""

    def model(self, x: Tensor, rows: Tensor) -> None:
        super().model(x)

    def guide(self, x: Tensor, rows: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(40))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc[rows], 0.5**0.5))


@pytest.mark.parametrize("kind", [OwnRows, AutoRows])
def test_a_parameter_with_a_row_for_each_datum_is_refused(kind):
    x = torch.randn(40)
    for tool in (pv.fit, pv.evaluate, pv.encode, pv.log_likelihood, pv.reconstruct):
        with pytest.raises(UsageError, match="a parameter with a row for each datum"):
            tool(kind(), x)
    assert "a parameter with a row for each datum" in pv.check(kind(), x).errors[0]


def test_row_numbers_as_context_work_with_such_a_parameter():
    x = 1.4 * torch.randn(40, generator=torch.Generator().manual_seed(7))
    pair, rows = RowNumbers(), torch.arange(40)
    options = {"epochs": 300, "batch_size": 20, "learning_rate": 0.05, "progress": False}
    pv.fit(pair, x, rows, learning_rate_schedule=pv.CosineSchedule(300), engine="eager", **options)
    assert torch.allclose(pv.encode(pair, x, rows)["z"], x / 2, atol=0.25)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    assert pv.evaluate(pair, x, rows).elbo == pytest.approx(exact.mean().item(), abs=0.03)


class ObservedTopics(Topics):
    """The topics are observed too, with noise, in their own plate."""

    def model(self, x: Tensor) -> None:
        super().model(x)
        with pyro.plate("topics_seen", TOPICS):
            pyro.sample("y", dist.Normal(self.loc, 1.0), obs=torch.zeros(TOPICS))

    def guide(self, x: Tensor) -> None:
        with pyro.plate("topics_seen", TOPICS):
            pyro.sample("w", dist.Normal(self.loc, 0.1))
        Plain.guide(self, x)


def test_a_plate_of_observed_topics_is_not_taken_for_the_rows():
    (error,) = pv.check(ObservedTopics(), torch.randn(30)).errors[:1]
    assert "site 'y' of the model" in error
    assert "row for each datum" not in error
