"""Scores and imputations of rows average over the global latents, as log p(x) does."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.inference.pareto import LEAST, threshold
from pyro_vae.inference.weighted import GLOBAL_DRAWS, mixed_parts
from pyro_vae.pairs.scope import using

NOISE = 0.5


class Shared(nn.Module):
    """x = (z, w) + noise, with w ~ N(0, 1) of all rows and z ~ N(0, 1) of each row. The guide is
    exact for z, and the prior for w."""

    def model(self, x):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = torch.stack(torch.broadcast_tensors(z, w), -1)
            fn = dist.Normal(loc, NOISE).mask(~x.isnan())
            pyro.sample("x", fn.to_event(1), obs=x.nan_to_num())

    def guide(self, x):
        pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            share = 1 / (1 + NOISE**2)
            pyro.sample("z", dist.Normal(share * x[:, 0].nan_to_num(), NOISE * share**0.5))


SPREAD = (1 + NOISE**2) ** 0.5
"""The standard deviation of each entry, averaged over z or w."""


def test_intervals_of_missing_entries_contain_the_uncertainty_of_a_global_latent():
    x = torch.randn(30, 2)
    x[:, 1] = torch.nan
    found = pv.impute(Shared(), x, num_samples=5000, draws=40, level=0.9)
    width = 2 * torch.special.ndtri(torch.tensor(0.95)).item() * SPREAD
    assert (found.high - found.low)[:, 1].mean().item() == pytest.approx(width, rel=0.15)
    assert found.draws[..., 1].std().item() == pytest.approx(SPREAD, rel=0.15)
    assert found.draws[:, 0, 1].std().item() > 0.7 * SPREAD  # of one row, too
    assert found.reliable.all()


def test_scores_average_over_a_global_latent():
    x = torch.tensor([[0.0, 0.0], [1.0, -1.5], [-0.5, 1.0]])
    found = pv.score(Shared(), x, num_samples=4000)
    each = dist.Normal(0.0, SPREAD).log_prob(x)
    torch.testing.assert_close(found.log_likelihood.float(), each.sum(1), rtol=0, atol=0.2)
    torch.testing.assert_close(found.by_entry[:, 1].float(), each[:, 1], rtol=0, atol=0.2)
    again = pv.log_likelihood(Shared(), x, num_samples=4000).per_datum
    torch.testing.assert_close(found.log_likelihood, again, rtol=0, atol=0.25)


def test_an_imputation_by_a_far_too_narrow_guide_is_not_reliable():
    """The guide of z has 0.45 times the standard deviation that it needs without the first entry.
    21 samples share each draw of w; their weights divided by their mean are below 21."""
    x = torch.randn(30, 2)
    x[:, 0] = torch.nan
    found = pv.impute(Shared(), x, num_samples=2000)
    assert found.reliable.float().mean().item() < 0.1
    assert found.k_threshold == threshold(LEAST)
    assert f"Pareto k over {found.k_threshold:.2f}" in str(found)


@pytest.mark.sample(2)
@pytest.mark.parametrize("number", [21, GLOBAL_DRAWS - 1, GLOBAL_DRAWS + 1, 450])
def test_each_number_of_samples_is_drawn(number):
    """Each sample has a draw of the global latents of its own, except where these were fitted to
    the rows."""
    batch = (torch.tensor([[0.3, torch.nan], [torch.nan, 1.0]]),)
    pair = Shared()
    with using(pair, 0):
        (joint,) = mixed_parts(pair, batch, number)
        (fitted,) = mixed_parts(pair, batch, number, fitted=True)
    assert joint.log_weights.shape == fitted.log_weights.shape == (number, 2)
    assert len(joint.passes) == number
    assert len(fitted.passes) == min(number // LEAST, GLOBAL_DRAWS)
    drawn = {block.values["w"].item() for block in joint.passes}
    assert len(drawn) == len(joint.passes)
    for block in fitted.passes:  # each draw of w has its share of the samples as its weight
        assert len(block.log_weights) >= LEAST
    sums = [
        one.exp().sum(0)
        for one in fitted.log_weights.split([len(b.log_weights) for b in fitted.passes])
    ]
    shares = torch.tensor([len(block.log_weights) for block in fitted.passes]).double()
    torch.testing.assert_close(torch.stack(sums), shares[:, None].expand(-1, 2))


class Effects(nn.Module):
    """Each row is a group with an effect u ~ N(0, 1); x = (u, u) + noise. The guide of u is exact
    given the first entry."""

    def __init__(self, first):
        super().__init__()
        self.share = 1 / (1 + NOISE**2)
        self.register_buffer("loc", self.share * first)

    def model(self, x, group):
        with pyro.plate("groups", len(self.loc), dim=-1):
            u = pyro.sample("u", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            own = u[..., group]
            fn = dist.Normal(torch.stack([own, own], -1), NOISE).mask(~x.isnan())
            pyro.sample("x", fn.to_event(1), obs=x.nan_to_num())

    def guide(self, x, group):
        with pyro.plate("groups", len(self.loc), dim=-1):
            pyro.sample("u", dist.Normal(self.loc, NOISE * self.share**0.5))


def test_training_rows_do_not_count_twice():
    """The guide of the effects has seen the first entries: E[x_2 | x_1] = x_1 / (1 + noise^2)."""
    x = torch.randn(60, 2)
    pair, group = Effects(x[:, 0]), torch.arange(60)
    x[:, 1] = torch.nan
    found = pv.impute(pair, x, group, num_samples=5000)
    slope = (found.mean[:, 1] * x[:, 0]).sum() / x[:, 0].square().sum()
    assert slope.item() == pytest.approx(pair.share, abs=0.03)
    spread = (NOISE**2 * pair.share + NOISE**2) ** 0.5
    width = 2 * torch.special.ndtri(torch.tensor(0.95)).item() * spread
    assert (found.high - found.low)[:, 1].mean().item() == pytest.approx(width, rel=0.06)


class Pooled(Shared):
    def guide(self, x):
        pyro.sample("w", dist.Normal(x[:, 1].nan_to_num().mean(), 0.1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, 0].nan_to_num(), 0.5))


@pytest.mark.parametrize("tool", [pv.score, pv.impute])
def test_a_guide_that_pools_the_rows_is_refused(tool):
    """It would see copies of a part of the rows."""
    x = torch.randn(12, 2)
    x[0, 1] = x[5, 1] = torch.nan
    with pytest.raises(pv.UsageError, match="computes 'w' from the rows that it is given"):
        tool(Pooled(), x, num_samples=50)


def test_a_refined_guide_also_draws_the_global_latent_anew():
    x = torch.randn(4, 2)
    x[:, 1] = torch.nan
    found = pv.impute(Shared(), x, method="refine", num_samples=5000)
    width = 2 * torch.special.ndtri(torch.tensor(0.95)).item() * SPREAD
    assert (found.high - found.low)[:, 1].mean().item() == pytest.approx(width, rel=0.15)


class MeanOfRows(nn.Module):
    """w ~ N(0, 1) and x_i ~ N(w, 1) with the guide of w from the mean of the rows that it gets."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def model(self, x):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal((w + z)[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x):
        scale = len(x) ** -0.5 if self.count else 0.01
        pyro.sample("w", dist.Normal(x.mean(), scale))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, 0] / 2, 0.7))

    def template(self, n):
        return (torch.zeros(n, 1),)


@pytest.mark.parametrize("count", [True, False])
def test_pooling_is_seen_though_the_first_rows_are_equal(count):
    x = 3 + torch.randn(1100, 1)
    x[:5] = 0.0
    pair = MeanOfRows(count)
    assert pv.encode(pair, x)["w"].item() == pytest.approx(x.mean().item(), abs=1e-5)
    drawn = pv.posterior(pair, x, draws=30, progress=False)["w"].mean().item()
    assert drawn == pytest.approx(x.mean().item(), abs=0.05)


def test_log_likelihood_says_that_it_depends_on_the_minibatch():
    """p(x_i) given q(w | all rows) is N(mean, 2 + 1 / n) if the guide gets all rows at once."""
    x = 1 + torch.randn(400, 1)
    pair = MeanOfRows(True)
    exact = dist.Normal(x.mean(), (2 + 1 / 400) ** 0.5).log_prob(x[:, 0])
    found = pv.log_likelihood(pair, x, num_samples=2000)
    assert (found.per_datum - exact).abs().max().item() < 0.15
    assert found.value == pytest.approx(exact.mean().item(), abs=0.01)
    words = "depend on the 10 rows of its minibatch: `batch_size=400` gives it all rows"
    with pytest.warns(UserWarning, match=words):
        parts = pv.log_likelihood(pair, x, num_samples=2000, batch_size=10)
    assert (parts.per_datum - exact).abs().max().item() > 0.5
    with pytest.warns(UserWarning, match=words):
        pv.evaluate(pair, x, num_samples=20, batch_size=10)


@pytest.mark.parametrize("tool", [pv.score, pv.impute])
def test_one_row_alone_is_refused_too_if_its_copies_would_count(tool):
    class Counted(Shared):
        def guide(self, x):
            pyro.sample("w", dist.Normal(x[:, 0].nan_to_num().mean(), (1 + len(x)) ** -0.5))
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x[:, 0].nan_to_num(), 0.5))

    with pytest.raises(pv.UsageError, match="computes 'w' from the rows that it is given"):
        tool(Counted(), torch.tensor([[0.5, torch.nan]]), num_samples=50)


def test_a_plate_with_as_many_groups_as_the_rows_have_gets_all_rows():
    class Growing(nn.Module):
        def model(self, x, group):
            with pyro.plate("groups", int(group.max()) + 1, dim=-1):
                u = pyro.sample("u", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(u[..., group], 1.0))
                pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)

        def guide(self, x, group):
            count = torch.bincount(group)
            with pyro.plate("groups", len(count), dim=-1):
                pyro.sample("u", dist.Normal(self.total(x, group) / (count + 2), 0.1))
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x[:, 0] / 2, 0.7))

        def total(self, x, group):
            return torch.zeros(int(group.max()) + 1).index_add(0, group, x[:, 0])

    x, group = torch.randn(1500, 1), torch.arange(1500) // 500
    exact = Growing().total(x, group) / 502
    torch.testing.assert_close(pv.encode(Growing(), x, group)["u"], exact)
    drawn = pv.posterior(Growing(), x, group, draws=50, progress=False)["u"].mean(0)
    torch.testing.assert_close(drawn, exact, rtol=0, atol=0.08)


def test_predict_refuses_no_draws():
    with pytest.raises(pv.UsageError, match="num_samples must be at least 1, got 0"):
        pv.predict(Shared(), torch.zeros(2, 2), num_samples=0)


def test_a_guide_that_computes_a_global_latent_from_an_auxiliary_one_does_not_pool():
    class Computed(Shared):
        def guide(self, x):
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("w", dist.Delta(noise))
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(0.8 * x[:, 0].nan_to_num(), 0.45))

        def template(self, n):
            return (torch.zeros(n, 2),)

    assert pv.sample(Computed(), 500, seed=0)[:, 1].std().item() == pytest.approx(SPREAD, rel=0.2)
    assert pv.score(Computed(), torch.zeros(3, 2), num_samples=50).log_likelihood.isfinite().all()


TOOLS = {"score": pv.score, "impute": pv.impute, "encode": pv.encode, "reconstruct": pv.reconstruct}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("group", "words"),
    [([0, 3], "index 3 is out of bounds"), ([0.0, 1.0], "tensors used as indices must be long")],
)
def test_a_wrong_group_of_a_row_with_holes_is_named(tool, group, words):
    """The missing entry is not at fault."""
    x = torch.tensor([[0.5, torch.nan], [torch.nan, 0.5]])
    with pytest.raises(pv.UsageError, match=words):
        TOOLS[tool](Effects(torch.zeros(3)), x, torch.tensor(group))


def test_a_new_group_is_drawn_from_the_prior_and_a_wrong_type_is_not():
    pair, x = Effects(torch.zeros(3)), torch.zeros(2, 2)
    for group, hint in (([0, 3], True), ([0.0, 1.0], False)):
        with pytest.raises(pv.UsageError) as caught:
            pv.posterior(pair, x, torch.tensor(group), progress=False)
        assert ("from_prior" in str(caught.value)) == hint


def test_all_rows_of_a_completed_copy_have_the_same_global_latent():
    """Rows share w, also rows that are imputed apart: the covariance of their entries is Var(w)."""
    x = torch.zeros(502, 2)
    x[[0, 1, 501], 1] = torch.nan
    found = pv.impute(Shared(), x, num_samples=LEAST * GLOBAL_DRAWS, draws=2000)
    drawn = found.draws[:, [0, 1, 501], 1].T
    assert drawn.std(1).mean().item() == pytest.approx(SPREAD, rel=0.15)
    covariance = drawn.cov()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert covariance[a, b].item() == pytest.approx(1.0, abs=0.4)  # of 200 draws of w
    other = pv.impute(Shared(), x, num_samples=LEAST * GLOBAL_DRAWS, draws=2000, seed=1)
    assert not torch.equal(other.mean, found.mean)
