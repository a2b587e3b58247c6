"""Pairs that can be traced, and pairs that run eagerly with a warning."""

import copy
import warnings

import pyro.optim
import pytest
import torch
from engine_helpers import Noisy, Run, assert_same, assert_state
from pairs import make, rows
from pyro.infer import RenyiELBO, Trace_ELBO

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import scope
from pyro_vae.training.engine import Engine

REASONS = {
    "python": "generators, not from torch's",
    "numpy": "generators, not from torch's",
    "own generator": "generators, not from torch's",
    "branch": "depends on the values of tensors",
    "array": "cannot be traced",
    "counter": "it changes its attribute 'calls'",
    "list": "it changes its attribute 'seen'",
    "shape": "depends on the values of tensors",
}


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("kind", "engine"),
    [*((kind, "auto") for kind in REASONS), ("branch", "compiled"), ("python", "traced")],
)
def test_what_a_graph_would_freeze_runs_eagerly_with_a_warning(kind, engine):
    x = rows("plain", 32)[0]
    with seeded(0):
        start = Noisy(kind).double()
    stock, pair = copy.deepcopy(start), copy.deepcopy(start)
    options = {"epochs": 3, "batch_size": 16, "progress": False}
    with pytest.warns(UserWarning, match="Noisy is trained by the eager engine, because") as said:
        history = pv.fit(pair, x, engine=engine, **options)
    assert len(said) == 1
    assert REASONS[kind] in str(said[0].message)
    reference = pv.fit(stock, x, engine="eager", **options)
    assert history["elbo"] == reference["elbo"]
    assert not any(isinstance(v, torch._subclasses.FakeTensor) for v in pair.seen)
    assert len(pair.seen) == len(stock.seen)


def test_a_number_read_from_a_tensor_is_read_anew_at_each_step():
    x = rows("plain", 32)[0]
    histories = []
    for engine in ("eager", "traced"):
        with seeded(0), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch before about 2.9 cannot trace it
            pair = Noisy("number").double()
            history = pv.fit(pair, x, engine=engine, epochs=3, batch_size=16, progress=False)
        histories.append(history["elbo"])
    assert histories[0] == pytest.approx(histories[1], rel=1e-6)  # torch reads it as float32


def test_an_objective_with_its_own_gradients_is_run_eagerly():
    x = rows("bernoulli", 32)[0]
    with pytest.warns(UserWarning, match="RenyiELBO defines its own loss_and_grads"):
        pv.fit(
            make("bernoulli"),
            x,
            objective=RenyiELBO(alpha=0.5, num_particles=2),
            epochs=1,
            batch_size=16,
            progress=False,
        )


def test_a_pair_whose_settings_keep_changing_is_run_eagerly(monkeypatch):
    monkeypatch.setattr("pyro_vae.training.tracing.MOST_GRAPHS", 4)
    stock, run = Run("normalized"), Run("normalized", engine="traced")
    for number in range(4):
        run.pair.encoder[3].p = stock.pair.encoder[3].p = number / 20
        assert_same(stock.step(number), run.step(number))
    run.pair.encoder[3].p = stock.pair.encoder[3].p = 0.9
    with pytest.warns(UserWarning, match="keeps changing"):
        found = run.step(6)
    assert_same(stock.step(6), found)
    assert_same(stock.step(7), run.step(7))
    assert_state(stock, run)
    assert run.engine.engine == "eager"


def test_an_engine_takes_another_model_and_guide_too():
    """For example those of the pair inside a handler."""
    x = rows("plain", 8)[0]
    pair = make("plain")
    engine = Engine(pair, engine="traced", declare=False)
    heavy = pyro.poutine.scale(scale=3.0)
    with scope(pair):
        losses = []
        for model, guide in ((pair.model, pair.guide), (heavy(pair.model), heavy(pair.guide))):
            with seeded(0):
                losses.append(float(engine.loss_and_grads(model, guide, x)))
    assert losses[1] == pytest.approx(3 * losses[0])


def test_particles_in_a_plate_do_not_need_the_plate_nesting():
    pair, x = make("bernoulli"), rows("bernoulli", 32)[0]
    objective = Trace_ELBO(num_particles=3, vectorize_particles=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pv.fit(
            pair, x, objective=objective, engine="traced", epochs=1, batch_size=16, progress=False
        )


def test_parameters_that_only_the_store_knows_are_not_frozen():
    pair, x = make("params"), rows("params")[0]
    engine = Engine(pair, engine="traced")
    with pytest.warns(UserWarning, match=r"pyro_vae\.check adopts it"), scope(pair):
        engine.loss_and_grads(pair.model, pair.guide, x)
