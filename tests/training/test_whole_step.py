"""A compiled step that contains its update is the traced step and torch's own optimizer."""

import functools

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
}


def started(engine: str, constructor, clip_norm=None) -> tuple[pv.VAE, Step, Optimizer]:
    with seeded(0):
        vae = pv.VAE.mlp((6,), latent_dim=2, hidden=(5,), activation=torch.nn.Tanh)
    trained = dict(vae.named_parameters())
    optimizer = Optimizer(constructor, trained, 0.05, clip_norm)
    loss = Engine(vae, Trace_ELBO(), engine, declare=False, noise=True, optimizer=optimizer)
    return vae, Step(vae.model, vae.guide, optimizer, loss), optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compiled_steps_end_where_torchs_optimizer_does(name):
    ends, norms, losses = {}, {}, {}
    x = torch.rand(8, 6).round()
    for engine in ("traced", "compiled"):
        vae, svi, optimizer = started(engine, OPTIMIZERS[name], clip_norm=4.0)
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


def test_a_gradient_that_is_not_finite_changes_nothing():
    vae, svi, optimizer = started("compiled", torch.optim.Adam)
    x = torch.rand(8, 6).round()
    svi.step(x)
    before = [p.detach().clone() for p in vae.parameters()]
    state = [value.clone() for value in optimizer.for_graphs().held.values()]
    with pytest.raises(FloatingPointError):
        svi.step(torch.full_like(x, torch.nan))
    assert all(map(torch.equal, before, vae.parameters()))
    assert all(map(torch.equal, state, optimizer.for_graphs().held.values()))
    assert optimizer.get_state()["state"][0]["step"] == 1


def test_every_engine_draws_the_same_noise():
    ends = {}
    x = torch.rand(50, 6)
    for engine in ("eager", "traced"):
        with seeded(0):
            vae = pv.VAE.mlp((6,), latent_dim=2, hidden=(5,))
        history = pv.fit(vae, x, epochs=2, batch_size=20, engine=engine, progress=False)
        ends[engine] = history["elbo"]
    assert ends["eager"] == pytest.approx(ends["traced"], rel=1e-5)


def test_a_parameter_without_a_gradient_keeps_the_update_outside():
    vae, svi, optimizer = started("compiled", torch.optim.Adam)
    vae.unused = torch.nn.Parameter(torch.ones(2))
    trained = dict(vae.named_parameters())
    optimizer = Optimizer(torch.optim.Adam, trained, 0.05)
    engine = Engine(vae, Trace_ELBO(), "compiled", declare=False, noise=True, optimizer=optimizer)
    svi = Step(vae.model, vae.guide, optimizer, engine)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    svi.step(torch.rand(8, 6).round())
    assert engine._whole is None
    assert engine.engine == "compiled"
    moved = {n for n, p in vae.named_parameters() if not torch.equal(p, before[n])}
    assert moved == before.keys() - {"unused"}
