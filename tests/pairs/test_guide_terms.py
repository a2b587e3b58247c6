"""Sites that a guide observes, as in CEVAE and scANVI: terms of the loss, as in stock Pyro."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.cevae import TraceCausalEffect_ELBO
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.data.order import order
from pyro_vae.errors import UsageError
from pyro_vae.pairs.noise import CounterDraws, SiteNoise, new_key
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import registered
from pyro_vae.training.optimizer import Optimizer


class Treated(nn.Module):
    """A treatment t is observed by the model; the guide of z takes it as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.effect = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.5))
        self.logit = nn.Parameter(torch.tensor(0.2))

    def observe(self, x: Tensor, t: Tensor) -> None:
        pass

    def model(self, x: Tensor, t: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.effect * z, 1.0), obs=x)
            pyro.sample("t", dist.Bernoulli(logits=self.logit * z), obs=t)

    def guide(self, x: Tensor, t: Tensor) -> None:
        with pyro.plate("data", len(x)):
            self.observe(x, t)
            pyro.sample("z", dist.Normal(self.slope * (x + 0.1 * t), 0.9))

    def log_p(self, x: Tensor, t: Tensor) -> Tensor:
        """log p(x, t) by quadrature."""
        z = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
        with torch.no_grad():
            joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(self.effect * z, 1.0).log_prob(
                x
            )
            joint = joint + dist.Bernoulli(logits=self.logit * z).log_prob(t.double())
        return joint.logsumexp(0) + torch.log(z[1] - z[0])


class SameName(Treated):
    def observe(self, x: Tensor, t: Tensor) -> None:
        pyro.sample("t", dist.Bernoulli(logits=self.slope * x), obs=t)


class OwnName(Treated):
    def observe(self, x: Tensor, t: Tensor) -> None:
        pyro.sample("classes", dist.Bernoulli(logits=self.slope * x), obs=t)


class Marked(Treated):
    def observe(self, x: Tensor, t: Tensor) -> None:
        fn = dist.Bernoulli(logits=self.slope * x)
        pyro.sample("t", fn, obs=t, infer={"is_auxiliary": True})


KINDS = [SameName, OwnName, Marked]
N = 10


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, generator=generator), torch.arange(N) % 2.0


@pytest.mark.sample(7)
@pytest.mark.parametrize("engine", ["eager", "traced"])
@pytest.mark.parametrize("objective", [Trace_ELBO, TraceCausalEffect_ELBO])
@pytest.mark.parametrize("kind", KINDS)
def test_fit_takes_the_steps_of_stock_svi(kind, objective, engine):
    pair, stock, batch = kind(), kind(), data()
    options = {"epochs": 8, "batch_size": N, "learning_rate": 0.05, "engine": engine, "seed": 1}
    history = pv.fit(pair, *batch, objective=objective(), progress=False, **options)
    optimizer = Optimizer(torch.optim.Adam, dict(stock.named_parameters()), 0.05)
    svi = SVI(registered(stock, stock.model), stock.guide, optimizer, objective())
    losses = []
    with pyro.get_param_store().scope(), seeded(1), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found non-auxiliary vars in guide but not model")
        for epoch in range(8):
            rows = order(1, epoch, N)
            with SiteNoise(CounterDraws(new_key())):
                losses.append(svi.step(*(tensor[rows] for tensor in batch)))
    assert history["objective"] == pytest.approx([-loss / N for loss in losses], rel=1e-5)
    for name, value in stock.named_parameters():
        assert torch.allclose(pair.get_parameter(name), value, atol=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_bounds_leave_the_terms_out(kind):
    pair, plain, batch = kind(), Treated(), data()
    found = pv.log_likelihood(pair, *batch, num_samples=2000)
    assert torch.allclose(found.per_datum, pair.log_p(*batch), atol=0.02)
    for field in ("elbo", "reconstruction", "kl", "log_likelihood"):
        values = [getattr(pv.evaluate(p, *batch, num_samples=20), field) for p in (pair, plain)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert torch.equal(pv.encode(pair, *batch)["z"], pv.encode(plain, *batch)["z"])
    assert torch.equal(
        pv.reconstruct(pair, *batch, site="t"), pv.reconstruct(plain, *batch, site="t")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_check_says_that_the_term_is_in_the_loss_alone(kind):
    report = pv.check(kind(), data())
    assert report.errors == ()
    assert any("its log density is added to the loss" in note for note in report.notes)


def test_annealing_leaves_the_terms_out():
    batch = tuple(part[:2] for part in data())
    found = pv.anneal(SameName(), *batch, num_chains=4, num_temperatures=60, progress=False)
    assert torch.allclose(found.per_datum.double(), SameName().log_p(*batch), atol=0.1)


def test_an_objective_without_such_terms_is_refused_and_its_cure_works():
    class Mixed(SameName):
        def model(self, x: Tensor, t: Tensor) -> None:
            super().model(x, t)
            with pyro.plate("rows", len(x)):
                k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
                pyro.sample("y", dist.Normal(k, 1.0), obs=x + t)

    with pytest.raises(UsageError, match=r"EnumeratedELBO does not add .*; use TraceEnum_ELBO$"):
        pv.fit(Mixed(), *data(), epochs=1)
    pv.fit(
        Mixed(), *data(), objective=TraceEnum_ELBO(max_plate_nesting=1), epochs=1, engine="eager"
    )


def test_a_latent_of_the_model_that_the_guide_observes_is_refused():
    class Latent(SameName):
        def model(self, x: Tensor, t: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("t", dist.Bernoulli(logits=self.logit * z))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert (
        "the guide observes site 't', but a guide samples" in pv.check(Latent(), data()).errors[0]
    )
