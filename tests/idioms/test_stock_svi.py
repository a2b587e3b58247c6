"""Fifty steps of every idiom, by the engine and by stock Pyro, with the same noise."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import pytest
import torch
from idiom import Batch, Idiom
from pyro.infer import SVI
from registry import IDIOMS
from torch import Tensor, nn

from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.scope import registered, scope
from pyro_vae.training.check import require
from pyro_vae.training.elbo import elbo
from pyro_vae.training.engine import Engine, Step
from pyro_vae.training.optimizer import Optimizer

STEPS, RATE = 50, 0.01


@contextmanager
def double() -> Iterator[None]:
    """Run in double precision, in which fifty steps stay close to each other."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def start(idiom: Idiom) -> tuple[nn.Module, Batch, dict[str, Tensor]]:
    """Return a pair that has all its parameters, its data, and the values at the start."""
    pair, batch = idiom.seeded()
    require(pair, batch)
    return pair, batch, {name: value.clone() for name, value in pair.state_dict().items()}


def by_engine(idiom: Idiom, engine: str) -> dict[str, Tensor]:
    """Return the parameters after the steps that `fit` would make on all data at once."""
    pair, batch, _ = start(idiom)
    number = int(len(batch[0]) / idiom.share)
    made = Engine(pair, elbo(pair, batch), engine, num_data=number, declare=False)
    trained = {name: p for name, p in pair.named_parameters() if p.requires_grad}
    optimizer = Optimizer(torch.optim.Adam, trained, RATE)
    svi = Step(registered(pair, pair.model), pair.guide, optimizer, made)
    for step in range(STEPS):
        with scope(pair), seeded(step):
            svi.step(*batch)
    return {name.removeprefix("pyro_param."): p.detach() for name, p in pair.named_parameters()}


def by_stock(idiom: Idiom) -> dict[str, Tensor]:
    """Return the parameters after the same steps of stock Pyro, in its own store."""
    _, _, values = start(idiom)
    pair, batch = idiom.seeded()
    pyro.clear_param_store()
    pair.guide(*batch)  # an AutoGuide makes its parameters
    own = {name: value for name, value in values.items() if not name.startswith("pyro_param.")}
    pair.load_state_dict(own)
    adam, objective = pyro.optim.Adam({"lr": RATE}), idiom.stock()
    model, guide = (pyro.poutine.scale(run, idiom.share) for run in (pair.model, pair.guide))
    svi = SVI(model, guide, adam, objective)
    for step in range(STEPS):
        pyro.set_rng_seed(step)
        svi.step(*batch)
    declared = {name: p.detach() for name, p in pyro.get_param_store().named_parameters()}
    return declared | {name: p.detach() for name, p in pair.named_parameters()}


@pytest.mark.sample(16)
@pytest.mark.parametrize(
    "idiom", [one for one in IDIOMS if "fit" not in one.refuses], ids=lambda one: one.name
)
def test_fifty_steps_are_those_of_stock_svi(idiom: Idiom):
    with double(), torch.random.fork_rng():
        ours, stock = by_engine(idiom, "eager"), by_stock(idiom)
        before = start(idiom)[2]
    assert ours
    for name, value in ours.items():
        torch.testing.assert_close(value, stock[name], rtol=0, atol=1e-6, msg=name)
    assert any(
        not torch.equal(value, before.get(name, before.get(f"pyro_param.{name}", value)))
        for name, value in ours.items()
    )
