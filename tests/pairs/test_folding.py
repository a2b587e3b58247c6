"""Guides with auxiliary sites: AutoGuides, EasyGuide, and a Delta written by hand."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.infer.autoguide.initialization import init_to_mean
from torch import nn

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import registered, scope
from pyro_vae.training.engine import Engine, Step
from pyro_vae.training.optimizer import Optimizer

AUXILIARY = {"is_auxiliary": True}


class Linear(nn.Module):
    """z ~ N(0, I), x ~ N(Wz, 1): the posterior and p(x) are normal. ``kind`` is how z is drawn."""

    def __init__(self, how="plain"):
        super().__init__()
        self.how = how
        weight = torch.tensor([[1.0, 0.5], [0.0, 1.0], [0.3, -0.2]])
        self.register_buffer("weight", weight.double())
        precision = torch.eye(2) + weight.T @ weight
        self.register_buffer("covariance", precision.inverse().double())
        self.spread = nn.Parameter(torch.tensor([0.9, 1.2]).double())

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            if self.how in ("two", "two joint"):
                a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
                b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
                z = torch.stack([a, b], -1)
            else:
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, 1.0).to_event(1), obs=x)

    def q(self, x):
        loc = x @ self.weight @ self.covariance
        return loc, self.spread * self.covariance.diagonal().sqrt()

    def guide(self, x):
        loc, scale = self.q(x)
        with pyro.plate("data", len(x), dim=-1):
            if self.how == "plain":
                return pyro.sample("z", dist.Normal(loc, scale).to_event(1))
            fn = dist.Normal(loc, scale).to_event(1)
            if self.how == "affine":
                u = pyro.sample("u", dist.Normal(0 * loc, 1.0).to_event(1), infer=AUXILIARY)
                density = -scale.log().sum(-1).expand(len(x))
                return pyro.sample("z", dist.Delta(loc + scale * u, density, event_dim=1))
            if self.how == "two joint":
                fn = dist.MultivariateNormal(loc, scale_tril=scale.diag())
            u = pyro.sample("u", fn, infer=AUXILIARY)
            if self.how in ("two", "two joint"):
                pyro.sample("a", dist.Delta(u[..., 0]))
                return pyro.sample("b", dist.Delta(u[..., 1]))
            if self.how == "also read":  # another site depends on u, which equals z
                pyro.factor("nothing", 0 * u.sum(-1), has_rsample=True)
            return pyro.sample("z", dist.Delta(u, event_dim=1))

    def template(self, n):
        return (torch.zeros(n, 3).double(),)

    def log_p(self, x):
        covariance = torch.eye(3) + self.weight @ self.weight.T
        return dist.MultivariateNormal(x.new_zeros(3), covariance).log_prob(x)

    def kl(self, x):
        """The KL(q || p) of each unit in closed form."""
        loc, scale = self.q(x)
        return 0.5 * (scale**2 + loc**2 - 1) - scale.log()

    def elbo(self, x):
        loc, scale = self.q(x)
        off = (x - loc @ self.weight.T).square().sum(-1) + (scale**2 * self.weight**2).sum()
        constant = 3 * torch.log(torch.tensor(2 * torch.pi))
        return -0.5 * (off + constant) - self.kl(x).sum(-1)


def rows(n=30, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)).double()


HOW = ["delta", "two", "two joint", "affine", "also read"]


@pytest.mark.parametrize("how", HOW)
def test_bounds_kl_and_scales_are_those_of_the_latent(how):
    pair, x = Linear(how), rows()
    assert pv.check(pair, x).errors == ()
    found = pv.evaluate(pair, x, num_samples=400, engine="eager")
    draws = (len(x) * 10) ** 0.5
    assert found.elbo == pytest.approx(pair.elbo(x).mean().item(), abs=8 / draws)
    assert found.log_likelihood == pytest.approx(pair.log_p(x).mean().item(), abs=0.01)
    kl, loc, scale = pair.kl(x).detach(), *(part.detach() for part in pair.q(x))
    together = kl.sum(1).mean().item()
    assert found.kl == pytest.approx(together, abs=8 / draws)
    if how == "two joint":
        assert list(found.kl_by_site) == ["a + b"]
    elif how == "two":
        assert found.kl_by_unit["a"] + found.kl_by_unit["b"] == pytest.approx(kl.mean(0).tolist())
    elif how != "affine":
        assert found.kl_by_unit["z"] == pytest.approx(kl.mean(0).tolist())
    codes = pv.encode(pair, x)
    scales = pv.encode(pair, x, what="scale")
    codes, scales = (
        torch.stack([part["a"], part["b"]], -1) if "a" in part else part["z"]
        for part in (codes, scales)
    )
    exact = how in ("delta", "two", "also read")
    off = (codes - loc) / scale * (1 if exact else 10)
    assert off.abs().max() < (1e-6 if exact else 4.5)
    assert (scales / scale - 1).abs().max() < (1e-6 if exact else 0.35)


@pytest.mark.sample(1)
@pytest.mark.parametrize("how", HOW)
def test_tools_of_inference_take_the_latent_with_its_density(how):
    pair, x = Linear(how), rows(4)
    plain, log_p = Linear(), pair.log_p(x).mean().item()
    options = {"progress": False, "engine": "eager"}
    assert pv.reconstruct(pair, x).shape == x.shape
    settings = {"steps": 60, "num_samples": 100 if how == "affine" else 400, **options}
    gap, exact = (pv.gaps(one, x, **settings) for one in (pair, plain))
    assert gap.approximation.value == pytest.approx(exact.approximation.value, abs=0.03)
    assert gap.inference.value == pytest.approx((log_p - pair.elbo(x).mean()).item(), abs=0.1)
    if how == "two joint":
        options["engine"] = "traced"
        moments = pv.nuts(pair, x[:1], num_draws=100, warmup=60, num_chains=2, **options).moments
        loc = (x[:1] @ pair.weight @ pair.covariance).flatten()
        error = 6 * pair.covariance.diagonal().sqrt() / 70**0.5
        assert ((moments.mean.flatten() - loc).abs() < error).all()
    settings = {"num_temperatures": 20, "num_chains": 8, **options}
    if how != "affine":
        found = pv.anneal(pair, x, **settings)
        assert found.value == pytest.approx(log_p, abs=5 * found.standard_error + 0.01)
        assert pv.traverse(pair, x[:1]).shape[1:] == (7, 3)
        if how == "delta":
            calibrated = pv.calibration(pair, num_simulations=100, num_draws=19, progress=False)
            assert calibrated.left_out == {}
    else:
        with pytest.raises(pv.UsageError, match="known only at these draws"):
            pv.anneal(pair, x, **settings)


class Positive(nn.Module):
    """s ~ Gamma, which the guide draws as the exponential of a normal; or s on a simplex."""

    def __init__(self, kind="positive", density=True):
        super().__init__()
        self.kind, self.density = kind, density
        self.scale = nn.Parameter(torch.tensor(0.3 if kind == "positive" else 1.7))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            prior = dist.Gamma(2.0, 1.0)
            if self.kind == "simplex":
                prior = dist.Dirichlet(torch.ones(3))
            s = pyro.sample("s", prior.expand((len(x),)))
            s = s[..., 0] if self.kind == "simplex" else s
            pyro.sample("x", dist.Normal(s, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            if self.kind == "simplex":
                fn = dist.Normal(x.new_zeros(len(x), 2), self.scale).to_event(1)
                u = pyro.sample("u", fn, infer=AUXILIARY)
                transform = torch.distributions.biject_to(dist.Dirichlet(torch.ones(3)).support)
                s = transform(u)
                density = -transform.log_abs_det_jacobian(u, s)
                return pyro.sample("s", dist.Delta(s, density, event_dim=1))
            u = pyro.sample("u", dist.Normal(x / 4, self.scale), infer=AUXILIARY)
            pyro.sample("s", dist.Delta(u.exp(), -u if self.density else 0.0))

    def template(self, n):
        return (torch.zeros(n),)


def test_mean_and_scale_of_a_constrained_latent_are_its_own():
    pair, x = Positive(), torch.tensor([0.5, 1.0, 3.0])
    exact = dist.LogNormal(x / 4, 0.3)
    torch.testing.assert_close(pv.encode(pair, x)["s"], exact.mean)
    torch.testing.assert_close(pv.encode(pair, x, what="scale")["s"], exact.stddev)


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["positive", "simplex"])
def test_log_p_of_a_constrained_latent_agrees_with_quadrature(kind):
    pair, x = Positive(kind), torch.tensor([0.5, 1.0, 3.0])
    pair.scale.data += 0.5
    grid = (torch.arange(40_000).double() + 0.5) / (2000 if kind == "positive" else 40_000)
    prior = dist.Gamma(2.0, 1.0) if kind == "positive" else dist.Beta(1.0, 2.0)
    density = prior.log_prob(grid) + dist.Normal(grid, 1.0).log_prob(x[:, None].double())
    log_p = density.logsumexp(1) + (grid[1] - grid[0]).log()
    found = pv.log_likelihood(pair, x, num_samples=20_000, engine="eager")
    assert (found.per_datum - log_p).abs().max() < 0.06
    annealed = pv.anneal(pair, x, num_temperatures=60, progress=False, engine="eager")
    assert (annealed.per_datum - log_p).abs().max() < 0.2


def test_a_delta_without_the_density_of_its_map_is_refused():
    pair, x = Positive(density=False), torch.ones(4)
    said = "the Delta of site 's' in the guide has log_density 0"
    assert said in pv.check(pair, x).errors[0]
    for run in (pv.evaluate, pv.encode, pv.log_likelihood):
        with pytest.raises(pv.UsageError, match=said):
            run(pair, x)


class Easy(EasyGuide):
    def guide(self, *batch):
        group = self.group(".*")
        loc = pyro.param("loc", torch.full(group.event_shape, 0.1))
        scale = pyro.param("width", torch.full(group.event_shape, 0.2), dist.constraints.positive)
        group.sample("both", dist.Normal(loc, scale).to_event(1))


def parts(model):
    both = AutoGuideList(model)
    both.append(AutoNormal(poutine.block(model, expose=["w"]), init_loc_fn=init_to_mean))
    both.append(AutoDelta(poutine.block(model, expose=["s"]), init_loc_fn=init_to_mean))
    return both


AUTO = {
    "normal": AutoNormal,
    "diagonal": AutoDiagonalNormal,
    "multivariate": AutoMultivariateNormal,
    "low rank": AutoLowRankMultivariateNormal,
    "flow": AutoIAFNormal,
    "structured": lambda model: AutoStructured(
        model, conditionals={"w": "mvn", "s": "normal"}, dependencies={"w": {"s": "linear"}}
    ),
    "delta": AutoDelta,
    "laplace": AutoLaplaceApproximation,
    "list": parts,
    "easy": Easy,
}
POINTS = {"delta": ("w", "s"), "laplace": ("w", "s"), "list": ("s",)}
JOINT = ("multivariate", "low rank", "flow")


class Shared(nn.Module):
    """The mean and the scale of the data are global latents, with any of Pyro's AutoGuides."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.guide = AUTO[kind](self.model)

    def model(self, x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        s = pyro.sample("s", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(w, s).to_event(1), obs=x)

    def template(self, n):
        return (torch.zeros(n, 3),)


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", [*AUTO])
def test_every_tool_with_a_guide_of_pyros(kind, tmp_path):
    pair, x = Shared(kind), 1 + 0.5 * torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    options = {"progress": False, "engine": "eager"}
    points = POINTS.get(kind, ())
    report = pv.check(pair, x)
    assert report.errors == ()
    assert any("is a Delta" in note for note in report.notes) == bool(points)
    history = pv.fit(pair, x, epochs=3, batch_size=30, learning_rate=0.01, **options)
    assert history.point_estimates == points
    assert ("log joint at a point estimate" in repr(history)) == bool(points)
    expected = {f"-log p({name})" for name in points} | ({"w", "s"} - set(points))
    if kind in JOINT:
        expected = {"w + s"}
    assert set(history.epochs[-1].kl) == expected
    found = pv.evaluate(pair, x, num_samples=50, engine="eager")
    assert found.point_estimates == points
    assert found.elbo <= found.log_likelihood + 1e-6
    assert not pv.reconstruct(pair, x).requires_grad
    assert set(pv.encode(pair, x)) == {"w", "s"}
    assert pv.log_likelihood(pair, x, num_samples=20, engine="eager").per_datum.shape == (30,)
    assert pv.predictive_check(pair, x, num_replicates=20, progress=False).num_replicates == 20
    for refused in (
        lambda: pv.traverse(pair, x[:1]),
        lambda: pv.gaps(pair, x[:3], **options),
        lambda: pv.anneal(pair, x[:3], **options),
        lambda: pv.refine(pair, x[:3], **options),
        lambda: pv.calibration(pair, progress=False),
    ):
        with pytest.raises(pv.UsageError) as told:
            refused()
        assert "\n" not in str(told.value)
    if set(points) == {"w", "s"}:
        with pytest.raises(pv.UsageError, match="a point estimate without variance"):
            pv.uncertainty(pair, x[:2], progress=False)
    else:
        assert pv.uncertainty(pair, x[:2], num_weights=3, progress=False).epistemic.shape == (2, 3)
    if points or kind == "structured":
        with pytest.raises(pv.UsageError, match=r"a point estimate|known only at these draws"):
            pv.to_arviz(pair, x[:2], progress=False)
    else:
        told = pv.to_arviz(pair, x[:2], num_samples=3, progress=False)
        assert told.posterior["w"].shape == (1, 3, 3)
    pv.save(pair, tmp_path / "run")
    other = Shared(kind)
    pv.check(other, x)  # this creates its parameters
    loaded = pv.load(tmp_path / "run", other)
    torch.testing.assert_close(pv.sample(loaded, 3, seed=0), pv.sample(pair, 3, seed=0))


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        *((k, e) for k in ("normal", "multivariate", "delta", "easy") for e in ("eager", "traced")),
        ("flow", "eager"),  # it keeps its last draw, so it cannot be traced
        ("aux", "traced"),
    ],
)
def test_steps_are_those_of_stock_svi(kind, engine):
    """Compare with stock Trace_ELBO of the original programs, under each engine of `fit`."""
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    states = []
    for run in ("stock", engine):
        pair = Linear("affine").float() if kind == "aux" else Shared(kind)
        pv.check(pair, x)
        optimizer = Optimizer(torch.optim.Adam, dict(pair.named_parameters()), 1e-2)
        model = registered(pair, pair.model)
        if run == "stock":
            svi = SVI(model, pair.guide, optimizer, Trace_ELBO())
        else:
            svi = Step(model, pair.guide, optimizer, Engine(pair, engine=run, declare=False))
        losses = []
        for number in range(20):
            with scope(pair), seeded(number):
                losses.append(float(svi.step(x)))
        states.append((losses, pair.state_dict()))
    assert states[1][0] == pytest.approx(states[0][0], rel=1e-4)
    assert len(set(states[0][0])) == 20
    for name, value in states[0][1].items():
        torch.testing.assert_close(states[1][1][name], value, rtol=1e-4, atol=1e-4, msg=name)


class Mixed(nn.Module):
    """A mixture of two components, summed out; the latent is drawn directly or through a fold."""

    def __init__(self, folded):
        super().__init__()
        self.folded, self.slope = folded, nn.Parameter(torch.tensor(0.4))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            weights = torch.tensor([0.3, 0.7])
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            s = pyro.sample("s", dist.Gamma(2.0 + k, 1.0))
            pyro.sample("x", dist.Normal(s, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            if not self.folded:
                return pyro.sample("s", dist.LogNormal(self.slope * x, 0.5))
            u = pyro.sample("u", dist.Normal(self.slope * x, 0.5), infer=AUXILIARY)
            return pyro.sample("s", dist.Delta(u.exp(), -u))


@pytest.mark.thorough
def test_beside_a_latent_that_is_summed_out():
    x = torch.tensor([0.5, 1.5, 3.0])
    plain, pair = Mixed(False), Mixed(True)
    assert pv.check(pair, x).errors == ()
    settings = {"num_temperatures": 8, "num_chains": 4, "engine": "eager", "progress": False}
    for tool in (
        lambda pair: pv.evaluate(pair, x, num_samples=30).log_likelihood,
        lambda pair: pv.evaluate(pair, x, num_samples=30).elbo,
        lambda pair: pv.anneal(pair, x, **settings).value,
        lambda pair: pv.gaps(pair, x, steps=5, num_samples=30, progress=False).amortization.value,
        lambda pair: pv.encode(pair, x)["s"][0].item(),
        lambda pair: pv.predict(pair, x)[0, 0].item(),
    ):
        assert tool(pair) == pytest.approx(tool(plain), rel=1e-4)
