"""Copies of rows are not independent data: they would make differences look sure."""

import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import linear_gaussian
from torch import nn

import pyro_vae as pv
from pyro_vae.diagnostics import model_studies, signs
from pyro_vae.diagnostics.study import Bench
from pyro_vae.pairs.rng import seeded


def checked(pair, *batch):
    return pv.model_check(pair, *batch, num_samples=30, progress=False)


def test_copies_of_an_exact_pair_are_no_faults():
    pair = linear_gaussian()
    with seeded(3):
        x = pv.sample(pair, 60)
    found = checked(pair, x.repeat(20, 1))
    assert len(found.log_likelihood) == 60
    assert not signs.model_signs({"model_check": found})
    alone = checked(pair, x)
    assert torch.equal(found.log_likelihood, alone.log_likelihood)


def test_the_first_of_copies_stays_in_its_place():
    pair = linear_gaussian()
    with seeded(3):
        x = pv.sample(pair, 60)
    order = torch.cat([torch.arange(60), torch.arange(30)])[torch.randperm(90)]
    first = [i for i, row in enumerate(order.tolist()) if row not in order[:i].tolist()]
    assert torch.equal(
        checked(pair, x[order]).log_likelihood, checked(pair, x[order][first]).log_likelihood
    )


def test_too_few_different_rows_are_refused():
    pair = linear_gaussian()
    with seeded(3):
        x = pv.sample(pair, 49)
    with pytest.raises(pv.UsageError, match="at least 50 different rows, got 49"):
        checked(pair, x.repeat(20, 1))


class Coins(nn.Module):
    """A chance z ~ Beta(1, 1) and three coins; or a row that also has context."""

    def model(self, x, *context):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Beta(x.new_ones(()), 1.0))
            pyro.sample("x", dist.Bernoulli(z[..., None].expand(*z.shape, 3)).to_event(1), obs=x)

    def guide(self, x, *context):
        heads = x.sum(-1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Beta(1 + heads, 4 - heads))

    def template(self, n):
        return (torch.zeros(n, 3),)


def test_rows_that_the_model_repeats_too_all_count():
    with seeded(3):
        x = (torch.rand(200, 3) < torch.rand(200, 1)).float()
    assert len(checked(Coins(), x).log_likelihood) == 200


def test_a_frequent_row_of_whole_numbers_is_no_copy():
    """The model hardly draws two equal rows of twenty coins, and half of the data are equal."""
    vae = pv.VAE.mlp((20,), latent_dim=1)
    with seeded(3):
        x = (torch.rand(200, 20) < 0.5).float()
    x[::2] = 1.0
    found = checked(vae, x)
    assert len(found.log_likelihood) == 200
    assert signs.model_signs({"model_check": found})


@pytest.mark.parametrize("copies", [1, 20])
def test_replicates_that_differ_from_copies_are_no_sign(copies):
    """Replicates of twenty copies are twenty independent rows, so their mean varies less."""
    pair = linear_gaussian()
    with seeded(3):
        x = pv.sample(pair, 200 // copies).repeat(copies, 1)
    found = pv.predictive_check(pair, x, num_replicates=20, progress=False)
    far = dataclasses.replace(found, whole=found.whole + 100 * found.whole.std(0))
    bench = Bench(pair, (x,), torch.arange(200), 0, "eager", 0.0, 0.0, 0.0)
    judge = model_studies.predictive_study(bench).judge
    (told,) = judge(far)
    if copies == 1:
        assert (told.kind, told.tool) == ("decoder", "predictive")
    else:
        words = "predictions: 190 of 200 data are copies of others"
        assert told == ("unchecked", words, "predictions")
