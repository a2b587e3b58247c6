"""A number that is not a bound on log p(x) is rejected or named correctly."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.pairs.guide import trace_guide
from pyro_vae.pairs.scope import using
from pyro_vae.pairs.sites import latents

NOISE = 0.2
MARK = {"is_auxiliary": True}


class Conjugate(nn.Module):
    """x ~ N(z, 0.2), z ~ N(0, 1): the posterior is N(25/26 x, 1/26)."""

    def __init__(self, kind="exact"):
        super().__init__()
        self.kind, self.slope = kind, nn.Parameter(torch.tensor(25 / 26))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if self.kind == "one of two":
                z = z + pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    def guide(self, x):
        loc, deviation = self.slope * x, 26**-0.5
        if self.kind == "outside the plate":
            pyro.sample("a", dist.Normal(0.0, 1.0), infer=MARK)
        with pyro.plate("data", len(x), dim=-1):
            match self.kind:
                case "mixed":  # q(z|x) is exact after a is integrated out
                    a = pyro.sample("a", dist.Normal(loc, 52**-0.5), infer=MARK)
                    return pyro.sample("z", dist.Normal(a, 52**-0.5))
                case "unused":
                    pyro.sample("a", dist.Normal(0 * loc, 100.0), infer=MARK)
                case "unmarked":
                    pyro.sample("a", dist.Normal(0 * loc, 100.0))
                case "not of it":
                    pyro.sample("a", dist.Normal(0 * loc, 1.0), infer=MARK)
                    return pyro.sample("z", dist.Delta(loc))
                case "a part of it":
                    fn = dist.Normal(torch.stack([loc, loc], -1), deviation).to_event(1)
                    a = pyro.sample("a", fn, infer=MARK)
                    return pyro.sample("z", dist.Delta(a[..., 0]))
                case "twice":
                    a = pyro.sample("a", dist.Normal(loc, deviation), infer=MARK)
                    return pyro.sample("z", dist.Delta(a * a))
                case "map":
                    return pyro.sample("z", dist.Delta(loc))
                case "map with a density":
                    return pyro.sample("z", dist.Delta(loc, log_density=5.0))
                case "one of two":
                    pyro.sample("w", dist.Delta(0 * loc))
                case "drawn by hand":  # for example a flow outside Pyro with a known density
                    q = torch.distributions.Normal(loc, deviation)
                    z = q.rsample()
                    return pyro.sample("z", dist.Delta(z, log_density=q.log_prob(z)))
            pyro.sample("z", dist.Normal(loc, deviation))

    def template(self, n):
        return (torch.zeros(n),)


def data(n=50):
    return torch.randn(n, generator=torch.Generator().manual_seed(0)) * 1.04**0.5


def joint(pair, x):
    """log p(x, z) at the mode."""
    z = pair.slope.detach() * x
    return (dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, NOISE).log_prob(x)).mean().item()


TOOLS = {
    "evaluate": lambda pair, x: pv.evaluate(pair, x, num_samples=30),
    "log_likelihood": lambda pair, x: pv.log_likelihood(pair, x, num_samples=30),
    "encode": lambda pair, x: pv.encode(pair, x),
    "reconstruct": lambda pair, x: pv.reconstruct(pair, x),
    "refine": lambda pair, x: pv.refine(pair, x, steps=2, progress=False),
    "gaps": lambda pair, x: pv.gaps(pair, x, steps=2, progress=False),
    "anneal": lambda pair, x: pv.anneal(pair, x, progress=False),
    "nuts": lambda pair, x: pv.nuts(pair, x[:1], progress=False),
    "calibration": lambda pair, x: pv.calibration(pair, progress=False),
    "kl_parts": lambda pair, x: pv.kl_parts(pair, x),
    "to_arviz": lambda pair, x: pv.to_arviz(pair, x, num_samples=2, progress=False),
    "fit": lambda pair, x: pv.fit(pair, x, epochs=1, batch_size=10, progress=False, engine="eager"),
}
AT_A_POINT = ("evaluate", "encode", "reconstruct", "fit")
"""Tools that work with a point estimate."""


@pytest.mark.parametrize("tool", [*TOOLS])
@pytest.mark.parametrize(
    "kind",
    ["mixed", "unused", "unmarked", "outside the plate", "not of it", "a part of it", "twice"],
)
def test_an_auxiliary_site_that_no_latent_is_made_of_is_refused(kind, tool):
    with pytest.raises(pv.UsageError, match=r"site 'a'|'z' in the guide has log_density") as told:
        TOOLS[tool](Conjugate(kind), data())
    assert "\n" not in str(told.value)
    assert pv.check(Conjugate(kind), data()).errors


@pytest.mark.parametrize(
    ("kind", "tool"),
    [
        (kind, tool)
        for kind in ("map", "map with a density", "one of two")
        for tool in TOOLS
        if tool not in AT_A_POINT and (kind, tool) != ("one of two", "kl_parts")
    ],
)
def test_importance_weights_of_a_point_estimate_are_refused(kind, tool):
    with pytest.raises(
        pv.UsageError, match=r"Delta|cannot split the KL of any latent site"
    ) as told:
        TOOLS[tool](Conjugate(kind), data())
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kind", ["map", "map with a density"])
def test_the_log_joint_at_a_point_is_named(kind):
    pair, x = Conjugate(kind), data()
    exact = dist.Normal(0.0, 1.04**0.5).log_prob(x).mean().item()
    found = pv.evaluate(pair, x)
    assert found.log_joint == pytest.approx(joint(pair, x), rel=1e-5)
    assert found.log_joint > exact + 0.5  # so it must not be reported as a bound
    assert found.point_estimates == ("z",)
    record = found.as_dict()
    assert record["elbo"] is record["log_likelihood"] is record["bits_per_dim"] is None
    assert "log p(x) ≥" not in str(found)
    assert "at a point estimate of z, not a bound" in str(found)
    assert found.kl_by_site == {}
    report = pv.check(pair, x)
    assert report.errors == ()
    assert "not a bound on log p(x)" in report.notes[0]
    told = pv.diagnose(pair, x, budget=3, progress=False)
    assert told.failed == {}
    assert "log p(x) or a bound on it: the guide of 'z' is a Delta" in told.summary
    assert "log p(x) =" not in told.summary


def test_map_is_fitted_to_the_mode():
    pair, x = Conjugate("map"), data(40)
    with torch.no_grad():
        pair.slope.fill_(0.5)
    history = pv.fit(pair, x, epochs=200, batch_size=40, learning_rate=0.05, progress=False)
    assert pair.slope.item() == pytest.approx(25 / 26, abs=1e-3)
    assert history["elbo"][-1] == pytest.approx(joint(pair, x), abs=1e-3)
    assert history.point_estimates == ("z",)
    assert history.collapsed == ()


def test_a_draw_by_hand_with_its_density_is_a_draw():
    pair, x = Conjugate("drawn by hand"), data()
    exact = dist.Normal(0.0, 1.04**0.5).log_prob(x).mean().item()
    found = pv.evaluate(pair, x, num_samples=30)
    assert found.log_likelihood == pytest.approx(exact, abs=1e-4)
    assert found.elbo == pytest.approx(exact, abs=1e-4)
    with pytest.raises(pv.UsageError, match="known only at its draws"):
        pv.anneal(pair, x, progress=False)


class Category(nn.Module):
    """k in {0, 1}. The guide takes the more probable value: a bound, but weights miss one value."""

    def __init__(self, density=0.0):
        super().__init__()
        self.density, self.level = density, nn.Parameter(torch.tensor(0.5))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Bernoulli(0.5 * torch.ones(())))
            pyro.sample("x", dist.Normal(k * self.level, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("k", dist.Delta((x > 0.25).float(), log_density=self.density))

    def template(self, n):
        return (torch.zeros(n),)


def test_a_delta_of_a_discrete_latent_bounds_log_p_but_its_weights_are_unreliable():
    pair, x = Category(), data()
    both = torch.stack([dist.Normal(level, 1.0).log_prob(x) for level in (0.0, 0.5)])
    found = pv.log_likelihood(pair, x, num_samples=50)
    torch.testing.assert_close(found.per_datum.float(), both.max(0).values - 2 * 0.6931472 / 2)
    assert (found.per_datum < both.logsumexp(0) - 0.6931472).all()
    assert (found.pareto_k == torch.inf).all()
    with pytest.raises(pv.UsageError, match="discrete Delta is 0: remove log_density"):
        pv.evaluate(Category(3.0), x)


class GlobalPoint(nn.Module):
    """A point estimate of a global latent. Bounds on log p(x) hold conditional on it."""

    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(0.7))

    def model(self, x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w + z, NOISE), obs=x)

    def guide(self, x):
        w = pyro.sample("w", dist.Delta(self.at))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal((x - w) * 25 / 26, 26**-0.5))

    def template(self, n):
        return (torch.zeros(n),)


def test_a_global_point_estimate_is_given():
    pair, x = GlobalPoint(), data()
    exact = dist.Normal(0.7, 1.04**0.5).log_prob(x).mean().item()
    found = pv.evaluate(pair, x, num_samples=30)
    assert found.log_likelihood == pytest.approx(exact, abs=1e-4)
    assert found.elbo == pytest.approx(exact, abs=1e-4)
    assert "a point estimate of w" in str(found)
    assert found.log_joint is None
    for refused in (pv.to_arviz, pv.uncertainty):
        with pytest.raises(pv.UsageError, match=r"guide of .*'w' is a Delta, a point estimate"):
            refused(pair, x, progress=False)


def test_a_guide_that_changes_is_looked_at_again():
    pair, x = Conjugate("exact"), data()
    assert pv.evaluate(pair, x, num_samples=5).log_joint is None
    pair.kind = "map"
    assert pv.evaluate(pair, x, num_samples=5).elbo != pv.evaluate(pair, x).elbo  # NaN
    pair.kind = "unused"
    with pytest.raises(pv.UsageError, match="site 'a' of the guide is missing from the model"):
        pv.encode(pair, x)
    pair.kind = "exact"
    with using(pair, 0):
        assert list(latents(trace_guide(pair, (x,)))) == ["z"]
