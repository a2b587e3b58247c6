"""Engines in `fit` and in `log_likelihood`."""

import warnings

import pyro.optim
import pytest
import torch
from engine_helpers import Noisy, Run, assert_same
from pairs import make, rows
from pyro.infer import SVI

import pyro_vae as pv
from pyro_vae.data.preparation import Preparation
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import registered, scope
from pyro_vae.training.check import require
from pyro_vae.training.engine import Engine


def test_any_svi_takes_an_engine():
    """Stock SVI has an optimizer for each parameter, and must see the parameters as sites."""
    x = rows("plain", 16)[0]
    ends = []
    for engine in ("eager", "traced"):
        pair = make("plain")
        svi = SVI(
            registered(pair, pair.model) if engine == "eager" else pair.model,
            pair.guide,
            pyro.optim.Adam({"lr": 0.05}),
            Engine(pair, engine=engine),
        )
        with pyro.get_param_store().scope():
            for number in range(20):
                with seeded(number):
                    loss = svi.step(x)
        assert isinstance(loss, float)
        ends.append((loss, *pair.state_dict().values()))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


def test_auto_compiles_where_the_steps_repay_it(monkeypatch):
    run = Run("bernoulli", engine="auto", batch_size=12, steps=100)
    run.step(0)
    assert run.engine.engine == "traced"
    monkeypatch.setattr("pyro_vae.training.engine.COMPILE_SECONDS", 0.01)
    run = Run("bernoulli", engine="auto", batch_size=12, steps=100)
    run.step(0)
    assert run.engine.engine == "compiled"


def test_without_a_compiler_the_graph_is_replayed(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler was found")

    monkeypatch.setattr("pyro_vae.training.tracing._compile", broken)
    stock, run = Run("bernoulli"), Run("bernoulli", engine="compiled")
    with pytest.warns(UserWarning, match="replayed, not compiled: RuntimeError: no compiler"):
        assert_same(stock.step(0), run.step(0))
    assert_same(stock.step(1), run.step(1))


def test_a_graph_whose_draws_the_compiler_would_change_is_replayed():
    stock, run = Run("discrete"), Run("discrete", engine="compiled")
    with pytest.warns(UserWarning, match="replayed, not compiled: its draws or values"):
        assert_same(stock.step(0), run.step(0))


@pytest.mark.parametrize("graph", ["traced", "compiled"])
def test_preparation_is_part_of_the_graph(graph):
    """8-bit intensities become binary pixels in the graph, with the draws of the eager step."""
    x = (torch.rand(16, 6) * 255).to(torch.uint8)
    losses = []
    for engine in ("eager", graph):
        pair = make("bernoulli")
        prepare = Preparation(torch.device("cpu"), torch.float64, binarize=True)
        runner = Engine(pair, engine=engine, prepare=prepare)
        with scope(pair):
            for number in range(3):
                with seeded(number):
                    losses.append(float(runner.loss_and_grads(pair.model, pair.guide, x)))
        assert runner.engine == engine
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-10)
    assert len(set(losses[:3])) == 3


def test_losses_read_seldom_are_the_same(monkeypatch):
    x = rows("bernoulli", 40)[0]
    histories = []
    for waiting in (1, 7):
        monkeypatch.setattr("pyro_vae.training.step.UNREAD", {"cpu": waiting})
        histories.append(
            pv.fit(make("bernoulli"), x, epochs=5, batch_size=4, progress=False).epochs
        )
    for a, b in zip(*histories, strict=True):
        assert a.row().items() - {("seconds", a.seconds)} == b.row().items() - {
            ("seconds", b.seconds)
        }


def test_the_history_is_the_same_norms_and_parts_and_clipping_too():
    x = rows("params", 40)[0]
    histories = []
    for engine in ("eager", "traced"):
        pair = make("params")
        found = pv.fit(
            pair,
            x,
            epochs=3,
            batch_size=16,
            clip_norm=2.0,
            beta=0.5,
            engine=engine,
            learning_rate=0.02,
            progress=False,
        )
        histories.append(
            [{k: v for k, v in e.row().items() if k != "seconds"} for e in found.epochs]
        )
    for eager, traced in zip(*histories, strict=True):
        assert traced == pytest.approx(eager, rel=1e-6)
    assert histories[0][0]["gradient_norm"] > 2.0  # so clipping has an effect


@pytest.mark.sample(1)
@pytest.mark.parametrize("engine", ["traced", "compiled"])
def test_resuming_is_bit_identical_under_each_engine(tmp_path, engine):
    x = rows("bernoulli", 60)[0]
    options = {"batch_size": 16, "progress": False, "engine": engine}
    whole, part = make("bernoulli"), make("bernoulli")
    pv.fit(whole, x, epochs=4, **options)
    pv.fit(part, x, epochs=2, out=tmp_path, **options)
    pv.fit(part, x, epochs=4, out=tmp_path, resume=True, **options)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, part.state_dict()[name])


def test_a_resumed_run_goes_on_with_the_engine_that_it_had(tmp_path, monkeypatch):
    x = rows("bernoulli", 32)[0]
    options = {"batch_size": 16, "progress": False, "out": tmp_path}
    pv.fit(make("bernoulli"), x, epochs=2, **options)
    seen = []
    compiles = Engine._compiles
    monkeypatch.setattr("pyro_vae.training.engine.COMPILE_SECONDS", 0.0)
    monkeypatch.setattr(
        Engine, "_compiles", lambda self, *a: seen.append(self.engine) or compiles(self, *a)
    )
    pv.fit(make("bernoulli"), x, epochs=3, resume=True, **options)
    assert seen == ["traced"]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "engine"),
    [("params", "traced"), ("conditional", "traced"), ("bernoulli", "compiled")],
)
def test_log_likelihood_is_that_of_the_eager_engine(name, engine, monkeypatch):
    monkeypatch.setattr(
        "pyro_vae.inference.importance.CELLS", 6 * 8 * 70
    )  # 3 batches, 5 chunks each
    pair, batch = make(name), rows(name, 20)
    require(pair, batch)
    eager = pv.log_likelihood(pair, *batch, num_samples=300, engine="eager")
    graph = pv.log_likelihood(pair, *batch, num_samples=300, engine=engine)
    torch.testing.assert_close(graph.per_datum, eager.per_datum)
    torch.testing.assert_close(graph.standard_errors, eager.standard_errors)


def test_log_likelihood_of_what_cannot_be_traced_is_eager(monkeypatch):
    monkeypatch.setattr("pyro_vae.inference.importance.CELLS", 6 * 8 * 20)
    pair, x = Noisy("branch").double(), rows("plain", 20)[0]
    with pytest.warns(UserWarning, match="evaluated by the eager engine, because a branch"):
        found = pv.log_likelihood(pair, x, num_samples=50, engine="traced")
    eager = pv.log_likelihood(pair, x, num_samples=50, engine="eager")
    assert torch.equal(found.per_datum, eager.per_datum)


@pytest.mark.thorough
def test_bfloat16_ends_where_float32_does():
    """Over three seeds, on digits; the graph runs the networks in bfloat16, as autocast does."""
    x = pv.load_data("digits").train.x
    gaps = []
    for seed in range(3):
        ends = []
        for precision in ("float32", "bfloat16"):
            torch.manual_seed(seed)
            vae = pv.VAE.mlp((1, 8, 8), latent_dim=8, hidden=(64,))
            options = {"epochs": 12, "batch_size": 50, "seed": seed, "progress": False}
            pv.fit(vae, x, precision=precision, engine="traced", **options)
            ends.append(pv.evaluate(vae, x, num_samples=1).elbo)
        gaps.append(ends[0] - ends[1])
    assert abs(sum(gaps) / len(gaps)) < 0.1
    assert any(gap != 0 for gap in gaps)


def test_an_unknown_engine_is_refused():
    with pytest.raises(pv.UsageError, match=r"unknown engine 'trced'; did you mean 'traced'\?"):
        pv.fit(make("bernoulli"), *rows("bernoulli"), engine="trced")
    with pytest.raises(pv.UsageError, match="unknown engine 'fast'"):
        pv.log_likelihood(make("bernoulli"), *rows("bernoulli"), engine="fast")


def test_a_pair_that_is_traced_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = Run("convolutional", engine="traced")
        run.step(0)
    assert run.engine.engine == "traced"
