"""The path of a GPU, on the CPU: everything but the capture. `test_gpu` has what needs a GPU."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import ALL, GLOBAL, make, rows

import pyro_vae as pv
from pyro_vae import compat
from pyro_vae.data.order import Place, order
from pyro_vae.data.preparation import held_rows
from pyro_vae.data.sources import Arrays
from pyro_vae.errors import NotTraceable, UsageError
from pyro_vae.pairs.noise import new_number
from pyro_vae.pairs.rng import seeded
from pyro_vae.pairs.traces import BadNumbers
from pyro_vae.training import step as steps
from pyro_vae.training import tidying
from pyro_vae.training.check import declare, require
from pyro_vae.training.elbo import elbo
from pyro_vae.training.step_noise import StepNoise
from pyro_vae.training.stopping import NonFiniteError
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


def normal_pair():
    with seeded(0):
        return pv.VAE.mlp((6,), latent_dim=2, hidden=(5,), likelihood=pv.Gaussian(1.0))


class Validated(torch.nn.Module):
    """A pair with torch's own validation, which raises an error for parameters that are NaN."""

    def __init__(self):
        super().__init__()
        with seeded(0):
            self.decode, self.encode = torch.nn.Linear(2, 6), torch.nn.Linear(6, 4)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encode(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def with_bad(numbers):
    """Rows of which some have no finite density."""
    with seeded(1):
        x = torch.randn(270, 6)
    x[numbers] = 1e25
    return x


BAD = {"one of the first step": 0, "one of the first group": 100, "one of a later group": 200}


@pytest.mark.filterwarnings("ignore:.*value", "ignore:left out the minibatch")
@pytest.mark.parametrize("make", [normal_pair, Validated])
@pytest.mark.parametrize("at", BAD)
def test_draws_after_a_minibatch_that_is_left_out(at, make, request):
    """They are those of the eager engine, however late the numbers are read."""
    x = with_bad(order(0, 0, 270)[BAD[at]])
    settings = {"epochs": 2, "batch_size": 16, "progress": False, "on_nonfinite": "skip"}
    pairs = [make() for _ in range(3)]
    told = [pv.fit(pairs[0], x, engine="eager", **settings)]
    told.append(pv.fit(pairs[1], x, engine="traced", **settings))
    request.getfixturevalue("gpu")
    told.append(pv.fit(pairs[2], x, engine="traced", **settings))
    for pair, history in zip(pairs[1:], told[1:], strict=True):
        assert history["skipped"] == [1, 1]
        assert history["elbo"] == pytest.approx(told[0]["elbo"], rel=1e-5)
        for p, q in zip(pair.parameters(), pairs[0].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*value")
def test_an_error_of_the_first_group_names_the_rows(gpu):
    """The first run is eager, with validation, and raises an error of torch."""
    pair, x = Validated(), with_bad(order(0, 0, 270)[:9])
    with pytest.raises(NonFiniteError, match="epoch 1, step 1: the loss is not finite at site"):
        pv.fit(pair, x, epochs=1, batch_size=16, progress=False, engine="traced")


@pytest.mark.filterwarnings("ignore:.*value", "ignore:left out the minibatch")
@pytest.mark.parametrize("at", [3, 265])
def test_a_minibatch_that_is_left_out_late_has_its_own_size(gpu, at, monkeypatch):
    """The last one of an epoch is smaller. Averages are over the other rows."""
    x = with_bad(order(0, 0, 270)[at])
    settings = {"epochs": 1, "batch_size": 16, "progress": False, "engine": "traced"}
    settings["on_nonfinite"] = "skip"
    early = pv.fit(Validated(), x, **settings)
    monkeypatch.setitem(steps.UNREAD, "cpu", 50)
    late = pv.fit(Validated(), x, **settings)
    assert late["skipped"] == [1]
    assert late["elbo"] == pytest.approx(early["elbo"], rel=1e-6)


def test_a_group_that_cuda_cannot_capture_is_tried_once(gpu, monkeypatch):
    wanted, _ = fitted("traced")
    tried = []

    def refuse(*args):
        tried.append(args)
        raise NotTraceable("CUDA cannot capture it")

    monkeypatch.setattr("pyro_vae.training.captured.captured", refuse)
    found, _ = fitted("traced")
    assert len(tried) == 1
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("first", ["sound", "bad"])
def test_a_graph_leaves_bounds_that_are_not_finite_to_the_programs(first):
    pair, x = Validated(), with_bad(slice(0))
    objective = elbo(pair, (x,))
    graph = BoundGraph(pair, objective)
    if first == "sound":
        bound(pair, *held_rows(pair, x, ()), objective, 16, graph=graph)
    x[3] = 1e25
    held = held_rows(pair, x, ())
    found = []
    for way in (None, graph):
        try:
            found.append(repr(bound(pair, *held, objective, 16, graph=way)))
        except BadNumbers as error:
            found.append(str(error))
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore:.*value")
def test_rows_that_are_not_finite_are_left_out_of_a_group(gpu, monkeypatch):
    """A pair with buffers takes single steps then, so this pair has none."""
    taken = []
    several = pv.training.engine.Engine.several_steps

    def counted(self, *args):
        taken.append(several(self, *args))
        return taken[-1]

    monkeypatch.setattr(pv.training.engine.Engine, "several_steps", counted)
    pair, settings = Validated(), {"epochs": 2, "batch_size": 16, "progress": False}
    with pytest.warns(UserWarning, match="left out the minibatch"):
        history = pv.fit(
            pair,
            with_bad(order(0, 0, 270)[200]),
            on_nonfinite="skip",
            engine="traced",
            **settings,
        )
    assert taken == [True] * 4
    assert history["skipped"] == [1, 1]
    assert all(torch.isfinite(p).all() for p in pair.parameters())


class Shifted(Validated):
    """It observes x + 9 under a likelihood that checks its values."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            rate = torch.nn.functional.softplus(self.decode(z)) + 0.01
            pyro.sample("x", dist.Exponential(rate).to_event(1), obs=x + 9)


@pytest.mark.parametrize("at", [3, 100, 200, 265])
def test_a_value_outside_the_support_of_a_group(gpu, at, monkeypatch):
    """The step is named, whenever its numbers are read; a pair that validates has groups, too."""
    monkeypatch.setitem(steps.UNREAD, "cpu", 50)
    taken = []
    several = pv.training.engine.Engine.several_steps

    def counted(self, *args):
        taken.append(several(self, *args))
        return taken[-1]

    monkeypatch.setattr(pv.training.engine.Engine, "several_steps", counted)
    x, settings = with_bad(slice(0)), {"epochs": 1, "batch_size": 16, "progress": False}
    pv.fit(Shifted(), x, engine="traced", **settings)
    assert taken == [True, True]
    x[order(0, 0, 270)[at]] = -10
    words = rf"epoch 1, step {at // 16 + 1}: .*value"
    with pytest.raises(UsageError, match=words):
        pv.fit(Shifted(), x, engine="traced", **settings)
