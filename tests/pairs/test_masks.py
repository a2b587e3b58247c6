"""Masks: right where model and guide agree on them, and told in one line where they do not."""

from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import figures as diagnostic_figures
from pyro_vae.models.exact import linear_gaussian
from pyro_vae.plots import pictures
from pyro_vae.training.collapse import CollapseAlarm, is_negative, units
from pyro_vae.training.history import Epoch

WIDTH, LATENT = 6, 2


def holes(n, share=0.4, seed=0):
    """Rows of the linear-Gaussian pair and which of their entries are seen; the first row whole,
    the last without any."""
    pair, generator = linear_gaussian(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    x = pair.marginal().sample((n,)).detach()
    seen = torch.rand(n, WIDTH, generator=generator) > share
    seen[0], seen[-1] = True, False
    return torch.where(seen, x, torch.zeros(())), seen


class Holes(nn.Module):
    """x | z ~ N(W z + b, s^2 I) of which some entries are seen; its guide is exact, widened."""

    def __init__(self, spread=1.2):
        super().__init__()
        self.exact, self.spread = linear_gaussian(), spread

    def posterior(self, x, seen):
        """The mean and covariance of each row's z given what is seen."""
        w, s = self.exact.weight, self.exact.noise
        precision = torch.einsum("nj,ja,jb->nab", seen.double(), w, w) / s**2
        covariance = torch.linalg.inv(precision + torch.eye(LATENT).double())
        off = torch.where(seen, x - self.exact.bias, 0.0)
        return torch.einsum("nab,jb,nj->na", covariance, w, off) / s**2, covariance

    def log_p(self, x, seen):
        """log p of what is seen of each row, (n,)."""
        whole, found = self.exact.marginal(), []
        for row, m in zip(x, seen, strict=True):
            part = dist.MultivariateNormal(whole.loc[m], whole.covariance_matrix[m][:, m])
            found.append(part.log_prob(row[m]) if m.any() else torch.zeros(()).double())
        return torch.stack(found).detach()

    def likelihood(self, z):
        return dist.Normal(z @ self.exact.weight.T + self.exact.bias, self.exact.noise)

    def prior(self, x):
        return dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1)

    def model(self, x, seen):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", self.likelihood(z).mask(seen).to_event(1), obs=x)

    def guide(self, x, seen):
        loc, covariance = self.posterior(x, seen)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, self.spread**2 * covariance))

    def template(self, n):
        return torch.zeros(n, WIDTH).double(), torch.ones(n, WIDTH, dtype=torch.bool)


class Imputed(nn.Module):
    """z ~ N(0, 1), x | z ~ N(z, 1), seen in some rows, by obs_mask; the guide has the rest."""

    def __init__(self, masked=True):
        super().__init__()
        self.masked, self.shift = masked, nn.Parameter(torch.zeros(()).double())

    def model(self, x, seen):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + self.shift, 1.0), obs=x, obs_mask=seen)

    def guide(self, x, seen):
        with pyro.plate("data", len(x), dim=-1):
            q = dist.Normal(0.5 * x * seen, torch.where(seen, 0.5**0.5, 1.0))
            z = pyro.sample("z", q)
            self.impute(z, seen)

    def impute(self, z, seen):
        with poutine.mask(mask=~seen if self.masked else True):
            pyro.sample("x_unobserved", dist.Normal(z + self.shift + 0.3, 1.1))

    def log_p(self, x, seen):
        return torch.where(seen, dist.Normal(0.0, 2**0.5).log_prob(x), 0.0)

    def template(self, n):
        return torch.zeros(n).double(), torch.ones(n, dtype=torch.bool)


class Without(Imputed):
    def impute(self, z, seen):
        pass


def imputed_rows(n=40):
    torch.manual_seed(3)
    seen = torch.rand(n) > 0.4
    seen[:3] = True  # the first rows do not give it away
    return torch.randn(n).double() * 2**0.5 * seen, seen


TOOLS = {
    "fit": lambda pair, *rows: pv.fit(pair, *rows, epochs=1, batch_size=10, progress=False),
    "evaluate": lambda pair, *rows: pv.evaluate(pair, *rows, num_samples=10),
    "log_likelihood": lambda pair, *rows: pv.log_likelihood(pair, *rows, num_samples=10),
    "kl_parts": pv.kl_parts,
    "refine": lambda pair, *rows: pv.refine(pair, *rows, steps=2, progress=False),
    "gaps": lambda pair, *rows: pv.gaps(pair, *rows, progress=False),
    "anneal": lambda pair, *rows: pv.anneal(pair, *rows, num_temperatures=3, progress=False),
    "nuts": lambda pair, *rows: pv.nuts(pair, *rows, num_draws=4, warmup=4, progress=False),
    "to_arviz": lambda pair, *rows: pv.to_arviz(pair, *rows, num_samples=3, progress=False),
    "predictive_check": lambda pair, *rows: pv.predictive_check(pair, *rows, progress=False),
    "outlier_scores": lambda pair, *rows: pv.outlier_scores(pair, *rows, progress=False),
    "diagnose": lambda pair, *rows: pv.diagnose(pair, *rows, budget=0.1, progress=False),
    "calibration": lambda pair, *rows: pv.calibration(pair, rows[1:], progress=False),
    "sandwich": lambda pair, *rows: pv.sandwich(pair, 40, rows[1:], progress=False),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_an_unmasked_guide_of_obs_mask_is_refused_in_words(tool):
    x, seen = imputed_rows()
    words = "site 'x_unobserved' differ.*obs_mask at site 'x'.*poutine.mask\\(mask=~obs_mask\\)"
    with pytest.raises(pv.UsageError, match=words) as caught:
        TOOLS[tool](Imputed(masked=False), x, seen)
    assert "\n" not in str(caught.value)
    with pytest.raises(pv.UsageError, match="obs_mask at site 'x' makes a latent site"):
        TOOLS[tool](Without(), x, seen)


def test_check_says_the_same():
    batch = imputed_rows()
    assert not pv.check(Imputed(), batch).errors
    assert "obs_mask at site 'x' masks it" in pv.check(Imputed(masked=False), batch).errors[0]
    assert "makes a latent site 'x_unobserved'" in pv.check(Without(), batch).errors[0]


def test_obs_mask_with_its_guide_gives_log_p_of_what_is_seen():
    pair, (x, seen) = Imputed(), imputed_rows()
    wanted = pair.log_p(x, seen)
    found = pv.log_likelihood(pair, x, seen, num_samples=4000)
    assert bool(((found.per_datum - wanted).abs() < 5 * found.standard_errors + 1e-6).all())
    annealed = pv.anneal(pair, x, seen, num_temperatures=20, num_chains=30, progress=False)
    assert annealed.value == pytest.approx(wanted.mean().item(), abs=0.05)
    x, seen = imputed_rows(1000)
    kl = pv.evaluate(pair, x, seen, num_samples=1).kl_by_site["x_unobserved"]
    own = torch.distributions.kl_divergence(dist.Normal(0.3, 1.1), dist.Normal(0.0, 1.0)).item()
    assert kl == pytest.approx(own * (~seen).double().mean().item(), abs=0.015)


class Latent(nn.Module):
    """Two latents z ~ N(0, 1), each seen through its own x ~ N(z, 1), and any masks around z."""

    def __init__(self, model_mask=None, guide_mask=None, x_masked=True, events=False):
        super().__init__()
        self.masks, self.x_masked, self.events = (model_mask, guide_mask), x_masked, events
        self.shift = nn.Parameter(torch.zeros(()).double())

    def latent(self, which, fn, live):
        """z under its mask: as an event of elements that are masked, or as a masked row."""
        mask = self.masks[which]
        if mask is None:
            return pyro.sample("z", fn.to_event(1))
        mask = mask(live)
        if self.events:
            return pyro.sample("z", fn.mask(mask).to_event(1))
        with poutine.mask(mask=mask):
            return pyro.sample("z", fn.to_event(1))

    def model(self, x, live):
        with pyro.plate("data", len(x), dim=-1):
            z = self.latent(0, dist.Normal(torch.zeros_like(x), 1.0), live)
            q = dist.Normal(z + self.shift, 1.0)
            pyro.sample("x", q.mask(live if self.x_masked else True).to_event(1), obs=x)

    def guide(self, x, live):
        with pyro.plate("data", len(x), dim=-1):
            self.latent(1, dist.Normal(0.5 * x + 0.2, 0.8).expand(x.shape), live)

    def log_p(self, x, live):
        return (dist.Normal(0.0, 2**0.5).log_prob(x) * live).sum(-1)

    def kl(self, live):
        """The KL of each unit, where the mean of x is 0."""
        return live.double()

    def template(self, n):
        return torch.zeros(n, 2).double(), torch.ones(n, 2, dtype=torch.bool)


def ragged(n=30):
    """Two steps for most rows, one for some, the last without any."""
    torch.manual_seed(5)
    live = torch.tensor([[True, True], [True, False]])[torch.arange(n) % 3 // 2]
    live[-1] = False
    return torch.randn(n, 2).double() * 2**0.5, live


def whole(live):
    return live[:, 0]


def same(live):
    return live


DISAGREE = {
    "model alone, by element": (same, None, True),
    "guide alone, by element": (None, same, True),
    "model alone, by row": (whole, None, False),
    "guide alone, by row": (None, whole, False),
    "all and by row": (lambda live: False, whole, False),
    "False and nothing": (lambda live: False, None, False),
    "by row and by element": (lambda live: live[:, :1].expand(-1, 2), same, True),
}


@pytest.mark.parametrize("kind", DISAGREE)
def test_masks_of_a_latent_that_differ_are_refused(kind):
    ours, theirs, events = DISAGREE[kind]
    pair, rows = Latent(ours, theirs, events=events), ragged()
    words = "the masks of latent site 'z' differ.*put it under the same pyro.poutine.mask"
    with pytest.raises(pv.UsageError, match=words):
        pv.log_likelihood(pair, *rows, num_samples=5)
    with pytest.raises(pv.UsageError, match=words):
        pv.fit(pair, *rows, epochs=1, batch_size=10, progress=False)
    assert "differ: " in pv.check(pair, rows).errors[0]


@pytest.mark.parametrize("ours", [lambda live: True, lambda live: torch.ones(()) > 0])
def test_a_mask_that_hides_nothing_agrees_with_none(ours):
    rows = ragged()
    assert not pv.check(Latent(ours, None), rows).errors
    found = pv.log_likelihood(Latent(ours, None), *rows, num_samples=2000)
    wanted = Latent().log_p(*rows)
    assert bool(((found.per_datum - wanted).abs() < 5 * found.standard_errors + 1e-9).all())


def test_what_counts_must_not_depend_on_what_a_mask_hides():
    """z has no prior where it is hidden; today the weights have the mean E_q[p(x | z)]."""
    pair, rows = Latent(same, same, x_masked=False, events=True), ragged()
    words = "site 'x' of the model depends on numbers of latent site 'z' that a mask hides"
    with pytest.raises(pv.UsageError, match=words):
        pv.log_likelihood(pair, *rows, num_samples=5)
    assert "that a mask hides" in pv.check(pair, rows).errors[0]


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_padded_latents_count_for_nothing(engine):
    pair, (x, live) = Latent(same, same, events=True), ragged()
    assert not pv.check(pair, (x, live)).errors
    found = pv.log_likelihood(pair, x, live, num_samples=2000, engine=engine)
    wanted = pair.log_p(x, live)
    assert bool(((found.per_datum - wanted).abs() < 5 * found.standard_errors + 1e-9).all())
    assert found.per_datum[-1] == 0  # nothing of the last row is seen
    result = pv.evaluate(pair, x, live, num_samples=1)
    q = dist.Normal(0.5 * x + 0.2, 0.8)
    kl = torch.distributions.kl_divergence(q, dist.Normal(torch.zeros_like(x), 1.0))
    torch.testing.assert_close(result.kl_by_unit["z"], (kl * live).mean(0).tolist())


@pytest.mark.parametrize("mask", [False, True])
def test_boolean_masks_within_a_distribution(mask):
    """Pyro gives the number 0.0, no tensor, for the KL of what is masked whole."""
    pair, (x, live) = Latent(lambda live: mask, lambda live: mask, events=True), ragged()
    live = live & mask
    found = pv.evaluate(pair, x, live, num_samples=500)
    assert found.log_likelihood == pytest.approx(pair.log_p(x, live).mean().item(), abs=0.05)
    assert sum(found.kl_by_unit["z"]) == pytest.approx(found.kl_by_site["z"], abs=0.1)
    assert mask or found.kl_by_unit["z"] == [0, 0]


@pytest.mark.parametrize(
    "objective",
    [
        pyro.infer.TraceMeanField_ELBO(),
        pv.ImportanceWeightedELBO(1),
        pv.ImportanceWeightedELBO(1, gradient=pv.Gradient.DOUBLY_REPARAMETRIZED),
        pv.StickingTheLandingELBO(),
        pv.FreeBitsELBO(0.0),
    ],
)
def test_gradients_of_objectives_leave_padding_out(objective):
    """What is in the padding of x has no part in a loss."""
    pair, (x, live) = Latent(same, same, events=True), ragged()
    torch.manual_seed(0)
    loss = objective.differentiable_loss(pair.model, pair.guide, x, live)
    padded = torch.where(live, x, 1e3)
    torch.manual_seed(0)
    again = objective.differentiable_loss(pair.model, pair.guide, padded, live)
    torch.testing.assert_close(loss, again)


def test_weights_are_each_datums_own():
    """The bound of many samples is log p of each row's own entries, summed."""
    pair, (x, live) = Latent(same, same, events=True), ragged()
    torch.manual_seed(0)
    loss = pv.ImportanceWeightedELBO(5000).differentiable_loss(pair.model, pair.guide, x, live)
    assert -loss.item() == pytest.approx(pair.log_p(x, live).sum().item(), abs=0.5)


def test_free_bits_floor_counts_what_is_live():
    pair, (x, live) = Latent(same, same, events=True), ragged()
    floors = {}
    for floor in (100.0, 200.0):
        torch.manual_seed(0)
        objective = pv.FreeBitsELBO(floor)
        floors[floor] = objective.differentiable_loss(pair.model, pair.guide, x, live).item()
    assert floors[200.0] - floors[100.0] == pytest.approx(100 * live.sum().item())


class Scaled(Latent):
    """A weight on the KL that only the model, or the guide too, has."""

    def __init__(self, ours, theirs):
        super().__init__()
        self.scales = ours, theirs

    def latent(self, which, fn, live):
        with poutine.scale(scale=self.scales[which]):
            return super().latent(which, fn, live)


def test_scales_of_a_latent_must_agree():
    rows = ragged()
    assert not pv.check(Scaled(0.5, 0.5), rows).errors
    words = "latent site 'z' is scaled by 0.5 in the model and by 1 in the guide"
    assert words in pv.check(Scaled(0.5, 1.0), rows).errors[0]
    with pytest.raises(pv.UsageError, match=words):
        pv.fit(Scaled(0.5, 1.0), *rows, epochs=1, batch_size=10, progress=False)
    # Densities leave scales out, and so are right all the same.
    found = pv.log_likelihood(Scaled(0.5, 1.0), *rows, num_samples=2000)
    assert found.value == pytest.approx(Latent().log_p(*rows).mean().item(), abs=0.02)


def test_holes_give_log_p_of_what_is_seen():
    pair, (x, seen) = Holes(), holes(60)
    assert not pv.check(pair, (x, seen)).errors
    result = pv.log_likelihood(pair, x, seen, num_samples=2000)
    wanted = pair.log_p(x, seen)
    assert bool(((result.per_datum - wanted).abs() < 5 * result.standard_errors + 1e-9).all())
    found = pv.evaluate(pair, torch.where(seen, x, 99.0), seen, num_samples=500)
    assert found.log_likelihood == pytest.approx(wanted.mean().item(), abs=0.02)


def test_a_right_model_is_not_called_wrong_by_what_is_masked():
    """Today zeros in the holes of the data are compared with draws: p < 0.02 everywhere."""
    pair, (x, seen) = Holes(spread=1.0), holes(300)
    found = pv.predictive_check(pair, x, seen, num_replicates=200, progress=False)
    assert all(0.05 < p < 0.95 for p in found.whole_p_values.values())
    part = torch.where(seen, x, torch.nan)
    wanted = part.nanmean(1), (part - part.nanmean(1, keepdim=True)).square().nanmean(1)
    torch.testing.assert_close(found.observed[:, :2], torch.stack(wanted, 1), equal_nan=True)
    greatest = torch.where(seen, x, -torch.inf).amax(1)[:-1]
    torch.testing.assert_close(found.observed[:-1, 2], greatest)
    assert found.observed[-1].isnan().all()  # nothing of it is seen
    assert found.p_values[-1].isnan().all()
    assert len(found.observed) - 1 not in found.worst(number=299).tolist()
    filled = torch.where(seen, x, 1e4)
    same = pv.predictive_check(pair, filled, seen, num_replicates=200, progress=False)
    torch.testing.assert_close(same.observed, found.observed, equal_nan=True)


def test_a_wrong_model_is_still_called_wrong_through_the_mask():
    pair, (x, seen) = Holes(spread=1.0), holes(300)
    p = pv.predictive_check(pair, 2 * x, seen, num_replicates=100, progress=False).whole_p_values
    assert p["variance"] < 0.01


def test_a_statistic_of_ones_own_must_leave_nan_out():
    pair, (x, seen) = Holes(), holes(30)
    words = "statistic 'total' is not a number for a datum that has masked entries, which are NaN"
    with pytest.raises(pv.UsageError, match=words):
        pv.predictive_check(pair, x, seen, statistics={"total": lambda x: x.sum(1)})
    own = {"total": lambda x: x.nansum(1)}
    found = pv.predictive_check(pair, x, seen, statistics=own, progress=False)
    torch.testing.assert_close(found.observed[:-1, 0], torch.where(seen, x, 0.0).sum(1)[:-1])


class Pixels(nn.Module):
    """Bits with p = 1/2, independent of z, some of them missing."""

    def __init__(self, around):
        super().__init__()
        self.around, self.logit = around, nn.Parameter(torch.zeros(()))

    def model(self, x, seen):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            p = dist.Bernoulli(logits=self.logit.expand(x.shape))
            if self.around:  # whole rows
                with poutine.mask(mask=seen[:, 0]):
                    pyro.sample("x", p.to_event(1), obs=x)
            else:
                pyro.sample("x", p.mask(seen).to_event(1), obs=x)

    def guide(self, x, seen):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))


@pytest.mark.parametrize("around", [False, True])
def test_bits_per_dimension_count_what_is_seen(around):
    """Each bit that is seen takes one bit."""
    x, seen = torch.ones(10, 4), torch.rand(10, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    assert pv.evaluate(Pixels(around), x, seen, num_samples=2).bits_per_dim == pytest.approx(1.0)
    nothing = pv.evaluate(Pixels(around), x, seen & False, num_samples=2)
    assert nothing.bits_per_dim is None


def test_units_are_active_where_they_count():
    """What a mask hides of a latent is no code: its mean follows x, and is arbitrary."""
    pair, (x, live) = Latent(same, same, events=True), ragged()
    live = live & torch.tensor([True, False])
    assert pv.evaluate(pair, x, live, num_samples=2).active_units == {"z": 1}


def test_arviz_gets_nan_for_what_is_masked():
    pytest.importorskip("arviz")
    pair, (x, live) = Latent(same, same, events=True), ragged()
    x = torch.where(live, x, 7.0)
    settings = {"num_samples": 20, "progress": False, "new_latents": False}
    data = pv.to_arviz(pair, x, live, **settings)
    assert not (data.observed_data["x"].values == 7).any()
    hidden = ~live.expand(20, *live.shape).numpy()
    for group in ("posterior", "posterior_predictive"):
        (name,) = data[group].data_vars
        found = torch.as_tensor(data[group][name].values[0])
        assert torch.equal(found.isnan(), torch.as_tensor(hidden))
    # Neither does what is hidden reach what is drawn.
    (name,) = data.log_likelihood.data_vars
    mean = data.log_likelihood[name].values[0].mean(0)
    torch.testing.assert_close(torch.as_tensor(mean), pair.log_p(x, live), atol=0.15, rtol=0.1)
    with pytest.raises(pv.UsageError, match="entries that the model masks are NaN"):
        pv.to_arviz(pair, x, live, statistics={"total": lambda x: x.sum(1)}, **settings)


def test_nuts_leaves_out_what_cannot_move():
    pair, (x, live) = Latent(same, same, events=True), ragged(4)
    x, live = x[-2:], live[-2:]
    live[0] = torch.tensor([True, False])
    found = pv.nuts(pair, x, live, num_draws=80, warmup=60, num_chains=2, progress=False)
    assert torch.equal(found.r_hat.isnan(), ~live)
    for measured in (found.shift, found.scale_ratio, found.disagreement, found.moments.mean):
        assert torch.equal(measured.isnan(), ~live)
    error = 5 * found.mean_standard_error[0, 0].item()
    assert found.moments.mean[0, 0].item() == pytest.approx(x[0, 0].item() / 2, abs=error)
    summary = found.as_dict()
    assert summary["mean_scale_ratio"] == pytest.approx(0.8 * 2**0.5, rel=0.2)
    assert summary["greatest_r_hat"] < 1.1


def test_annealing_through_masks_gives_log_p():
    pair, (x, live) = Latent(same, same, events=True), ragged()
    found = pv.anneal(pair, x, live, num_temperatures=30, num_chains=30, progress=False)
    torch.testing.assert_close(found.per_datum, pair.log_p(x, live), atol=0.2, rtol=0)
    both = pv.sandwich(pair, 30, (live,), num_temperatures=30, num_chains=30, progress=False)
    assert both.gap == pytest.approx(0, abs=0.1)


class Rates(nn.Module):
    """Two rates of counts on (0, infinity), the second hidden: no Jacobian of it counts."""

    def __init__(self):
        super().__init__()
        self.shape = nn.Parameter(torch.full((), 2.0).double())

    def model(self, x, live):
        with pyro.plate("data", len(x), dim=-1):
            fn = dist.Gamma(self.shape.expand(x.shape), 1.0).mask(live).to_event(1)
            rate = pyro.sample("rate", fn)
            pyro.sample("x", dist.Poisson(rate).mask(live).to_event(1), obs=x)

    def guide(self, x, live):
        with pyro.plate("data", len(x), dim=-1):
            fn = dist.Gamma(self.shape + x, torch.full_like(x, 1.6)).mask(live).to_event(1)
            pyro.sample("rate", fn)


def test_no_jacobian_of_what_is_hidden_counts():
    live = torch.tensor([[True, False], [True, True]])
    x = torch.tensor([[3.0, 0.0], [1.0, 2.0]]).double()
    found = pv.nuts(Rates(), x, live, num_draws=60, warmup=60, num_chains=2, progress=False)
    assert torch.equal(found.moments.mean.isnan(), ~live)
    wanted = (2 + x) / 2
    off = ((found.moments.mean - wanted) / found.mean_standard_error)[live]
    assert bool((off.abs() < 5).all())
    annealed = pv.anneal(Rates(), x, live, num_temperatures=30, num_chains=50, progress=False)
    by_unit = dist.GammaPoisson(torch.full_like(x, 2.0), 1.0).log_prob(x) * live
    torch.testing.assert_close(annealed.per_datum, by_unit.sum(1), atol=0.05, rtol=0)


class Arbitrary(Latent):
    """The exact guide where z counts, and far off where a mask hides it, as it may be."""

    def guide(self, x, live):
        with pyro.plate("data", len(x), dim=-1):
            loc = torch.where(live, 0.5 * x, 9.0)
            self.latent(1, dist.Normal(loc, 0.5**0.5), live)


def test_calibration_ranks_what_counts():
    live = torch.tensor([[True, True], [True, False], [True, True]])
    pair, settings = Arbitrary(same, same, events=True), {"num_draws": 19, "progress": False}
    found = pv.calibration(pair, (live,), num_simulations=400, **settings)
    assert found.calibrated
    assert found.names[:2] == ("z[0]", "z[1]")
    assert (found.counts[1] / 400).item() == pytest.approx(2 / 3, abs=0.1)
    assert bool(((found.coverage - torch.tensor([0.5, 0.8, 0.9, 0.95])).abs() < 0.12).all())
    hidden = pv.calibration(pair, (live & torch.tensor([1, 0]).bool(),), **settings)
    assert hidden.left_out == {"z[1]": "a mask hides it in all but 0 simulations"}
    assert hidden.names[0] == "z[0]"
    wrong = Latent(same, same, events=True)  # off by 0.2, where it counts
    assert {"z[0]", "z[1]"} <= pv.calibration(wrong, (live,), **settings).failures.keys()


def epochs(kl):
    return [Epoch(i + 1, 0, 0, 0, {"z": k}, None, 1.0, 0, 0, 0) for i, k in enumerate(kl)]


def alarm(kl, draws, are_kl=True):
    """The alarm for a site of three units after epochs of this KL, and what it said."""
    found = CollapseAlarm({"z": 3}, 20, 100, draws, are_kl)
    heard = [epoch.epoch for epoch in epochs(kl) if found.heard(epoch)]
    return found, heard


def test_a_negative_kl_is_an_inconsistency_and_no_collapse():
    found, heard = alarm([-0.1] * 20, 1000)
    assert (found.collapsed, found.inconsistent, heard) == ((), ("z",), [5])
    assert found.words("z").startswith("the KL of latent site 'z' has been negative for 20 epochs")
    assert "model and guide disagree" in found.words("z")
    # What Monte Carlo error explains is a collapse; a term that is no KL may be negative.
    found, heard = alarm([-0.007] * 20, 1000)
    assert (found.collapsed, found.inconsistent, heard) == (("z",), (), [10])
    assert "has collapsed" in found.words("z")
    found, heard = alarm([-0.1] * 20, 1000, are_kl=False)
    assert (found.collapsed, found.inconsistent, heard) == ((), (), [])


def test_the_error_of_a_collapsed_kl_is_within_what_is_allowed():
    """Of q = N(m, 1) and p = N(0, 1), for the worst m: estimates are N(k, 2k) with k = m^2 / 2."""
    n, generator = 100, torch.Generator().manual_seed(0)
    k = 8 / n
    means = k + (2 * k / n) ** 0.5 * torch.randn(100_000, generator=generator)
    share = sum(is_negative(value, n) for value in means.tolist()) / 100_000
    assert 0 < share < 1e-4  # four standard errors, on one side: 3e-5
    assert is_negative(-8.1 / n, n)


class Factored(nn.Module):
    """The guide's density of z is 1/e of one that integrates to 1: the KL is -1 too low."""

    def __init__(self, off):
        super().__init__()
        self.off, self.loc = off, nn.Parameter(torch.zeros(()).double())

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(self.loc, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", Unnormalized(x.new_zeros(len(x)), 1.0, self.off))


class Unnormalized(dist.Normal):
    arg_constraints: ClassVar = {}

    def __init__(self, loc, scale, off):
        self.off = off
        super().__init__(loc, scale, validate_args=False)

    def expand(self, shape, _instance=None):
        return Unnormalized(self.loc.expand(shape), 1.0, self.off)

    def log_prob(self, value):
        return super().log_prob(value) - self.off


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_fit_and_diagnose_tell_the_two_apart(off):
    x = torch.randn(60, generator=torch.Generator().manual_seed(0)).double()
    settings = {"epochs": 20, "batch_size": 10, "engine": "eager", "progress": False}
    words = "has been negative for .* model and guide disagree" if off else "has collapsed"
    with pytest.warns(UserWarning, match=words):
        history = pv.fit(Factored(off), x, **settings)
    assert history.inconsistent == (("z",) if off else ())
    assert history.collapsed == (() if off else ("z",))
    summary = pv.diagnose(Factored(off), x, budget=3, progress=False).summary
    assert ("model and guide disagree" in summary) == bool(off)
    assert ("'z' has collapsed" in summary) == (not off)


def test_padding_is_no_collapse():
    """A latent that counts for one row in fifty has little KL per example, and is used."""
    live = (torch.arange(500) % 50 == 0)[:, None] & torch.ones(2, dtype=torch.bool)
    pair = Latent(same, same, events=True)
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)).double() * 2**0.5
    assert units(pair, (x, live)) == {"z": 0.04}
    result = pv.evaluate(pair, x, live, num_samples=1)
    assert result.kl_by_site["z"] < 0.02  # the threshold without the mask
    found = CollapseAlarm(units(pair, (x, live)), 20, 100, 500)
    assert not any(found.heard(epoch) for epoch in epochs([result.kl_by_site["z"]] * 20))


class Visits(nn.Module):
    """u ~ N(0, 1) of a patient, z | u ~ N(u, 1) and x | z ~ N(z, 1) of each visit, some of which
    are masked in a plate within the datum; its guide is the exact posterior."""

    def __init__(self, inside=True):
        super().__init__()
        self.inside, self.shift = inside, nn.Parameter(torch.zeros(()).double())

    def visits(self, live):
        plate = pyro.plate("visits", live.shape[1], dim=-2)
        return plate, poutine.mask(mask=live.T)

    def model(self, x, live):
        with pyro.plate("data", len(x), dim=-1):
            u = pyro.sample("u", dist.Normal(x.new_zeros(()), 1.0))
            plate, mask = self.visits(live)
            with plate, mask:
                z = pyro.sample("z", dist.Normal(u, 1.0))
                pyro.sample("x", dist.Normal(z + self.shift, 1.0), obs=x.T)

    def guide(self, x, live):
        with pyro.plate("data", len(x), dim=-1):
            n = live.sum(1)
            u = pyro.sample("u", dist.Normal((x * live).sum(1) / (n + 2), (2 / (n + 2.0)).sqrt()))
            plate, mask = self.visits(live)
            with plate, mask if self.inside else poutine.mask(mask=True):
                pyro.sample("z", dist.Normal((x.T + u) / 2, 0.5**0.5))


def test_masks_of_a_plate_within_a_datum():
    x, live = ragged()
    found = pv.log_likelihood(Visits(), x, live, num_samples=50)
    for value, row, m in zip(found.per_datum, x, live, strict=True):
        k = int(m.sum())
        cov = torch.ones(k, k).double() + 2 * torch.eye(k).double()
        exact = dist.MultivariateNormal(torch.zeros(k).double(), cov).log_prob(row[m]) if k else 0.0
        assert value.item() == pytest.approx(float(exact), abs=1e-6)
    check = pv.predictive_check(Visits(), x, live, num_replicates=50, progress=False)
    part = torch.where(live, x, torch.nan)
    torch.testing.assert_close(check.observed[:, 0], part.nanmean(1), equal_nan=True)
    with pytest.raises(pv.UsageError, match="masks of latent site 'z' differ"):
        pv.log_likelihood(Visits(inside=False), x, live, num_samples=50)


class Classes(nn.Module):
    """A class k, summed out, gives x ~ N(2 k, 1); rows that are masked say nothing of it."""

    def __init__(self, by_guide):
        super().__init__()
        self.by_guide, self.logits = by_guide, nn.Parameter(torch.tensor([0.3, -0.2]).double())

    def sampled(self, seen, logits):
        with poutine.mask(mask=seen):
            fn = dist.Categorical(logits=logits)
            return pyro.sample("k", fn, infer={"enumerate": "parallel"})

    def model(self, x, seen):
        with pyro.plate("data", len(x), dim=-1):
            k = self.sampled(seen, self.logits)
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=x)

    def guide(self, x, seen):
        with pyro.plate("data", len(x), dim=-1):
            if self.by_guide:
                self.sampled(seen, torch.stack([x * 0, x], -1))


@pytest.mark.parametrize("by_guide", [True, False])
def test_masks_with_enumeration(by_guide):
    x, seen = imputed_rows()
    pair = Classes(by_guide)
    found = pv.log_likelihood(pair, x, seen, num_samples=1).per_datum
    each = dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(x[:, None])
    exact = (each + pair.logits.detach().log_softmax(0)).logsumexp(1)
    torch.testing.assert_close(found, torch.where(seen, exact, 0.0))


def test_tools_serve_obs_mask():
    """The observed part is what is checked, the rest is NaN."""
    pair, (x, seen) = Imputed(), imputed_rows(200)
    found = pv.predictive_check(pair, x, seen, num_replicates=50, progress=False)
    assert torch.equal(found.observed[:, 0].isnan(), ~seen)
    torch.testing.assert_close(found.observed[seen, 0], x[seen])
    assert 0.02 < found.whole_p_values["mean"] < 0.98
    assert torch.equal(pv.inference.hidden(pair, x, seen), ~seen)
    pytest.importorskip("arviz")
    data = pv.to_arviz(pair, x[:9], seen[:9], num_samples=5, progress=False)
    kept = torch.as_tensor(data.observed_data["x_observed"].values)
    torch.testing.assert_close(kept, torch.where(seen, x, torch.nan)[:9], equal_nan=True)
    imputed = torch.as_tensor(data.posterior["x_unobserved"].values[0])
    assert torch.equal(imputed.isnan(), seen[:9].expand(5, 9))


def test_figures_show_what_is_seen():
    pair, (x, seen) = Holes(), holes(12)
    figure = pictures.reconstructions(pair, x, (seen,))
    for i, axis in enumerate(figure.axes[:12]):
        shown = torch.as_tensor(axis.lines[0].get_ydata())
        wanted = torch.where(seen[i], x[i].float(), torch.nan)
        torch.testing.assert_close(shown, wanted, equal_nan=True)
    found = pv.predictive_check(pair, x, seen, num_replicates=20, progress=False)
    figure = diagnostic_figures.predictive_worst(pair, found, x, seen, number=2, replicates=3)
    first = found.worst(number=2)[0]
    for axis in figure.axes[:4]:
        assert torch.equal(torch.as_tensor(axis.lines[0].get_ydata()).isnan(), ~seen[first])
    diagnostic_figures.predictive_statistics(found)


def test_the_refined_bound_is_log_p_of_what_is_seen():
    pair, (x, seen) = Holes(spread=1.5), holes(30)
    found = pv.refine(pair, x, seen, steps=150, num_samples=100, progress=False, engine="eager")
    torch.testing.assert_close(found.after.elbo_per_datum, pair.log_p(x, seen), atol=0.05, rtol=0)
