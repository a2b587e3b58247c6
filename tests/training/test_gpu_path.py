"""The path of a GPU, on the CPU: everything but the capture. `test_gpu` has what needs a GPU."""

import functools

import pytest
import torch
from pairs import ALL, GLOBAL, make, rows

import pyro_vae as pv
from pyro_vae import compat
from pyro_vae.data.order import Place
from pyro_vae.data.preparation import held_rows
from pyro_vae.data.sources import Arrays
from pyro_vae.pairs.noise import new_number
from pyro_vae.pairs.rng import seeded
from pyro_vae.training import step as steps
from pyro_vae.training import tidying
from pyro_vae.training.check import declare, require
from pyro_vae.training.elbo import elbo
from pyro_vae.training.step_noise import StepNoise
from pyro_vae.training.validation import BoundGraph, bound


@pytest.fixture
def gpu(monkeypatch):
    for name in ("engine", "adam", "step"):
        monkeypatch.setattr(f"pyro_vae.training.{name}.on_gpu", lambda tensor: True)


def fitted(engine, optimizer=torch.optim.Adam, x=None, **options):
    with seeded(0):
        x = (torch.rand(270, 6) > 0.4).float() if x is None else x
        pair = pv.VAE.mlp((6,), latent_dim=2, hidden=(5,))
    given = {"epochs": 3, "batch_size": 16, "learning_rate": 0.02, "clip_norm": 8.0} | options
    history = pv.fit(
        pair,
        x,
        validation=x[:20],
        engine=engine,
        optimizer=optimizer,
        progress=False,
        beta=pv.LinearSchedule(2),
        learning_rate_schedule=pv.CosineSchedule(3),
        **given,
    )
    return list(pair.parameters()), history


OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "AdamW": functools.partial(torch.optim.AdamW, weight_decay=0.2),
    "SGD": torch.optim.SGD,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_ends_where_the_eager_engine_ends(optimizer, request):
    wanted, history = fitted("eager", OPTIMIZERS[optimizer])
    request.getfixturevalue("gpu")
    for engine in ("traced", "auto"):
        found, told = fitted(engine, OPTIMIZERS[optimizer])
        for p, q in zip(found, wanted, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        assert told["elbo"] == pytest.approx(history["elbo"], rel=1e-5)
        assert told["gradient_norm"] == pytest.approx(history["gradient_norm"], rel=1e-4)
        assert told["gradient_norm_max"] == pytest.approx(history["gradient_norm_max"], rel=1e-4)


def test_several_steps_at_once_are_single_steps(gpu, monkeypatch):
    taken = []
    several = pv.training.engine.Engine.several_steps

    def counted(self, *args):
        found = several(self, *args)
        taken.append((len(args[-1]), found))
        return found

    monkeypatch.setattr(pv.training.engine.Engine, "several_steps", counted)
    many, told = fitted("traced")
    assert set(taken) == {(steps.SEVERAL, True)}
    assert len(taken) == 3 * (270 // 16 // steps.SEVERAL)
    monkeypatch.setattr(steps, "SEVERAL", 1)
    single, heard = fitted("traced")
    assert all(map(torch.equal, many, single))
    assert told["elbo"] == heard["elbo"]


def test_a_stop_between_groups_of_steps_resumes(gpu, tmp_path, monkeypatch):
    """A checkpoint may lie at any number of steps; the rest of the epoch is grouped anew."""
    whole, _ = fitted("traced", out=tmp_path / "whole")
    shown = pv.training.loop._show
    count = 0

    def stop(run, state, number):
        nonlocal count
        count += 1
        shown(run, state, number)
        if count == 4:
            pv.training.loop._interrupt(run, state)

    monkeypatch.setattr("pyro_vae.training.loop._show", stop)
    with pytest.raises(KeyboardInterrupt):
        fitted("traced", out=tmp_path / "part")
    monkeypatch.undo()
    for name in ("engine", "adam", "step"):
        monkeypatch.setattr(f"pyro_vae.training.{name}.on_gpu", lambda tensor: True)
    part, _ = fitted("traced", out=tmp_path / "part", resume=True)
    assert all(map(torch.equal, whole, part))


@pytest.mark.filterwarnings("ignore:.*value")
def test_rows_that_are_not_finite_are_left_out_of_a_group(gpu):
    with seeded(1):
        x = torch.randn(270, 6)
    x[123] = 1e25
    with seeded(0):
        pair = pv.VAE.mlp((6,), latent_dim=2, hidden=(5,), likelihood=pv.Gaussian(1.0))
    settings = {"epochs": 2, "batch_size": 16, "progress": False, "engine": "traced"}
    with pytest.warns(UserWarning, match="left out the minibatch"):
        history = pv.fit(pair, x, on_nonfinite="skip", **settings)
    assert history["skipped"] == [1, 1]
    assert all(torch.isfinite(p).all() for p in pair.parameters())


def test_groups_of_minibatches_are_the_minibatches():
    rows, place = Arrays([torch.arange(53), torch.arange(53) * 2]), Place(4, 1, 2)
    single = list(rows.epoch(5, place))
    joined = list(rows.joined(5, place, 4))
    assert [count for _, count in joined] == [4, 4, 1]
    split = [part for batch, n in joined for part in zip(*(t.chunk(n) for t in batch), strict=True)]
    assert len(split) == len(single)
    for a, b in zip(single, split, strict=True):
        assert all(map(torch.equal, a, b))


def test_several_numbers_are_those_of_single_steps():
    noise = StepNoise(True, tuple)
    with seeded(3):
        together = noise.draw_several(5)[:, 0].tolist()
        noise.draw()
        last = noise.number.item()
    with seeded(3):
        assert [new_number().item() for _ in range(6)] == [*together, last]


@pytest.mark.sample(12)
@pytest.mark.parametrize("name", [*ALL, *GLOBAL])
def test_the_bound_of_a_graph_is_that_of_the_programs(name):
    pair, batch = make(name), rows(name)
    objective = elbo(pair, batch)
    require(pair, batch, objective)
    held = held_rows(pair, batch[0], batch[1:])
    plain = bound(pair, *held, objective, 16)
    graph = BoundGraph(pair, objective)
    found = bound(pair, *held, objective, 16, graph=graph)
    assert graph.graphs is not None
    assert (found.bound, found.elbo) == pytest.approx((plain.bound, plain.elbo), rel=1e-9)
    assert found.kl == pytest.approx(plain.kl, rel=1e-9, abs=1e-12)


def test_constants_and_their_copies_are_computed_once():
    """On a GPU, a graph may copy nothing from the CPU. Here, a conversion is in its place."""

    def function(x):
        shifted = torch.arange(3).to(torch.float64) + torch.tensor([1.0, 2.0, 3.0])
        changed = torch.zeros(3)
        changed.add_(x)
        return [x * shifted + changed + torch.rand(3)]

    graph = compat.make_graph(function, [torch.ones(3)])
    nodes = {node.name: node for node in graph.graph.nodes}
    nodes["add"].meta["val"] = nodes["add"].meta["val"].to("meta")  # as if it were on a GPU
    with seeded(0):
        wanted = graph(torch.ones(3))[0]
    tidying.hold_constants(graph)
    tidying.tidy(graph)
    left = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert not any("arange" in name or "_to_copy" in name for name in left)
    assert any("rand" in name for name in left)
    with seeded(0):
        assert torch.equal(graph(torch.ones(3))[0], wanted)


def test_pyro_params_are_declared_before_a_pair_is_moved():
    pair = make("params")
    declare(pair, rows("params"))
    names = [name for name, _ in pair.named_parameters()]
    assert {"pyro_param.spread", "pyro_param.offsets/shift"} <= set(names)
