"""What each tool makes of masked data and masked latents."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from masks_helpers import Holes, Imputed, Latent, holes, imputed_rows, ragged, same
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import figures as diagnostic_figures
from pyro_vae.inference.generation import hidden
from pyro_vae.plots import pictures
from pyro_vae.plots.canvas import MOST_CURVES


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


def test_a_users_statistic_must_leave_nan_out():
    pair, (x, seen) = Holes(), holes(30)
    words = "statistic 'total' is NaN for some data; masked entries are NaN"
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
    """Masked entries of a latent do not count as codes: their mean follows x, and is arbitrary."""
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
    with pytest.raises(pv.UsageError, match="must ignore them; for one entry, pass the rows"):
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
    both = pv.sandwich(
        pair, live, num_examples=30, num_temperatures=30, num_chains=30, progress=False
    )
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


@pytest.mark.thorough
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
    found = pv.calibration(pair, live, num_simulations=400, **settings)
    assert found.calibrated
    assert found.names[:2] == ("z[0]", "z[1]")
    assert (found.counts[1] / 400).item() == pytest.approx(2 / 3, abs=0.1)
    assert bool(((found.coverage - torch.tensor([0.5, 0.8, 0.9, 0.95])).abs() < 0.12).all())
    hidden = pv.calibration(pair, live & torch.tensor([1, 0]).bool(), **settings)
    assert hidden.left_out == {"z[1]": "it is masked in all simulations"}
    assert hidden.names[0] == "z[0]"
    wrong = Latent(same, same, events=True)  # off by 0.2, where it counts
    assert {"z[0]", "z[1]"} <= pv.calibration(wrong, live, **settings).failures.keys()


def test_tools_work_with_obs_mask():
    """The observed part is what is checked, the rest is NaN."""
    pair, (x, seen) = Imputed(), imputed_rows(200)
    found = pv.predictive_check(pair, x, seen, num_replicates=50, progress=False)
    assert torch.equal(found.observed[:, 0].isnan(), ~seen)
    torch.testing.assert_close(found.observed[seen, 0], x[seen])
    assert 0.02 < found.whole_p_values["mean"] < 0.98
    assert torch.equal(hidden(pair, x, seen), ~seen)
    pytest.importorskip("arviz")
    data = pv.to_arviz(pair, x[:9], seen[:9], num_samples=5, progress=False)
    kept = torch.as_tensor(data.observed_data["x_observed"].values)
    torch.testing.assert_close(kept, torch.where(seen, x, torch.nan)[:9], equal_nan=True)
    imputed = torch.as_tensor(data.posterior["x_unobserved"].values[0])
    assert torch.equal(imputed.isnan(), seen[:9].expand(5, 9))


def test_figures_show_what_is_seen():
    pair, (x, seen) = Holes(), holes(12)
    figure = pictures.reconstructions(pair, x, (seen,))
    some = np.linspace(0, 11, MOST_CURVES).astype(int)
    curves = figure.axes[0].lines[1::2]  # beside each curve is a vertical line
    for i, curve in zip(some, curves, strict=True):
        shown = torch.as_tensor(curve.get_ydata())
        wanted = torch.where(seen[i], x[i].float(), torch.nan)
        torch.testing.assert_close(shown, wanted, equal_nan=True)
    found = pv.predictive_check(pair, x, seen, num_replicates=20, progress=False)
    figure = diagnostic_figures.predictive_worst(pair, found, x, seen, number=2, replicates=3)
    first = found.worst(number=2)[0]
    for curve in figure.axes[0].lines[1:8:2]:
        assert torch.equal(torch.as_tensor(curve.get_ydata()).isnan(), ~seen[first])
    diagnostic_figures.predictive_statistics(found)


def test_the_refined_bound_is_log_p_of_what_is_seen():
    pair, (x, seen) = Holes(spread=1.5), holes(30)
    found = pv.refine(pair, x, seen, steps=150, num_samples=100, progress=False, engine="eager")
    torch.testing.assert_close(found.after.elbo_per_datum, pair.log_p(x, seen), atol=0.05, rtol=0)
