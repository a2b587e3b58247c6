"""Predictive checks and outlier scores: closed forms, known failures, and all pairs."""

import json
from math import inf, nan

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian, Spoiled, linear_gaussian
from pairs import ALL, make, rows
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import figures as diagnostic_figures
from pyro_vae.diagnostics.outliers import Scores, _auroc
from pyro_vae.diagnostics.predictive import STATISTICS
from pyro_vae.pairs.rng import seeded
from pyro_vae.plots import canvas
from pyro_vae.training.check import require

QUIET = {"progress": False}


def data(pair, n=300):
    with seeded(2):
        return pair.marginal().sample((n,)).detach()


def first(x):
    return x[:, 0]


def replicates(pair, x):
    """Return mean (n,) and standard deviation of a replicate's first element, in closed form."""
    mean, covariance = pair.posterior(x)
    row = pair.weight[0]
    return (mean @ row).detach(), (row @ covariance @ row + pair.noise**2).sqrt().detach()


def test_p_values_are_those_of_the_posterior_predictive_distribution():
    pair = linear_gaussian()
    x = data(pair)
    number = 400
    found = pv.predictive_check(
        pair, x, statistics={"first": first}, num_replicates=number, **QUIET
    )
    mean, deviation = replicates(pair, x)
    normal = torch.distributions.Normal(0.0, 1.0)
    want = normal.cdf((mean - x[:, 0]) / deviation)
    error = (want * (1 - want) / number).sqrt() + 1 / number
    assert bool((found.p_values[:, 0] - want).abs().le(5 * error).all())
    off = found.replicated_mean[:, 0] - mean
    assert off.abs().max() < 5 * deviation / number**0.5
    assert (found.replicated_deviation[:, 0].mean() / deviation).item() == pytest.approx(
        1, abs=0.01
    )
    far = (x[:, 0] - mean).abs().argmax()
    assert far in found.worst("first", 5)
    # For the whole data set: the replicates of the mean have 1/n of the variance.
    whole = normal.cdf((mean.mean() - x[:, 0].mean()) / (deviation / len(x) ** 0.5)).item()
    spread = 4 * (whole * (1 - whole) / number) ** 0.5 + 1 / number
    assert found.whole_p_values["first"] == pytest.approx(whole, abs=spread)


def test_only_a_model_that_does_not_fit_is_reported():
    pair = linear_gaussian()
    x = data(pair)
    wrong = LinearGaussian(pair.weight.detach(), noise=0.25)
    good, bad = (pv.predictive_check(one, x, **QUIET) for one in (pair, wrong))
    assert 0.02 < good.whole_p_values["variance"] < 0.98
    assert bad.whole_p_values["variance"] < 0.01
    heavy = x.clone()
    heavy[7, 3] += 6.0
    found = pv.predictive_check(pair, heavy, **QUIET)
    assert found.worst(number=1).tolist() == [7]
    assert found.p_values[7, found.names.index("greatest")] < 0.01


def test_ties_are_halved_and_no_p_value_is_0_or_1():
    pair, (x,) = make("bernoulli"), rows("bernoulli")
    constant = {"constant": lambda x: x.sum(1) * 0, "total": lambda x: x.sum(1)}
    found = pv.predictive_check(pair, x, statistics=constant, **QUIET)
    assert bool((found.p_values[:, 0] == 0.5).all())
    assert found.p_values.min() > 0
    assert found.p_values.max() < 1
    assert found.distances[:, 0].isnan().all()
    # For counts: the mean p of exchangeable data is 1/2, also with ties.
    again = pv.sample(pair, 400, seed=3)
    prior = pv.predictive_check(Blind(pair), again, statistics={"total": lambda x: x.sum(1)})
    assert prior.p_values.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / 400) ** 0.5)


class Blind(nn.Module):
    """The model of a pair with its prior as guide, so replicates do not depend on their datum."""

    def __init__(self, pair):
        super().__init__()
        self.pair = pair

    def model(self, x):
        self.pair.model(x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))


def test_a_latent_of_the_model_alone_is_drawn_given_the_data():
    """Replicates of a summed-out component follow p(m | x), not p(m)."""

    class Split(nn.Module):
        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                how = {"enumerate": "parallel"}
                m = pyro.sample("m", dist.Bernoulli(x.new_full((), 0.5)), infer=how)
                pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal((8 * m)[..., None], 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

    x = torch.tensor([[0.0], [8.0]]).repeat(20, 1)
    found = pv.predictive_check(Split(), x, statistics={"first": first}, **QUIET)
    torch.testing.assert_close(found.replicated_mean, x.double(), atol=0.6, rtol=0)


@pytest.mark.sample(12)
@pytest.mark.parametrize("name", ALL)
def test_any_pair(name):
    pair, batch = make(name), rows(name, 12)
    require(pair, batch)
    state = torch.get_rng_state()
    found = pv.predictive_check(pair, *batch, num_replicates=20, **QUIET)
    assert torch.equal(torch.get_rng_state(), state)
    if name in ("tokens", "text"):  # classes have shares but no mean
        assert found.names == tuple(f"share of class {k}" for k in range(len(found.names)))
    else:
        assert found.names == tuple(STATISTICS)
    assert found.p_values.shape == (12, len(found.names))
    assert found.whole.shape == (20, len(found.names))
    again = pv.predictive_check(pair, *batch, num_replicates=20, **QUIET)
    assert torch.equal(again.p_values, found.p_values)


def test_a_refined_pair_brings_replicates_nearer():
    pair = Spoiled("full", shift=1.5)
    x = data(pair, 40)
    off = []
    refined = pv.refine(pair, x, steps=100, num_samples=50, **QUIET)
    for one, batch in ((pair, (x,)), (refined.pair, refined.batch)):
        found = pv.predictive_check(one, *batch, statistics={"first": first}, **QUIET)
        off.append((found.replicated_mean[:, 0] - replicates(pair, x)[0]).abs().mean())
    assert off[1] < 0.3 * off[0]


def test_scores_are_the_closed_forms():
    pair = Spoiled("full", shift=0.2, stretch=1.3)
    x, reference = data(pair, 30), data(pair, 200)
    other = 3 * data(pair, 40) + 2
    found = pv.outlier_scores(
        pair, x, reference=(reference,), other=(other,), steps=120, num_samples=3000, **QUIET
    )
    nll = -pair.marginal().log_prob(reference).mean().item()
    assert found.reference_nll == pytest.approx(nll, abs=0.02)
    for scores, rows_ in ((found.inside, x), (found.other, other)):
        log_p = pair.marginal().log_prob(rows_).detach()
        slack = 5 * scores.standard_errors + 0.02
        assert bool((scores.log_likelihood - log_p).abs().le(slack).all())
        assert bool((scores.typicality - (-log_p - nll).abs()).abs().le(slack + 0.02).all())
        put_in = pair.kl(rows_, pair.q(rows_))
        assert scores.regret.mean().item() == pytest.approx(put_in.mean().item(), abs=0.05)
    assert found.auroc["-log p(x)"] > 0.95


def test_the_area_is_that_of_pairs():
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.randn(n, generator=generator).round() + m for n, m in ((50, 0), (70, 1)))
    inside, outside = (Scores(-s, s, None, s) for s in (low, high))
    wins = (high[:, None] > low).double() + 0.5 * (high[:, None] == low)
    assert _auroc(inside, outside)["-log p(x)"] == pytest.approx(wins.mean().item())
    broken = outside._replace(log_likelihood=torch.tensor([-inf, nan, inf]))
    assert _auroc(inside, broken)["-log p(x)"] == pytest.approx(2 / 3)


@pytest.mark.thorough
def test_simple_images_are_more_probable_than_what_was_learned():
    """An empty image has a higher log p(x) than digits (known failure); other scores detect it."""
    digits = pv.load_data("digits")
    with seeded(0):
        vae = pv.VAE.mlp(digits.shape, 4, hidden=(32,), likelihood=pv.DiscretizedLogistic)
        pv.fit(vae, digits.train.x, epochs=4, **QUIET)
    x, blank = digits.test.x[:40], torch.zeros_like(digits.test.x[:20])
    blank[:, :, 4] = digits.test.x[:20, :, 4]
    found = pv.outlier_scores(
        vae,
        x,
        reference=(digits.validation.x[:100],),
        other=(blank,),
        steps=60,
        num_samples=50,
        **QUIET,
    )
    assert found.other.log_likelihood.mean() > found.inside.log_likelihood.mean() + 20
    assert found.auroc["-log p(x)"] < 0.1
    assert found.auroc["typicality"] > 0.9
    record = json.loads(json.dumps(found.as_dict()))
    assert record["auroc"] == found.auroc
    assert record["other"]["num_examples"] == 20
    assert "likelihood regret" in str(found)
    figure = diagnostic_figures.outlier_histograms(found)
    assert [axis.get_title().split("\n")[0] for axis in figure.axes] == list(found.auroc)
    check = pv.predictive_check(vae, x, num_replicates=20, latents="guide", **QUIET)
    assert "share of zeros" in str(check)
    assert len(diagnostic_figures.predictive_statistics(check).axes) == 4
    assert len(diagnostic_figures.predictive_worst(vae, check, x, number=3).axes) == 3
    statistics = json.loads(json.dumps(check.as_dict()))["statistics"]
    assert statistics["mean"]["p_value"] == check.whole_p_values["mean"]


def test_scores_without_another_set():
    pair = linear_gaussian()
    x = data(pair, 30)
    found = pv.outlier_scores(pair, x, regret=False, **QUIET)
    assert found.inside.regret is None
    assert found.other is None
    assert found.auroc is None
    assert found.reference_nll == pytest.approx(-found.inside.log_likelihood.mean().item())
    assert set(found.as_dict()) == {"reference_nll", "inside"}
    assert diagnostic_figures.outlier_histograms(found).axes
    assert "AUROC" in str(found)
    found.inside.log_likelihood.fill_(-1.0)  # equal scores are drawn too, without a warning
    assert diagnostic_figures.outlier_histograms(found).axes


def test_misuse_raises_an_error_of_one_line():
    pair = linear_gaussian()
    x = data(pair, 10)
    with pytest.raises(pv.UsageError, match="num_replicates must be at least 20, got 5"):
        pv.predictive_check(pair, x, num_replicates=5)
    with pytest.raises(
        pv.UsageError, match="statistics must contain at least one function, got none"
    ):
        pv.predictive_check(pair, x, statistics={})
    with pytest.raises(pv.UsageError, match=r"'all' must return a tensor .*, got \(10, 6\)"):
        pv.predictive_check(pair, x, statistics={"all": lambda x: x})
    found = pv.predictive_check(pair, x, **QUIET)
    with pytest.raises(pv.UsageError, match="unknown statistic 'mode'"):
        found.worst("mode")


class Shared(nn.Module):
    """A global latent whose guide is its prior, so replicates of the data set differ."""

    def __init__(self):
        super().__init__()
        self.noise = nn.Parameter(torch.tensor(0.1))

    def model(self, x):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 0.01).to_event(1))
            pyro.sample("x", dist.Normal(w + z, self.noise).to_event(1), obs=x)

    def guide(self, x):
        pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(1), 0.01).to_event(1))


@pytest.mark.thorough
def test_each_replicate_of_all_data_has_its_own_draw_of_what_they_share():
    found = pv.predictive_check(Shared(), torch.full((5, 1), 0.3), num_replicates=400, **QUIET)
    mean = found.names.index("mean")
    deviation = found.whole[:, mean].std()
    assert found.replicated_deviation[:, mean].tolist() == pytest.approx([1.0] * 5, rel=0.15)
    assert deviation.item() == pytest.approx(
        1.0, rel=0.15
    )  # all data of a replicate share one draw
    assert found.whole_p_values["mean"] == pytest.approx(0.382, abs=0.1)  # P(N(0, 1) > 0.3)


def test_other_data_may_be_a_tensor():
    pair = linear_gaussian()
    x, other = data(pair, 20), data(pair, 30) + 3
    settings = {"regret": False, "num_samples": 30, "seed": 4, **QUIET}
    one = pv.outlier_scores(pair, x, other=other, reference=x, **settings)
    assert one.auroc == pv.outlier_scores(pair, x, other=(other,), **settings).auroc


def test_the_labels_of_a_picture_keep_their_lines():
    assert canvas.literal("row 3\nmean") == "row 3\nmean"
    assert canvas.literal("a\tb\x00$") == "a?b?\\$"
