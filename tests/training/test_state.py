"""The state of training as a checkpoint, and the numbers of each graph."""

import dataclasses
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from engine_helpers import Run
from pairs import make, rows
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import UsageError
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import registered, scope
from pyro_vae.runs import files as run_files
from pyro_vae.training.engine import Engine
from pyro_vae.training.state import TrainState

OLD = Path(__file__).parents[1] / "runs" / "run_0.1.0"


def kinds(value):
    """The types inside a value, without lengths and contents."""
    if isinstance(value, dict):
        return {key: kinds(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [kinds(each) for each in value]
    return type(value)


def test_a_checkpoint_is_the_state_and_nothing_else(tmp_path):
    x = rows("bernoulli", 32)[0]
    options = {"epochs": 3, "batch_size": 16, "engine": "eager", "progress": False}
    history = pv.fit(make("bernoulli"), x, validation=x[:8], out=tmp_path, **options)
    plain = run_files.read_checkpoint(tmp_path)
    state = TrainState.of_checkpoint(plain, tmp_path)
    assert tuple(state.epochs) == history.epochs
    assert state.best_epoch == history.best_epoch
    again = state.to_checkpoint()
    assert again.keys() == plain.keys()
    assert all(kinds(again[key]) == kinds(plain[key]) for key in plain)
    for name, value in plain["pair"].items():
        assert torch.equal(again["pair"][name], value)


def test_the_format_differs_from_that_of_0_1_0_in_the_generators_of_an_epoch():
    old = run_files.read_checkpoint(OLD)
    state = TrainState.of_checkpoint(old, OLD)
    assert state.to_checkpoint().keys() ^ old.keys() == {"more_generators", "generators_of_epoch"}
    former = [epoch[:10] for epoch in state.to_checkpoint()["epochs"]]
    assert former == [list(epoch) for epoch in old["epochs"]]  # later fields come after these
    assert len(dataclasses.fields(TrainState)) == len(old)


def test_a_checkpoint_of_0_1_0_within_an_epoch_is_refused():
    old = run_files.read_checkpoint(OLD) | {"batches": 2}
    with pytest.raises(UsageError, match=r"is from version .* and within an epoch, whose order"):
        TrainState.of_checkpoint(old, OLD)


class Varying(nn.Module):
    """A pair with a second latent site only in minibatches of more than eight rows."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 2), nn.Linear(2, 6)

    def latents(self, x, loc):
        z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
        if len(x) > 8:
            pyro.sample("a", dist.Normal(loc + 3.0, 1.0).to_event(1))
        return z

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = self.latents(x, x.new_zeros(2))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            self.latents(x, self.encoder(x))


def test_each_graph_names_its_own_numbers():
    pair, x = Varying().double(), rows("plain", 12)[0]
    model = registered(pair, pair.model)
    engines = {name: Engine(pair, engine=name, declare=False) for name in ("eager", "traced")}
    for n in (12, 7, 12, 7):
        found = {}
        for name, engine in engines.items():
            with scope(pair), seeded(n):
                engine.loss_and_grads(model, pair.guide, x[:n])
            pair.zero_grad()
            found[name] = dict(zip(engine.names, engine.numbers.tolist(), strict=True))
        assert found["traced"] == pytest.approx(found["eager"])
        assert (("kl", "a") in found["traced"]) == (n == 12)


def test_asking_whether_a_graph_compiles_decides_nothing():
    engine = Run("bernoulli", engine="auto", batch_size=12, steps=10**9).engine
    inputs = (torch.ones(()), torch.ones(()), torch.ones(12, 6))
    assert engine._compiles(inputs, 100)
    assert not engine._compiles(inputs, 0)
    assert engine.engine == "auto"


def test_the_numbers_of_a_step_stay_when_the_next_step_runs():
    run = Run("bernoulli", engine="traced")
    run.step(0)
    first, kept = run.engine.numbers, run.engine.numbers.clone()
    run.step(1)
    assert torch.equal(first, kept)
    assert not torch.equal(run.engine.numbers, kept)


def test_a_warning_of_fit_points_at_the_line_that_calls_it():
    x = torch.rand(40, 6).round().double()
    held = x.clone()
    held[0, 0] = 1e300
    options = {"epochs": 3, "batch_size": 20, "engine": "eager", "progress": False}
    torch.manual_seed(0)
    vae = pv.VAE.mlp((6,), latent_dim=2, hidden=(4,), likelihood=pv.Gaussian).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pv.fit(vae, x, validation=held, binarize="none", **options)
    bounds = [w for w in caught if "validation bound" in str(w.message)]
    assert [w.filename for w in bounds] == [__file__]
