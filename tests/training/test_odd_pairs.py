"""Pairs that keep odd things, or change in odd ways, end the same under each engine."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded
from pyro_vae.training.graph import named
from pyro_vae.training.tidying import tidy


class Odd(nn.Module):
    """A pair with an encoder that a subclass changes."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)
        self.register_buffer("t", torch.ones(()))
        self.start()

    def start(self):
        pass

    def seen(self, x):
        return x

    def decode(self, z):
        return self.decoder(z)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        loc, raw = self.encoder(self.seen(x)).chunk(2, -1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 0.1).to_event(1))


def ended(kind, engine, on_epoch=lambda pair, epoch: None, **options):
    with seeded(0):
        x, pair = torch.randn(41, 6), kind()
    options = {"epochs": 3, "batch_size": 16, "learning_rate": 0.02, "progress": False, **options}
    history = pv.fit(pair, x, engine=engine, on_epoch=[lambda e: on_epoch(pair, e)], **options)
    return pair, history


def assert_same(kind, *args, engine="traced", **options):
    (pair, history), (other, stock) = (
        ended(kind, name, *args, **options) for name in (engine, "eager")
    )
    assert history["elbo"] == pytest.approx(stock["elbo"], rel=1e-4)
    for name, value in pair.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-4, atol=1e-5)


def chunked(pair, x):
    h = x * 1.5
    before = h.exp()
    a, _ = h.chunk(2, -1)
    a.mul_(pair.t)
    return x + before - h.exp()


def unbound(pair, x):
    h = x * 1.5
    before = h.exp()
    for column in h.unbind(-1):
        column.mul_(pair.t)
    return x + before - h.exp()


def copied_by_one(pair, x):
    h = x * 1.0
    h.mul_(pair.t)
    return h + x


def filled(pair, x):
    ones = torch.ones_like(x)
    ones[:, 0].mul_(pair.t)
    return x * ones


def negated_twice(pair, x):
    h = -x
    before = -h
    h.mul_(pair.t)
    return before - h


@pytest.mark.parametrize("seen", [chunked, unbound, copied_by_one, filled, negated_twice])
def test_a_change_in_place_that_does_nothing_at_first_stays_in_the_graph(seen):
    """The graph is compared with the pair once, and then the buffer is 1."""
    kind = type("Written", (Odd,), {"seen": lambda self, x: seen(self, x)})
    assert_same(kind, lambda pair, epoch: pair.t.fill_(0.3))


def test_repeated_products_with_a_view_that_is_changed_are_not_merged():
    def run(x, t):
        first = torch.ops.aten._unsafe_view(x.mm(x), [4])
        first.mul_(t)
        return first, torch.ops.aten._unsafe_view(x.mm(x), [4])

    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    graph = torch.fx.experimental.proxy_tensor.make_fx(run, tracing_mode="fake")(x, torch.ones(()))
    tidy(graph)
    found = named(graph.forward, ["first", "second"])([x], [torch.tensor(0.5)])
    torch.testing.assert_close(found["second"], x.mm(x).view(4))


class Held(Odd):
    """Holds something of each kind that a graph would freeze."""

    def start(self):
        self.none, self.pair_of, self.list, self.dict = None, (1.0,), [1.0], {"a": [1.0]}
        self.function, self.part = torch.tanh, nn.Tanh()
        self.tensors, self.memory = [torch.ones(6)], None
        self.register_buffer("rows", torch.ones(2, 6))

    def seen(self, x):
        factor = (self.none or 1.0) * self.pair_of[0] * self.list[0] * self.dict["a"][0]
        factor = factor * getattr(self, "late", 1.0) * self.tensors[0]
        rows = self.rows.sum(0) / len(self.rows)
        return self.part(self.function(x * factor)) + rows


def hook(module, args, output):
    return output * 0.5


CHANGES = {
    "none": lambda pair: setattr(pair, "none", 0.5),
    "late": lambda pair: setattr(pair, "late", 0.5),
    "tuple": lambda pair: setattr(pair, "pair_of", (0.5,)),
    "list": lambda pair: pair.list.__setitem__(0, 0.5),
    "nested": lambda pair: pair.dict["a"].__setitem__(0, 0.5),
    "function": lambda pair: setattr(pair, "function", torch.sin),
    "part": lambda pair: setattr(pair, "part", nn.ReLU()),
    "tensor in a list": lambda pair: pair.tensors.__setitem__(0, torch.full((6,), 0.5)),
    "tensor in place": lambda pair: pair.tensors[0].mul_(0.5),
    "rows of a buffer": lambda pair: setattr(pair, "rows", torch.ones(3, 6) * pair.rows[:1]),
    "hook": lambda pair: pair.encoder.register_forward_hook(hook),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_an_epoch_takes_effect(change):
    assert_same(Held, lambda pair, epoch: epoch.epoch == 1 and CHANGES[change](pair))


class Keeps(Odd):
    """Has a tensor in a list that it changes in place, and a generator of its own."""

    def start(self):
        self.sums, self.generator = [torch.zeros(6)], torch.Generator().manual_seed(3)

    def seen(self, x):
        self.sums[0] += x.mean(0)
        return x - self.sums[0] + torch.randn(6, generator=self.generator)


def test_the_trial_of_a_graph_does_not_change_what_the_pair_keeps():
    assert_same(Keeps)


class Counts(Odd):
    def start(self):
        self.state = {"calls": 0}

    def seen(self, x):
        self.state["calls"] += 1
        return x * 1.0 if self.state["calls"] < 1000 else x


def test_a_count_in_a_dictionary_is_not_frozen():
    with pytest.warns(UserWarning, match="changes its attribute 'state' while it runs"):
        pair, _ = ended(Counts, "traced")[:2]
    assert pair.state == ended(Counts, "eager")[0].state


OWN = {
    "python": (lambda: random.Random(0), lambda generator: generator.random()),
    "numpy": (lambda: np.random.default_rng(0), lambda generator: float(generator.random())),
    "older numpy": (lambda: np.random.RandomState(0), lambda generator: float(generator.rand())),
}


@pytest.mark.parametrize("library", OWN)
def test_draws_from_a_generator_of_the_pair_are_not_frozen_and_not_lost(library):
    made, draw = OWN[library]
    methods = {
        "start": lambda self: setattr(self, "own", made()),
        "seen": lambda self, x: x + draw(self.own),
    }
    with pytest.warns(UserWarning, match="it draws from Python's or NumPy's generators"):
        assert_same(type("Draws", (Odd,), methods))


class Sometimes(Odd):
    """Has a parameter that only full minibatches use."""

    def start(self):
        self.shift = nn.Parameter(torch.ones(6))

    def decode(self, z):
        return self.decoder(z) + (self.shift if len(z) == 16 else 0.0)


@pytest.mark.parametrize("engine", ["traced", "compiled"])
def test_a_parameter_without_a_gradient_in_some_steps_moves_as_in_stock_svi(engine):
    assert_same(Sometimes, engine=engine)


@pytest.mark.parametrize("engine", ["traced", "eager"])
def test_a_resumed_run_moves_such_a_parameter_too(tmp_path, engine):
    options = {"engine": engine, "batch_size": 41, "checkpoint_seconds": 0.0}
    whole = ended(Alternating, on_epoch=alternate, epochs=4, **options)[0]
    ended(Alternating, on_epoch=alternate, epochs=1, out=tmp_path, **options)
    with seeded(0):
        x, pair = torch.randn(41, 6), Alternating()
    pair.on = 0
    seen_by = [lambda epoch: alternate(pair, epoch)]
    options |= {"learning_rate": 0.02, "progress": False, "on_epoch": seen_by}
    pv.fit(pair, x, epochs=4, out=tmp_path, resume=True, **options)
    torch.testing.assert_close(pair.shift, whole.shift, rtol=0, atol=0)


class Alternating(Odd):
    def start(self):
        self.shift, self.on = nn.Parameter(torch.ones(6)), 1

    def decode(self, z):
        return self.decoder(z) + (self.shift if self.on else 0.0)


def alternate(pair, epoch):
    pair.on = int(epoch.epoch % 2 == 0)


class Frozen(Odd):
    def start(self):
        self.encoder.weight.requires_grad_(False)


@pytest.mark.parametrize("engine", ["traced", "eager"])
def test_a_parameter_that_was_frozen_at_the_start_is_not_trained_later(engine):
    def unfreeze(pair, epoch):
        pair.encoder.weight.requires_grad_(True)

    with pytest.raises(pv.UsageError, match="was not declared, or was frozen, at the first step"):
        ended(Frozen, engine, unfreeze)


class Sparse(Odd):
    def start(self):
        self.table = nn.Embedding(4, 6, sparse=True)

    def seen(self, x):
        return x + self.table((x[:, 0] > 0).long())


@pytest.mark.parametrize("engine", ["traced", "eager"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr=lr)])
def test_sparse_gradients_are_refused(engine, optimizer):
    with pytest.raises(pv.UsageError, match="a parameter has a sparse gradient"):
        ended(Sparse, engine, optimizer=optimizer)


class Recurrent(Odd):
    """torch keeps lists of the weights of its recurrent networks, and renews them itself."""

    def start(self):
        self.gru = nn.GRU(1, 6, batch_first=True)

    def seen(self, x):
        return self.gru(x[..., None])[0][:, -1]


def test_a_recurrent_network_is_traced(recwarn):
    assert_same(Recurrent)
    assert not recwarn


@pytest.mark.parametrize("engine", ["traced", "compiled"])
def test_a_parameter_that_is_frozen_for_an_epoch_keeps_its_own_count_of_steps(engine):
    def freeze(pair, epoch):
        pair.decoder.weight.requires_grad_(epoch.epoch != 1)

    assert_same(Odd, freeze, engine=engine)
