"""Training on a GPU: captured graphs with their update, and numbers that wait there."""

import functools
import gc
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import ALL, GLOBAL, make, rows
from torch import nn
from torch.utils.data import TensorDataset

import pyro_vae as pv
from pyro_vae.pairs.noise import COUNTED_BITS
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import registered, scope
from pyro_vae.training.check import require
from pyro_vae.training.elbo import elbo
from pyro_vae.training.engine import Engine, Step
from pyro_vae.training.optimizer import Optimizer
from pyro_vae.training.rows import place
from pyro_vae.training.stopping import NonFiniteError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def moved(batch, device):
    return tuple(tensor.to(device) for tensor in batch)


class Run:
    """A pair in training, on a device, with noise by counters."""

    def __init__(self, name, engine, device="cuda", optimizer=torch.optim.Adam, **options):
        self.pair = make(name) if isinstance(name, str) else name
        made = name if isinstance(name, str) else "bernoulli"
        place(self.pair, torch.device(device), (rows(made)[0], rows(made)[1:]), 0)
        self.batches = [moved(rows(made, n, seed), device) for n, seed in ((12, 1), (7, 2))]
        objective = elbo(self.pair, self.batches[0])
        require(self.pair, self.batches[0], objective)
        self.parameters = dict(self.pair.named_parameters())
        self.optimizer = Optimizer(optimizer, self.parameters, 0.01, clip_norm=5.0)
        num_data = 25 if made in GLOBAL else None
        self.engine = Engine(
            self.pair,
            objective,
            engine,
            declare=False,
            noise=True,
            optimizer=self.optimizer,
            num_data=num_data,
            batch_size=12,
            **options,
        )
        model = registered(self.pair, self.pair.model)
        self.svi = Step(model, self.pair.guide, self.optimizer, self.engine)

    def steps(self, number=5):
        losses = []
        with scope(self.pair):
            for i in range(number):
                self.engine.beta = 0.5 + 0.1 * i
                self.optimizer.learning_rate = 0.01 / (1 + i)
                with seeded(i):
                    losses.append(float(self.svi.step(*self.batches[i % 3 == 2])))
        return torch.tensor(losses)

    def state(self):
        return {k: v.detach().cpu().double() for k, v in self.pair.state_dict().items()}


def assert_alike(a, b, tolerance=1e-6):
    for name, value in a.state().items():
        torch.testing.assert_close(b.state()[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", [*ALL, *GLOBAL])
def test_a_captured_step_is_that_of_the_eager_engine(name):
    eager, traced = Run(name, "eager"), Run(name, "traced")
    torch.testing.assert_close(traced.steps(), eager.steps(), rtol=1e-6, atol=1e-6)
    assert traced.engine.engine == "traced"
    assert_alike(eager, traced)


@pytest.mark.parametrize("name", ["bernoulli", "mixture", "hierarchical", "bayesian", "multilevel"])
def test_a_compiled_step_is_that_of_the_eager_engine(name):
    eager, compiled = Run(name, "eager"), Run(name, "compiled")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        losses = compiled.steps()
    torch.testing.assert_close(losses, eager.steps(), rtol=1e-6, atol=1e-6)
    assert compiled.engine.engine == "compiled"
    assert_alike(eager, compiled)


@pytest.mark.parametrize("name", [*ALL, *GLOBAL])
def test_a_gpu_takes_the_step_of_a_cpu(name):
    """The noise is the same on every device, and so are loss and parameters."""
    ends = [Run(name, "eager", "cpu"), Run(name, "traced", "cuda")]
    losses = [run.steps(3) for run in ends]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    assert_alike(*ends)


def test_the_same_bits_on_both():
    for key in (12345, 0x548C9DECBCE65297):
        found = [COUNTED_BITS(torch.tensor(key, device=d), 7, 1000).cpu() for d in ("cpu", "cuda")]
        assert torch.equal(*found)


OPTIMIZERS = {
    "AdamW": functools.partial(torch.optim.AdamW, weight_decay=0.2, eps=1e-6),
    "decay": functools.partial(torch.optim.Adam, betas=(0.8, 0.95), weight_decay=0.1),
    "maximize": functools.partial(torch.optim.Adam, maximize=True),
    "amsgrad": functools.partial(torch.optim.Adam, amsgrad=True),
    "SGD": torch.optim.SGD,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    eager, traced = (Run("bernoulli", e, optimizer=OPTIMIZERS[name]) for e in ("eager", "traced"))
    torch.testing.assert_close(traced.steps(8), eager.steps(8), rtol=1e-6, atol=1e-6)
    assert_alike(eager, traced)


@pytest.mark.parametrize("engine", ["traced", "compiled"])
def test_a_step_does_not_wait_for_the_gpu(engine):
    run = Run("bernoulli", engine)
    run.steps(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with scope(run.pair):
            for i in range(5):
                run.optimizer.learning_rate = 0.01 / (2 + i)
                run.engine.beta = 0.1 * i
                run.svi.step(*run.batches[i % 2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(run.engine.numbers).all()


def test_a_loss_that_is_not_finite_moves_no_parameter():
    run = Run("gaussian-fixed", "traced")
    run.steps(3)
    before = run.state()
    state = {k: v.clone() for k, v in run.optimizer.get_state()["state"][0].items()}
    bad = run.batches[0][0].clone()
    bad[3, 2] = torch.nan
    with scope(run.pair), pyro.validation_enabled(False):
        run.svi.step(bad)
    assert not torch.isfinite(run.engine.numbers[0])
    for name, value in run.state().items():
        assert torch.equal(value, before[name])
    for name, value in run.optimizer.get_state()["state"][0].items():
        assert torch.equal(value, state[name]), name
    run.steps(2)
    assert all(torch.isfinite(value).all() for value in run.state().values())


def data(n=300):
    with seeded(5):
        z = torch.randn(n, 2)
        return (torch.sigmoid(3 * z @ torch.randn(2, 12)) > torch.rand(n, 12)).float()


def vae(**keywords):
    torch.manual_seed(3)
    return pv.VAE.mlp((12,), latent_dim=2, hidden=(16,), **keywords)


FIT = {"batch_size": 30, "learning_rate": 0.01, "progress": False, "device": "cuda"}


def fitted(engine="traced", epochs=4, pair=None, x=None, **options):
    pair = vae() if pair is None else pair
    x = data() if x is None else x
    options = FIT | options
    schedule = pv.CosineSchedule(4)
    history = pv.fit(
        pair,
        x,
        validation=data()[:50],
        engine=engine,
        epochs=epochs,
        beta=pv.LinearSchedule(2),
        learning_rate_schedule=schedule,
        clip_norm=3.0,
        **options,
    )
    return pair, history


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fit_with_each_engine(precision):
    ends = {e: fitted(e, precision=precision) for e in ("eager", "traced", "compiled")}
    tolerance = 1e-3 if precision == "float32" else 0.05
    pair, history = ends["eager"]
    for other, told in (ends["traced"], ends["compiled"]):
        assert told["elbo"] == pytest.approx(history["elbo"], rel=tolerance)
        assert told["gradient_norm"] == pytest.approx(history["gradient_norm"], rel=0.02)
        for p, q in zip(pair.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0.05, atol=tolerance * 5)


def test_a_gpu_ends_where_a_cpu_ends():
    (a, told), (b, heard) = (fitted(device=device) for device in ("cpu", "cuda"))
    assert told["elbo"] == pytest.approx(heard["elbo"], rel=1e-4)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("engine", ["traced", "compiled"])
def test_several_steps_at_once_are_single_steps(engine, monkeypatch):
    many, told = fitted(engine, batch_size=20)
    monkeypatch.setattr("pyro_vae.training.step.SEVERAL", 1)
    single, heard = fitted(engine, batch_size=20)
    assert all(map(torch.equal, many.parameters(), single.parameters()))
    assert told["elbo"] == heard["elbo"]
    assert told["gradient_norm"] == heard["gradient_norm"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("engine", ["eager", "traced", "compiled"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, engine):
    whole, _ = fitted(engine, out=tmp_path / "whole")

    def stop(epoch):
        if epoch.epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        fitted(engine, out=tmp_path / "part", on_epoch=[stop])
    part, _ = fitted(engine, out=tmp_path / "part", resume=True)
    for p, q in zip(whole.parameters(), part.parameters(), strict=True):
        assert torch.equal(p, q)


def test_two_runs_are_the_same():
    (a, _), (b, _) = fitted(), fitted()
    assert all(map(torch.equal, a.parameters(), b.parameters()))


def test_a_run_is_read_and_resumed_on_a_cpu(tmp_path):
    pair, _ = fitted(out=tmp_path / "run", epochs=2)
    read = pv.load(tmp_path / "run")
    assert next(read.parameters()).device.type == "cpu"
    for p, q in zip(pair.parameters(), read.parameters(), strict=True):
        assert torch.equal(p.cpu(), q)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_rows_whose_loss_is_not_finite_are_named(engine):
    x = torch.randn(300, 12)
    x[123] = 1e25
    gaussian = vae(likelihood=pv.Gaussian(1.0))
    with pytest.raises(NonFiniteError, match=r"row 123 of") as caught:
        fitted(engine, pair=gaussian, x=x)
    assert caught.value.rows == (123,)


def test_a_minibatch_that_is_not_finite_is_left_out():
    x = torch.randn(300, 12)
    x[123] = 1e25
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair, history = fitted(pair=vae(likelihood=pv.Gaussian(1.0)), x=x, on_nonfinite="skip")
    assert all(torch.isfinite(p).all() for p in pair.parameters())
    assert history["skipped"] == [1, 1, 1, 1]


class Odd(nn.Module):
    """A pair with constants on the CPU, and one that CUDA cannot capture."""

    def __init__(self, kind):
        super().__init__()
        self.encoder, self.decoder, self.kind = nn.Linear(6, 4), nn.Linear(2, 6), kind
        self.temperature = torch.tensor(2.0)

    def shift(self, x):
        if self.kind == "arange":
            return torch.arange(6).to(x.device) / 6
        if self.kind == "literal":
            return torch.tensor([0.1] * 6, device=x.device)
        if self.kind == "random":
            return torch.rand(6).to(x.device)
        if self.kind == "scalar":
            return self.temperature
        return x.new_zeros(6)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            logits = self.decoder(z) + self.shift(x)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw)).to_event(1))


def odd(kind):
    with seeded(0):
        return Odd(kind).double()


def test_values_outside_the_support_are_named_by_their_step(monkeypatch):
    """The graph counts them, also if the data set has not seen them."""
    everything = "pyro_vae.data.supports.Allowed.__call__"
    monkeypatch.setattr(everything, lambda self, x: torch.ones_like(x, dtype=torch.bool))
    x = (torch.rand(300, 6) > 0.5).double()
    x[200] = 2.0
    told = []
    for device in ("cpu", "cuda"):
        with pytest.raises(pv.UsageError) as caught:
            pv.fit(odd(""), TensorDataset(x), epochs=2, **FIT | {"device": device})
        told.append(str(caught.value))
    assert told[0] == told[1]


@pytest.mark.parametrize("kind", ["arange", "literal", "scalar"])
def test_constants_on_the_cpu(kind):
    eager, traced = Run(odd(kind), "eager"), Run(odd(kind), "traced")
    torch.testing.assert_close(traced.steps(), eager.steps(), rtol=1e-6, atol=1e-6)
    assert traced.engine.engine == "traced"
    if kind == "scalar":  # a number on the CPU becomes part of the captured graph
        for run in (eager, traced):
            run.pair.temperature.fill_(-3.0)
        torch.testing.assert_close(traced.steps(), eager.steps(), rtol=1e-6, atol=1e-6)


def test_what_cuda_cannot_capture_runs_eagerly():
    run, eager = Run(odd("random"), "traced"), Run(odd("random"), "eager")
    with pytest.warns(UserWarning, match="by the eager engine, because CUDA cannot capture"):
        losses = run.steps()
    torch.testing.assert_close(losses, eager.steps(), rtol=1e-6, atol=1e-6)
    assert run.engine.engine == "eager"
    again = Run("bernoulli", "traced")
    again.steps()
    assert again.engine.engine == "traced"


def test_tools_agree_with_the_cpu():
    pair, _ = fitted(epochs=20)
    x, cpu = data()[:40], vae()
    cpu.load_state_dict({k: v.cpu() for k, v in pair.state_dict().items()})
    for engine in ("eager", "traced", "compiled"):
        found = pv.log_likelihood(pair, x, num_samples=3000, engine=engine)
        exact = pv.log_likelihood(cpu, x, num_samples=3000, engine="eager")
        assert (found.per_datum.cpu() - exact.per_datum.cpu()).abs().max() < 0.15
    torch.testing.assert_close(pv.encode(pair, x)["z"].cpu(), pv.encode(cpu, x)["z"])
    torch.testing.assert_close(pv.reconstruct(pair, x).cpu(), pv.reconstruct(cpu, x))
    assert len(pv.sample(pair, 5)) == 5
    a, b = pv.evaluate(pair, x, num_samples=200), pv.evaluate(cpu, x, num_samples=200)
    assert a.elbo == pytest.approx(b.elbo, abs=0.1)


def test_diagnoses_run():
    pair, _ = fitted(epochs=20)
    x = data()
    assert str(pv.gaps(pair, x[:4], steps=20, progress=False))
    assert str(pv.nuts(pair, x[:2], num_draws=50, warmup=50, progress=False))
    assert str(pv.diagnose(pair, x, train=x, progress=False))


def test_pyro_params_that_start_on_the_cpu():
    """A program that declares them by ``torch.zeros(2)`` trains on a GPU."""
    ends = []
    for device in ("cpu", "cuda"):
        pair = make("params")
        pv.fit(pair, *rows("params"), epochs=2, progress=False, device=device)
        ends.append({name: p.detach().cpu() for name, p in pair.named_parameters()})
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-6)


def test_memory_is_flat():
    sizes = []
    for _ in range(5):
        fitted(epochs=1)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        sizes.append(torch.cuda.memory_reserved())
    assert sizes[-1] <= sizes[2]


def test_rows_that_do_not_fit_stay_on_the_cpu(monkeypatch):
    ends = []
    for free in (None, 1000):
        if free is not None:
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        ends.append(fitted()[0])
    assert all(map(torch.equal, ends[0].parameters(), ends[1].parameters()))
