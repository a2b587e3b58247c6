"""A compiled step that contains its update is the traced step and torch's own optimizer."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded
from pyro_vae.training.engine import Engine, Step
from pyro_vae.training.optimizer import Optimizer

OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "betas and decay": functools.partial(torch.optim.Adam, betas=(0.8, 0.95), weight_decay=0.1),
    "AdamW": functools.partial(torch.optim.AdamW, weight_decay=0.2, eps=1e-6),
    "maximize": functools.partial(torch.optim.Adam, maximize=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_in_a_graph_is_that_of_torch(name):
    with seeded(0):
        ours = {"a": torch.randn(3, 2).requires_grad_(), "b": torch.randn(5).requires_grad_()}
    theirs = [p.detach().clone().requires_grad_() for p in ours.values()]
    optimizer = Optimizer(OPTIMIZERS[name], ours, 0.05)
    torchs = OPTIMIZERS[name](theirs, lr=0.05, fused=False)
    update = optimizer.for_graphs()
    for step in range(6):
        rate = 0.05 / (1 + step)
        optimizer.learning_rate = torchs.param_groups[0]["lr"] = rate
        with seeded(step):
            gradients = [torch.randn_like(p) for p in theirs]
        for p, gradient in zip(theirs, gradients, strict=True):
            p.grad = gradient.clone()
        torchs.step()
        norm = torch.ones(())
        update.update(list(ours.values()), gradients, norm, torch.tensor(update.numbers()))
        optimizer.stepped(norm.item())
    for p, q in zip(ours.values(), theirs, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
    saved, expected = optimizer.get_state()["state"], torchs.state_dict()["state"]
    for i, state in expected.items():
        for key, value in state.items():
            assert torch.allclose(saved[i][key], value, rtol=1e-5, atol=1e-7)


def test_a_norm_that_is_not_finite_changes_nothing():
    p = {"a": torch.ones(3).requires_grad_()}
    optimizer = Optimizer(torch.optim.Adam, p, 0.05)
    update = optimizer.for_graphs()
    numbers = torch.tensor(update.numbers())
    update.update([p["a"]], [torch.full((3,), torch.nan)], torch.tensor(torch.nan), numbers)
    assert torch.equal(p["a"], torch.ones(3))
    assert all(not value.any() for value in update.held.values())
    with pytest.raises(FloatingPointError):
        optimizer.stepped(torch.nan)
    assert optimizer.get_state()["state"][0]["step"] == 0


def started(engine: str) -> tuple[pv.VAE, Step, Optimizer]:
    with seeded(0):
        vae = pv.VAE.mlp((6,), latent_dim=2, hidden=(5,), activation=torch.nn.Tanh)
    trained = dict(vae.named_parameters())
    optimizer = Optimizer(OPTIMIZERS["AdamW"], trained, 0.05, clip_norm=4.0)
    loss = Engine(vae, Trace_ELBO(), engine, declare=False, noise=True, optimizer=optimizer)
    return vae, Step(vae.model, vae.guide, optimizer, loss), optimizer


def test_compiled_steps_end_where_traced_steps_do():
    ends, norms, losses = {}, {}, {}
    x = torch.rand(8, 6).round()
    for engine in ("traced", "compiled"):
        vae, svi, optimizer = started(engine)
        with seeded(1):
            losses[engine] = []
            for step in range(12):
                optimizer.learning_rate = 0.05 / (1 + step)
                losses[engine].append(float(svi.step(x)))
        norms[engine] = optimizer.gradient_norm
        ends[engine] = torch.cat([p.detach().flatten() for p in vae.parameters()])
        assert optimizer.get_state()["state"][0]["step"] == 12
    assert svi.engine._whole is not None  # not a fall back
    assert torch.allclose(ends["traced"], ends["compiled"], rtol=1e-4, atol=1e-5)
    assert losses["traced"] == pytest.approx(losses["compiled"], rel=1e-5)
    assert norms["traced"] == pytest.approx(norms["compiled"], rel=1e-4)

    before = [p.detach().clone() for p in vae.parameters()]
    with pytest.raises(FloatingPointError):
        svi.step(torch.full_like(x, torch.nan))
    assert all(map(torch.equal, before, vae.parameters()))
    assert optimizer.get_state()["state"][0]["step"] == 12


def test_every_engine_draws_the_same_noise():
    ends = {}
    x = torch.rand(50, 6)
    for engine in ("eager", "traced"):
        with seeded(0):
            vae = pv.VAE.mlp((6,), latent_dim=2, hidden=(5,))
        history = pv.fit(vae, x, epochs=2, batch_size=20, engine=engine, progress=False)
        ends[engine] = history["elbo"]
    assert ends["eager"] == pytest.approx(ends["traced"], rel=1e-5)


def uncompiled(monkeypatch, vae: torch.nn.Module) -> tuple[Engine, Step]:
    """An engine whose compiled steps run the graph as it is."""
    optimizer = Optimizer(torch.optim.Adam, dict(vae.named_parameters()), 0.05)
    engine = Engine(vae, Trace_ELBO(), "compiled", declare=False, optimizer=optimizer)
    monkeypatch.setattr("pyro_vae.compat.compile_graph", lambda graph, *_: graph.forward)
    return engine, Step(vae.model, vae.guide, optimizer, engine)


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
def test_a_parameter_that_is_frozen_later_stays_and_others_keep_their_own_state(monkeypatch):
    ends = []
    for engine_name in ("compiled", "eager"):
        vae, _, _ = started("traced")
        engine, svi = uncompiled(monkeypatch, vae)
        engine.engine = engine_name
        with seeded(3):
            for step in range(4):
                svi.step(torch.rand(8, 6).round())
                if step == 1:
                    first = next(vae.parameters())
                    first.requires_grad_(False)
                    kept = first.clone()
        assert torch.equal(first, kept)
        ends.append(torch.cat([p.detach().flatten() for p in vae.parameters()]))
    assert torch.allclose(*ends, rtol=1e-4, atol=1e-5)


def test_another_state_of_the_optimizer_takes_effect(monkeypatch):
    x = torch.rand(8, 6).round()
    ends = []
    for again in (False, True):
        vae, _, _ = started("traced")
        engine, svi = uncompiled(monkeypatch, vae)
        with seeded(3):
            for step in range(4):
                svi.step(x)
                if again and step == 1:
                    svi.optim.set_state(svi.optim.get_state())
        assert engine._whole is not None
        ends.append(torch.cat([p.detach().flatten() for p in vae.parameters()]))
    assert torch.equal(*ends)


def test_a_value_outside_the_support_moves_nothing(monkeypatch):
    class Checked(pv.VAE):
        def model(self, x: torch.Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                logits = self.decoder.network(z)
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    with seeded(0):
        plain = pv.VAE.mlp((6,), latent_dim=2, hidden=(5,))
        vae = Checked(plain.encoder, plain.decoder, plain.prior)
    engine, svi = uncompiled(monkeypatch, vae)
    svi.step(torch.rand(8, 6).round())
    assert engine._whole is not None
    before = [p.detach().clone() for p in vae.parameters()]
    with pytest.raises(ValueError, match="outside its support"):
        svi.step(torch.full((8, 6), 3.0))
    assert all(map(torch.equal, before, vae.parameters()))


def test_a_parameter_without_a_gradient_keeps_the_update_outside(monkeypatch):
    vae, _, _ = started("traced")
    vae.unused = torch.nn.Parameter(torch.ones(2))
    engine, svi = uncompiled(monkeypatch, vae)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    svi.step(torch.rand(8, 6).round())
    assert engine._whole is None
    moved = {n for n, p in vae.named_parameters() if not torch.equal(p, before[n])}
    assert moved == before.keys() - {"unused"}


class Priced(torch.nn.Module):
    """A mean, and a factor that does not depend on it, so the gradient stays finite."""

    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("price", torch.zeros(()))

    def model(self, x):
        pyro.factor("price", self.price)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.mean, 1.0), obs=x)

    def guide(self, x):
        pass


def test_a_loss_that_is_not_finite_changes_nothing_although_its_gradient_is_finite(monkeypatch):
    pair, x = Priced(), torch.ones(4)
    engine, svi = uncompiled(monkeypatch, pair)
    svi.step(x)
    assert engine._whole is not None
    moved = pair.mean.item()
    assert moved > 0
    pair.price.fill_(torch.inf)
    with pytest.raises(FloatingPointError):
        svi.step(x)
    assert pair.mean.item() == moved
    assert svi.optim.get_state()["state"][0]["step"] == 1
