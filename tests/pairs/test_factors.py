"""``pyro.factor``: a term of p(x, z) in the model, a term of the loss in the guide."""

from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import registered, scope
from pyro_vae.training.engine import Engine, Step
from pyro_vae.training.optimizer import Optimizer


class Energy(nn.Module):
    """z ~ N(0, 1) with the factor exp(-z^2), which is N(0, 1/3) / sqrt(3); x ~ N(z, 1)."""

    def __init__(self, kind="energy"):
        super().__init__()
        self.kind = kind
        self.slope = nn.Parameter(torch.tensor(0.3))
        self.scale = nn.Parameter(torch.tensor(0.6))

    def model(self, x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0)) if self.kind == "of all" else 0.0
        if self.kind == "of all":
            pyro.factor("energy", -(w**2))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if self.kind == "energy":
                pyro.factor("energy", -(z**2))
            if self.kind == "parts":  # two factors of one half each, in a plate within the datum
                with pyro.plate("halves", 2, dim=-2):
                    pyro.factor("energy", -(z**2) / 2)
            pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)
        if self.kind == "outside":
            pyro.factor("energy", -(z**2).sum())

    def guide(self, x):
        if self.kind == "of all":
            pyro.sample("w", dist.Normal(0.0, 0.5))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.slope * x, self.scale))
            if self.kind == "penalty":
                pyro.factor("penalty", (self.slope * x) ** 2, has_rsample=True)
            if self.kind == "observed":
                pyro.sample("y", dist.Normal(self.slope * x, 1.0), obs=x, infer={"is_auxiliary": 1})
        if self.kind == "penalty outside":
            pyro.factor("penalty", (z**2).sum(), has_rsample=True)

    def template(self, n):
        return (torch.zeros(n),)

    def log_z(self, x):
        """The log of the integral of p(x, z) exp(-z^2) over z."""
        return dist.Normal(0.0, (4 / 3) ** 0.5).log_prob(x) - log(3) / 2


def data(n=40):
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["energy", "parts"])
def test_log_p_includes_the_factors_and_names_them(kind):
    pair, x = Energy(kind), data()
    found = pv.log_likelihood(pair, x, num_samples=2000)
    torch.testing.assert_close(found.per_datum.float(), pair.log_z(x), atol=0.05, rtol=0)
    assert found.factors == ("energy",)
    assert "p(x) includes the factor energy" in str(found)
    measured = pv.evaluate(pair, x, num_samples=200)
    assert measured.log_likelihood == pytest.approx(pair.log_z(x).mean().item(), abs=0.02)
    slope, scale = pair.slope.item(), pair.scale.item()
    second = (slope * x) ** 2 + scale**2
    kl = 0.5 * (second - 1) - log(scale)
    residual = (x - slope * x) ** 2 + scale**2
    elbo = -0.5 * residual - 0.5 * log(2 * torch.pi) - second - kl
    assert measured.elbo == pytest.approx(elbo.mean().item(), abs=0.3)
    assert measured.kl_by_site["z"] == pytest.approx(kl.mean().item(), abs=0.15)
    assert "p(x) includes the factor energy" in str(measured)
    assert any("factor 'energy'" in note for note in pv.check(pair, x).notes)


@pytest.mark.thorough
def test_nuts_annealing_and_gaps_include_the_factors():
    pair, x = Energy(), torch.tensor([2.0])
    options = {"progress": False}
    moments = pv.nuts(pair, x, num_draws=250, warmup=120, num_chains=2, **options).moments
    assert moments.mean.item() == pytest.approx(0.5, abs=0.1)
    assert moments.standard_deviation.item() == pytest.approx(0.5, abs=0.08)
    annealed = pv.anneal(pair, x, num_temperatures=30, **options)
    assert annealed.value == pytest.approx(pair.log_z(x).item(), abs=0.05)
    assert "p(x) includes the factor energy" in str(annealed)
    found = pv.gaps(pair, data(10), steps=300, num_samples=1000, **options)
    assert found.approximation.value == pytest.approx(0, abs=0.02)  # N(x/4, 1/4) is in the family
    assert "p(x) includes the factor energy" in str(found)
    codes = pv.encode(found.refinement.pair, *found.refinement.batch)["z"]
    torch.testing.assert_close(codes, data(10) / 4, atol=0.08, rtol=0)


def test_what_needs_draws_of_a_model_with_factors_is_refused():
    pair, x = Energy(), data()
    for refused in (
        lambda: pv.sample(pair, 3),
        lambda: pv.calibration(pair, progress=False),
        lambda: pv.sandwich(pair, num_examples=3, progress=False),
        lambda: pv.to_arviz(pair, x, progress=False),
    ):
        with pytest.raises(pv.UsageError, match="'energy', so its density is not normalized"):
            refused()
    assert pv.reconstruct(pair, x).shape == x.shape
    assert pv.decode(pair, {"z": x}).shape == x.shape


@pytest.mark.parametrize(
    ("kind", "name", "where"),
    [("outside", "energy", "model"), ("penalty outside", "penalty", "guide")],
)
def test_a_factor_of_single_data_outside_the_plate_is_refused(kind, name, where):
    pair, x = Energy(kind), data()
    said = f"factor '{name}' of the {where} depends on single data but is outside the data plate"
    assert said in pv.check(pair, x).errors[0]
    for refused in (pv.fit, pv.log_likelihood, pv.nuts):
        with pytest.raises(pv.UsageError, match=said):
            refused(pair, x, progress=False)


def test_a_factor_of_a_global_latent_counts_once_for_all_data():
    """With the factor, the prior of w is N(0, 1/3) / sqrt(3). It counts once in an epoch."""
    pair, x = Energy("of all"), data()
    history = pv.fit(pair, x, epochs=400, batch_size=10, learning_rate=1e-30, progress=False)
    second, m, s = 0.25, pair.slope.item(), pair.scale.item()
    kl = (0.5 * (second - 1) - log(0.5) + second) / len(x)
    kl_z = 0.5 * ((m * x) ** 2 + s**2 - 1) - log(s)
    fit = -0.5 * ((x - m * x) ** 2 + s**2 + second) - 0.5 * log(2 * torch.pi)
    elbo = torch.tensor(history["elbo"]).mean().item()
    assert elbo == pytest.approx((fit - kl_z).mean().item() - kl, abs=0.02)
    objective = torch.tensor(history["objective"]).mean().item()
    assert objective == pytest.approx(elbo, rel=1e-4)
    measured = pv.evaluate(pair, x, num_samples=2)
    assert measured.elbo == pytest.approx((fit - kl_z).mean().item(), abs=0.4)


@pytest.mark.parametrize("engine", ["eager", "traced"])
@pytest.mark.parametrize("kind", ["energy", "penalty", "observed"])
def test_steps_are_those_of_stock_svi(kind, engine):
    x, states = data(), []
    for run in ("stock", engine):
        pair = Energy(kind)
        optimizer = Optimizer(torch.optim.Adam, dict(pair.named_parameters()), 1e-2)
        model = registered(pair, pair.model)
        svi = SVI(model, pair.guide, optimizer, Trace_ELBO())
        if run != "stock":
            svi = Step(model, pair.guide, optimizer, Engine(pair, engine=run, declare=False))
        losses = []
        for number in range(20):
            with scope(pair), seeded(number):
                losses.append(float(svi.step(x)))
        states.append((losses, pair.slope.item()))
    assert states[1][0] == pytest.approx(states[0][0], rel=1e-4)
    assert states[1][1] == pytest.approx(states[0][1], rel=1e-4)


@pytest.mark.parametrize("kind", ["penalty", "observed"])
def test_what_a_guide_observes_is_a_term_of_the_loss_and_not_of_q(kind):
    pair, plain, x = Energy(kind), Energy("none"), data()
    report = pv.check(pair, x)
    assert report.errors == ()
    assert "is added to the loss" in report.notes[0]
    for number in ("elbo", "log_likelihood", "kl"):
        measured = [getattr(pv.evaluate(p, x, num_samples=20), number) for p in (pair, plain)]
        assert measured[0] == pytest.approx(measured[1], rel=1e-5)
    extra = (pair.slope.item() * x) ** 2
    if kind == "observed":
        extra = dist.Normal(pair.slope.item() * x, 1.0).log_prob(x)
    options = {"epochs": 1, "batch_size": 40, "learning_rate": 1e-30, "progress": False}
    terms = [pv.fit(p, x, **options)["objective"][0] for p in (pair, plain)]
    assert terms[1] - terms[0] == pytest.approx(extra.mean().item(), rel=1e-3)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    found = pv.log_likelihood(pair, x, num_samples=3000)
    torch.testing.assert_close(found.per_datum.float(), exact, atol=0.08, rtol=0)
    for objective in (pv.ImportanceWeightedELBO(3), pv.StickingTheLandingELBO()):
        with pytest.raises(
            pv.UsageError, match="does not add such terms to the loss; use Trace_ELBO"
        ):
            pv.fit(
                pair,
                x,
                epochs=1,
                batch_size=10,
                objective=objective,
                progress=False,
                engine="eager",
            )


def test_a_weighted_bound_has_the_factors_in_its_weights():
    pair, x = Energy(), data()
    bound = -pv.ImportanceWeightedELBO(2000).loss(pair.model, pair.guide, x) / len(x)
    assert bound == pytest.approx(pair.log_z(x).mean().item(), abs=0.02)
