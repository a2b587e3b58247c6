"""Gradients that lie in memory in another order than their parameter, in every engine.

``autograd.grad`` returns them as they are, and the fused kernels of torch read memory in order.
"""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded
from pyro_vae.training.optimizer import Optimizer

USES = {
    "transposed": lambda w: w.t(),
    "permuted": lambda w: w.reshape(3, 2, 3).permute(2, 0, 1).reshape(3, 6),
    "flipped": lambda w: w.flip(0).t(),
    "sum": lambda w: w.sum() + w.t().cos(),
    "row": lambda w: w[:1].expand(6, 3).t() + w.t().sin(),
    "diagonal": lambda w: w.t() * w.diagonal()[:, None],
    "columns": lambda w: torch.stack([w[:, j] for j in range(3)]),
    "einsum": lambda w: torch.einsum("ij,kj->jk", torch.ones(2, 3), w),
}
"""Functions of a parameter of shape (6, 3), with values of shape (3, 6)."""


class Pair(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.weight, self.encoder = nn.Parameter(torch.randn(6, 3)), nn.Linear(6, 6)
        self.use = use

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            loc = (self.use(self.weight).exp() * z[:, :, None]).sum(1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 0.1).to_event(1))


OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "AdamW": functools.partial(torch.optim.AdamW, weight_decay=0.1),
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
}


def trained(use, engine, optimizer="Adam", clip_norm=None):
    with seeded(0):
        x, pair = torch.randn(48, 6), Pair(USES[use])
    options = {"batch_size": 16, "learning_rate": 0.01, "progress": False, "clip_norm": clip_norm}
    pv.fit(pair, x, epochs=3, engine=engine, optimizer=OPTIMIZERS[optimizer], **options)
    return list(pair.parameters())


def assert_close(found, wanted):
    for p, q in zip(found, wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use", USES)
def test_a_traced_step_is_that_of_the_eager_engine(use):
    assert_close(trained(use, "traced"), trained(use, "eager"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_each_optimizer(optimizer):
    ends = [trained("sum", engine, optimizer, 5.0) for engine in ("traced", "eager")]
    assert_close(*ends)


@pytest.mark.parametrize("use", ["transposed", pytest.param("sum", marks=pytest.mark.thorough)])
def test_a_compiled_step_is_that_of_the_eager_engine(use):
    assert_close(trained(use, "compiled"), trained(use, "eager"))


PARAMETERS = {
    "plain": lambda: torch.randn(6, 3),
    "transposed": lambda: torch.randn(3, 6).t(),
    "with gaps": lambda: torch.randn(6, 6)[:, :3],
    "channels last": lambda: torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", PARAMETERS)
def test_the_optimizer_takes_any_layout(kind, name):
    """Its steps are those of torch's optimizer without a fused kernel, on a plain copy."""
    ours = PARAMETERS[kind]().requires_grad_()
    theirs = ours.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    optimizer = Optimizer(OPTIMIZERS[name], {"p": ours}, 0.1)
    plain = OPTIMIZERS[name]([theirs], lr=0.1)
    for step in range(6):
        gradient = torch.randn(ours.shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        if step == 3:  # another layout from here on, as if `.data` were replaced
            ours.data = ours.detach().mT.contiguous().mT
        optimizer([ours])
        plain.step()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-5)


def laid(pair, how):
    for module in pair.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(how(module.weight.detach()))
    return pair


LAYOUTS = {
    "transposed": lambda w: w.t().contiguous().t(),
    "with gaps": lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
}


def vae():
    with seeded(0):
        return pv.VAE.mlp((6,), latent_dim=2, hidden=(5,))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_a_pair_with_parameters_in_another_order_is_trained(layout, engine):
    """Pyro would train copies of them."""
    with seeded(1):
        x = (torch.rand(60, 6) > 0.5).float()
    ends = []
    for how in (torch.clone, LAYOUTS[layout]):
        pair = laid(vae(), how)
        pv.fit(pair, x, epochs=2, batch_size=16, engine=engine, progress=False)
        ends.append(dict(pair.named_parameters()))
    assert ends[0].keys() == ends[1].keys()
    assert_close(ends[0].values(), ends[1].values())


def test_images_with_channels_last():
    with seeded(0):
        x, pair = (torch.rand(40, 1, 8, 8) > 0.5).float(), pv.VAE.conv((1, 8, 8), latent_dim=2)
    pair.to(memory_format=torch.channels_last)
    pv.fit(pair, x, epochs=1, batch_size=20, progress=False)
    assert not any(name.startswith("pyro_param") for name, _ in pair.named_parameters())


def test_parameters_that_are_parts_of_one_tensor_are_refused():
    pair = vae()
    layer = next(module for module in pair.modules() if isinstance(module, nn.Linear))
    both = torch.cat([layer.weight.detach()] * 2, 1)
    layer.weight, layer.other = nn.Parameter(both[:, :6]), nn.Parameter(both[:, 6:])
    with pytest.raises(pv.UsageError, match="are parts of one tensor"):
        pv.fit(pair, torch.ones(20, 6), epochs=1, batch_size=10, progress=False)


@pytest.mark.parametrize("engine", ["traced", "compiled"])
def test_a_parameter_that_is_replaced_in_training_by_another_layout_is_refused(engine):
    pair = vae()

    def replace(epoch):
        pair.decoder.network.layers[0].weight.data = torch.ones(2, 5).t()

    options = {"batch_size": 10, "progress": False, "on_epoch": [replace], "engine": engine}
    warned = pytest.warns(UserWarning, match="by the eager engine")
    with warned, pytest.raises(pv.UsageError, match="is not contiguous in memory"):
        pv.fit(pair, torch.ones(20, 6), epochs=2, **options)
