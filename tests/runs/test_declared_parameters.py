"""Pairs whose programs make parameters, as an AutoGuide does: a saved run can always be loaded."""

from copy import deepcopy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.nn.functional import one_hot, softplus

import pyro_vae as pv

QUIET = {"progress": False, "engine": "eager", "epochs": 1}


class Scores(nn.Module):
    """Positive x with a global scale; the encoder fails on zeros, whose logarithm is infinite."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(1, 2)
        self.shared = AutoNormal(poutine.block(self.model, expose=["scale"]))

    def model(self, x):
        scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.LogNormal(z, scale), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x.log()[..., None]).unbind(-1)
            pyro.sample("z", dist.Normal(loc, softplus(raw) + 0.1))
        self.shared(x)


class Words(nn.Module):
    """Words (n, 4) with a global distribution of words; the encoder takes integers only.

    The guide has its own name for the data plate.
    """

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 2)
        self.shared = AutoNormal(poutine.block(self.model, expose=["words"]))

    def model(self, x):
        words = pyro.sample("words", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            logits = (words + z[..., None] * torch.arange(3.0))[..., None, :]
            fn = dist.Categorical(logits=logits.expand(*logits.shape[:-2], 4, 3))
            pyro.sample("x", fn.to_event(1), obs=x)

    def guide(self, x):
        self.shared(x)
        loc, raw = self.encoder(one_hot(x, 3).sum(-2).float()).unbind(-1)
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, softplus(raw) + 0.1))


class WordsWithTemplate(Words):
    def template(self, n):
        return (torch.zeros(n, 4, dtype=torch.long),)


class ScoresWithTemplate(Scores):
    def template(self, n):
        return (torch.ones(n),)


def scores():
    return torch.randn(12, generator=torch.Generator().manual_seed(1)).exp()


def words():
    return torch.randint(3, (12, 4), generator=torch.Generator().manual_seed(1))


def require_loaded(pair, x, folder):
    """The loaded pair has the tensors and the values of the saved one, and can be saved again."""
    pv.save(pair, folder / "run")
    loaded = pv.load(folder / "run", type(pair))
    pv.save(loaded, folder / "again")
    again = pv.load(folder / "again", type(pair))
    same = [pv.log_likelihood(one, x, num_samples=5).value for one in (pair, loaded, again)]
    assert same[0] == same[1] == same[2]


CASES = [(Scores, scores), (ScoresWithTemplate, scores), (Words, words), (WordsWithTemplate, words)]


@pytest.mark.parametrize(("make", "data"), CASES)
def test_a_fitted_pair(make, data, tmp_path):
    pair = make()
    pv.fit(pair, data(), **QUIET)
    require_loaded(pair, data(), tmp_path)


@pytest.mark.parametrize(("make", "data"), CASES)
def test_a_guide_that_ran_before_fit(make, data, tmp_path):
    pair = make()
    pair.guide(data())
    pv.fit(pair, data(), **QUIET)
    require_loaded(pair, data(), tmp_path)


@pytest.mark.parametrize(("make", "data"), CASES)
def test_a_copy_of_a_fitted_pair(make, data, tmp_path):
    pair = make()
    pv.fit(pair, data(), **QUIET)
    require_loaded(deepcopy(pair), data(), tmp_path)


@pytest.mark.parametrize("make", [ScoresWithTemplate, Scores])
def test_a_pair_that_stock_svi_trained(make, tmp_path):
    pair, x = make(), scores()
    pyro.clear_param_store()
    SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
    pyro.clear_param_store()
    pv.evaluate(pair, x, num_samples=5)
    require_loaded(pair, x, tmp_path)


def test_a_pair_that_never_ran_with_the_library_has_its_template(tmp_path):
    pair = ScoresWithTemplate()
    pair.guide(scores())
    require_loaded(pair, scores(), tmp_path)


def test_a_pair_that_never_ran_with_the_library_is_refused_with_the_remedy(tmp_path):
    pair = Scores()
    pair.guide(scores())
    pv.save(pair, tmp_path)
    with pytest.raises(pv.UsageError, match="an instance that has run once"):
        pv.load(tmp_path, Scores)
    other = Scores()
    other.guide(scores())
    pv.load(tmp_path, other)


def test_a_pair_without_such_parameters_does_not_run_when_it_is_loaded(tmp_path):
    class Counted(pv.VAE):
        runs = 0

        def model(self, x, *context):
            type(self).runs += 1
            super().model(x, *context)

    made = pv.VAE.mlp((4,), latent_dim=2, likelihood=pv.Gaussian)
    pair = Counted(made.encoder, made.decoder, made.prior)
    pv.fit(pair, torch.randn(12, 4), **QUIET)
    pv.save(pair, tmp_path)
    Counted.runs = 0
    pv.load(tmp_path, Counted)
    assert Counted.runs == 0


def test_the_data_plate_of_the_guide_is_found_if_the_guide_fails_on_floats():
    pair = Words()
    assert not pv.check(pair, words()).errors
    assert pv.encode(pair, words())["z"].shape == (12,)
