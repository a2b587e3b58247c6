"""The guide's moments at real data, compared with posteriors in closed form."""

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from pairs import make, rows
from torch import nn

import pyro_vae as pv
from pyro_vae.pairs.particles import Particles
from pyro_vae.pairs.scope import using

WEIGHT = torch.tensor([[1.0, 0.2], [0.8, 1.1], [0.1, 1.0]]).double()
QUIET = {"progress": False}


class Guided(LinearGaussian):
    """The linear-Gaussian pair; its guide is the posterior with errors of known size."""

    def __init__(self, off=0.0, scale=1.0, correlated=True, permuted=0, one_by_one=False):
        super().__init__(WEIGHT, 0.6)
        self.off, self.scale, self.correlated = off, scale, correlated
        self.permuted, self.one_by_one = permuted, one_by_one

    def seen(self, x):
        """What the guide reads: every so many rows another row."""
        wrong = torch.arange(len(x)) % self.permuted == 0 if self.permuted else torch.zeros(len(x))
        return torch.where(wrong.bool()[:, None], x.flip(0), x)

    def guide(self, x):
        loc, covariance = self.posterior(self.seen(x))
        spread = covariance.diagonal().sqrt()
        factor = torch.linalg.cholesky(covariance) if self.correlated else spread.diag()
        with pyro.plate("data", len(x), dim=-1):
            q = dist.MultivariateNormal(loc + self.off * spread, scale_tril=self.scale * factor)
            z = pyro.sample("z", q)
            if self.one_by_one and z.dim() > 2:
                raise RuntimeError("this guide takes no plate of samples")


def data(n=200):
    torch.manual_seed(0)
    return Guided().marginal().sample((n,))


def judged(x=None, num_samples=500, **faults):
    return pv.local_calibration(
        Guided(**faults), data() if x is None else x, num_samples=num_samples, **QUIET
    )


def close(average, truth, slack=0.002):
    """Whether an average is within four of its standard errors of the truth."""
    off = (average.value - truth).abs() - 4 * average.standard_error - slack
    assert bool((off < 0).all()), (average, truth)


def test_an_exact_guide_has_no_error_at_all():
    found = judged()
    assert found.names == ("z[0]", "z[1]")
    for value in (found.shift, found.log_scale, found.correlation, found.shift_errors):
        assert value.abs().max() < 1e-9
    assert len(found.unreliable) == 0
    assert found.rms_shift.value.max() < 1e-9


@pytest.mark.parametrize("scale", [0.6, 1.5])
def test_a_scale_is_measured(scale):
    found = judged(scale=scale)
    close(found.scale_ratio, scale)
    close(found.mean_shift, 0.0)
    close(found.mean_correlation, 0.0)
    assert found.rms_shift.value.max() < 0.05
    assert len(found.unreliable) <= 10


def test_draws_are_moved_before_their_weights_are_believed():
    """The weights of a scale of 0.6 have a shape of 0.64, too heavy for 500 draws."""
    found = judged(scale=0.6)
    assert (found.guide_k > found.k_threshold).double().mean() > 0.3
    assert (found.pareto_k <= found.k_threshold).double().mean() > 0.95


def test_a_shift_is_measured():
    found = judged(off=0.2)
    close(found.mean_shift, 0.2)
    close(found.rms_shift, 0.2)
    close(found.scale_ratio, 1.0)


def test_a_lost_correlation_is_measured():
    found = judged(correlated=False)
    covariance = Guided().posterior(data())[1]
    spread = covariance.diagonal().sqrt()
    truth = -(covariance / spread[:, None] / spread)[0, 1]
    assert found.pairs == ((0, 1),)
    close(found.mean_correlation, truth.detach())
    close(found.rms_correlation, truth.abs().detach())
    close(found.mean_shift, 0.0)
    close(found.scale_ratio, 1.0)


def shifts(pair, x):
    """The exact shift of each row."""
    wrong, covariance = pair.posterior(pair.seen(x))
    return ((wrong - pair.posterior(x)[0]) / covariance.diagonal().sqrt()).detach()


@pytest.mark.parametrize("every", [1, 20])
def test_permuted_rows_are_found_with_their_sizes(every):
    x = data()
    found, exact = judged(permuted=every), shifts(Guided(permuted=every), x)
    assert exact.abs().max() > 4
    reliable = found.pareto_k <= found.k_threshold
    assert reliable.double().mean() > 0.95
    off = (found.shift - exact)[reliable].abs()
    assert bool((off < 5 * found.shift_errors[reliable] + 0.02).all())
    close(found.mean_shift, 0.0)
    torch.testing.assert_close(
        found.rms_shift.value, exact.square().mean(0).sqrt(), rtol=0.1, atol=0.0
    )
    wrong = exact.abs().amax(1) > 2
    assert bool(wrong[found.worst(int(wrong.sum()) // 2)].all())


def test_errors_are_those_of_the_estimates():
    """Row by row: the spread of the estimates over their errors is 1."""
    x = data(400)
    for faults, shift, scale in (({"scale": 1.5}, 0.0, 1.5), ({"off": 0.4}, 0.4, 1.0)):
        found = judged(x, **faults)
        off = (found.shift - shift) / found.shift_errors
        assert off.std(0) == pytest.approx([1.0, 1.0], abs=0.15)
        off = (found.log_scale - torch.tensor(scale).log()) / found.log_scale_errors
        assert off.std(0) == pytest.approx([1.0, 1.0], abs=0.15)
    found = judged(x, correlated=False)
    off = (found.correlation - found.correlation.nanmean()) / found.correlation_errors
    assert off[~off.isnan()].std() == pytest.approx(1.0, abs=0.15)


def test_the_root_mean_square_leaves_out_the_monte_carlo_error():
    found = judged(scale=1.5, num_samples=60)
    assert found.shift.square().mean() > 0.01
    assert bool((found.rms_shift.value <= 2 * found.rms_shift.standard_error + 0.02).all())


def test_a_row_that_cannot_be_judged_is_named_and_not_averaged():
    x = data()
    x[7] += 400.0  # no draw of a guide that reads row 192 comes near
    found = judged(x, permuted=7)
    assert 7 in found.unreliable
    assert found.shift[7].isnan().all()
    assert found.worst(1).item() == 7
    assert "not judged" in str(found)
    assert 7 in json.loads(json.dumps(found.as_dict()))["unreliable"]


def test_a_pair_that_takes_no_plate_of_samples_gets_the_same_numbers():
    x = data(40)
    found = judged(x, num_samples=100, scale=1.5, one_by_one=True)
    close(found.scale_ratio, 1.5, slack=0.01)
    with using(Guided(one_by_one=True)):
        assert not Particles(Guided(one_by_one=True), (x,)).vectorized


class Several(nn.Module):
    """Conjugate latents of many kinds; the guide is wrong by known amounts, and context moves x.

    A rate with counts, an angle, a coin that the guide draws, a switch that the model sums out, and
    visits in a plate within the datum, some of them masked.
    """

    def model(self, x, moved, inside):
        counts, angle, value, visits = x[:, :3], x[:, 3], x[:, 4], x[:, 5:]
        with pyro.plate("data", len(x), dim=-1):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(4.0), 2.0))
            pyro.sample(
                "counts", dist.Poisson(rate[..., None] + x.new_zeros(3)).to_event(1), obs=counts
            )
            z = pyro.sample("angle", dist.VonMises(x.new_zeros(()), 1.0))
            pyro.sample("seen", dist.VonMises(z, 3.0), obs=angle)
            coin = pyro.sample("coin", dist.Bernoulli(x.new_tensor(0.3)))
            marked = {"enumerate": "parallel"}
            switch = pyro.sample("switch", dist.Bernoulli(x.new_tensor(0.5)), infer=marked)
            pyro.sample("value", dist.Normal(coin + moved + 3 * switch, 1.0), obs=value)
            with pyro.plate("visits", 2, dim=-2), pyro.poutine.mask(mask=inside.T):
                u = pyro.sample("u", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(u, 1.0), obs=visits.T)

    def exact(self, x, moved, inside):
        """The posterior of each latent that the guide draws."""
        at = torch.tensor([[0.0, 3.0], [1.0, 4.0]]).double()
        odds = dist.Normal(at + moved[:, None, None], 1.0).log_prob(x[:, 4, None, None])
        odds = odds.logsumexp(2) + torch.tensor([0.7, 0.3]).double().log()
        along, across = 1 + 3 * x[:, 3].cos(), 3 * x[:, 3].sin()
        return {
            "rate": dist.Gamma(4 + x[:, :3].sum(1), torch.tensor(5.0).double()),
            "angle": dist.VonMises(torch.atan2(across, along), torch.hypot(along, across)),
            "coin": dist.Bernoulli(logits=odds[:, 1] - odds[:, 0]),
            "u": dist.Normal(x[:, 5:].T / 2, 0.5**0.5),
        }

    def guides(self, x, moved, inside):
        """The posterior, with a rate of twice the variance, a turned angle, other odds."""
        exact = self.exact(x, moved, inside)
        rate, angle, coin, u = (exact[name] for name in ("rate", "angle", "coin", "u"))
        return {
            "rate": dist.Gamma(rate.concentration / 2, rate.rate / 2),
            "angle": dist.VonMises(angle.loc + 0.3, angle.concentration),
            "coin": dist.Bernoulli(logits=coin.logits + 0.7),
            "u": dist.Normal(u.loc + 0.2, u.scale),
        }

    def guide(self, x, moved, inside):
        q = self.guides(x, moved, inside)
        with pyro.plate("data", len(x), dim=-1):
            for name in ("rate", "angle", "coin"):
                pyro.sample(name, q[name])
            with pyro.plate("visits", 2, dim=-2), pyro.poutine.mask(mask=inside.T):
                pyro.sample("u", q["u"])


def several(n=60):
    torch.manual_seed(1)
    x = torch.randn(n, 7).double()
    x[:, :3] = torch.poisson(torch.full((n, 3), 2.0).double())
    inside = torch.ones(n, 2, dtype=torch.bool)
    inside[::3, 1] = False
    return x, torch.randn(n).double(), inside


def test_every_kind_of_latent_is_measured():
    pair, batch = Several(), several()
    found = pv.local_calibration(pair, *batch, num_samples=1500, **QUIET)
    assert found.names == ("rate", "cos(angle)", "sin(angle)", "coin", "u[0]", "u[1]")
    assert found.left_out == {}
    p, q = pair.exact(*batch), pair.guides(*batch)

    def moments(of):
        grid = torch.linspace(-torch.pi, torch.pi, 2001).double()[:-1, None]
        mass = of["angle"].log_prob(grid).softmax(0)
        columns = [(of["rate"].mean, of["rate"].stddev)]
        for wave in (grid.cos(), grid.sin()):
            mean = (mass * wave).sum(0)
            columns.append((mean, (mass * (wave - mean).square()).sum(0).sqrt()))
        columns.append((of["coin"].mean, of["coin"].stddev))
        columns += [
            (loc, torch.full_like(loc, of["u"].stddev.flatten()[0])) for loc in of["u"].mean
        ]
        return [torch.stack(parts, 1) for parts in zip(*columns, strict=True)]

    (mean_p, spread_p), (mean_q, spread_q) = moments(p), moments(q)
    shift, log_scale = (mean_q - mean_p) / spread_p, (spread_q / spread_p).log()
    masked = ~batch[2][:, 1]
    assert bool((found.shift[:, 5].isnan() == masked).all())
    for value, error, truth in (
        (found.shift, found.shift_errors, shift),
        (found.log_scale, found.log_scale_errors, log_scale),
    ):
        known = ~value.isnan()
        assert known[:, :5].double().mean() > 0.9
        off = ((value - truth) / error)[known]
        assert off.abs().max() < 6
        assert off.square().mean().sqrt() == pytest.approx(1.0, abs=0.2)


class Scaled(LinearGaussian):
    """The linear-Gaussian pair with a global scale, which the guide of z knows."""

    def model(self, x):
        scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 0.5))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), scale))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x):
        scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 0.5))
        precision = 1 + scale**-2
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, 0] / precision, 1.3 * precision**-0.5))


def test_global_latents_are_held_at_one_draw():
    found = pv.local_calibration(Scaled(WEIGHT, 0.6), data()[:, :1], **QUIET)
    assert found.given == ("scale",)
    close(found.scale_ratio, 1.3)
    close(found.mean_shift, 0.0)


class Partly(nn.Module):
    """One latent of four entries, of which some are missing; the guide is 1.3 times too wide."""

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            likelihood = dist.Normal(z[..., None], 1.0).mask(~x.isnan()).to_event(1)
            pyro.sample("x", likelihood, obs=x.nan_to_num(0.0))

    def guide(self, x):
        precision = 1 + (~x.isnan()).sum(1)
        with pyro.plate("data", len(x), dim=-1):
            q = dist.Normal(x.nan_to_num(0.0).sum(1) / precision, 1.3 * precision**-0.5)
            pyro.sample("z", q)


def test_missing_entries_are_left_out():
    x = data()[:, :2]
    holes = torch.rand(x.shape) < 0.4
    holes[:, 0] &= ~holes[:, 1]  # a row has at least one entry
    found = pv.local_calibration(Partly(), torch.where(holes, torch.nan, x), **QUIET)
    close(found.scale_ratio, 1.3)
    close(found.rms_shift, 0.0, slack=0.02)


@pytest.mark.parametrize("name", ["semi-supervised", "multilevel", "bags"])
def test_other_pairs_are_served(name):
    found = pv.local_calibration(make(name), *rows(name, 6), num_samples=30, **QUIET)
    again = pv.local_calibration(make(name), *rows(name, 6), num_samples=30, **QUIET)
    assert found.shift.shape == (6, len(found.names))
    assert torch.equal(found.shift.nan_to_num(9.0), again.shift.nan_to_num(9.0))


class Ragged(nn.Module):
    """A second latent that only minibatches with a second entry have."""

    def run(self, x, of_model):
        steps = 1 + int(bool((x[:, 1] > 0).any()))
        with pyro.plate("data", len(x), dim=-1):
            z = [pyro.sample(f"z{i}", dist.Normal(x.new_zeros(()), 1.0)) for i in range(steps)]
            if of_model:
                pyro.sample("x", dist.Normal(sum(z)[..., None] + 0 * x, 1.0).to_event(1), obs=x)

    def model(self, x):
        self.run(x, True)

    def guide(self, x):
        self.run(x, False)


def test_sites_that_depend_on_the_minibatch_are_refused(monkeypatch):
    x = -torch.rand(6, 2).double()
    x[0, 1] = 1.0
    monkeypatch.setattr("pyro_vae.diagnostics.local_calibration.CELLS", 50 * 2)
    with pytest.raises(pv.UsageError, match="draws the sites z0 for some rows and z0, z1 for"):
        pv.local_calibration(Ragged(), x, num_samples=50, **QUIET)


class Coin(nn.Module):
    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.Categorical(x.new_ones(2) / 2))
            pyro.sample("x", dist.Normal(k[..., None].to(x.dtype), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("k", dist.Categorical(x.new_ones(2) / 2))


def test_misuse_raises_an_error_of_one_line():
    with pytest.raises(pv.UsageError, match="num_samples must be at least 21"):
        judged(num_samples=20)
    with pytest.raises(pv.UsageError, match="no local latent with moments"):
        pv.local_calibration(Coin(), data(), **QUIET)
