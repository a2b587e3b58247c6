"""Changes between steps of what a pair holds besides tensors and numbers take effect in graphs."""

import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.pairs.rng import seeded
from pyro_vae.training import tracing
from pyro_vae.training.plain_state import PlainState

ONES = torch.ones(6)


@dataclass
class Shift:
    by: torch.Tensor


class Pair(nn.Module):
    """A mean of x that depends on plain attributes of each kind."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)
        self.tensors, self.numbers = [torch.zeros(6)], [1.0, "tanh"]
        self.named = {"shift": torch.zeros(6), "scale": 1.0}
        self.fixed = (torch.zeros(6),)
        self.space = SimpleNamespace(shift=torch.zeros(6), scale=1.0)
        self.shift = Shift(torch.zeros(6))
        self.nested = {"of": [[torch.zeros(6)]]}
        self.function, self.base = torch.tanh, dist.Normal(torch.zeros(6), 1.0)
        self.array, self.none = np.zeros(6), None
        self.seen, self.tensor = [], torch.zeros(6)

    def mean(self, z):
        found = self.decoder(z) + self.tensors[0] + self.named["shift"] * self.named["scale"]
        found = found + self.fixed[0] + self.space.shift * self.space.scale + self.shift.by
        found = found + self.nested["of"][0][0] + self.base.mean + torch.tensor(self.array).float()
        found = found + 0.3 * self.function(torch.full((6,), self.numbers[0]))
        found = found + (0.0 if self.tensor is None else self.tensor)
        return found if self.none is None else found + self.none

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.mean(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def put(owner, key, value):
    owner[key] = value


CHANGES = {
    "a tensor of a list": lambda p: put(p.tensors, 0, ONES),
    "a number of a list": lambda p: put(p.numbers, 0, 3.0),
    "a tensor of a dictionary": lambda p: put(p.named, "shift", ONES),
    "a number of a dictionary": lambda p: (p.named["shift"].fill_(1.0), put(p.named, "scale", 3.0)),
    "a tuple": lambda p: setattr(p, "fixed", (ONES,)),
    "an attribute of an object": lambda p: setattr(p.space, "shift", ONES),
    "a number of an object": lambda p: (p.space.shift.fill_(1.0), setattr(p.space, "scale", 2.0)),
    "an object": lambda p: setattr(p, "shift", Shift(ONES)),
    "a list in a dictionary": lambda p: put(p.nested["of"][0], 0, ONES),
    "a function": lambda p: setattr(p, "function", torch.sin),
    "a distribution": lambda p: setattr(p, "base", dist.Normal(ONES, 1.0)),
    "a small array": lambda p: p.array.fill(1.0),
    "None": lambda p: setattr(p, "none", ONES),
    "a new attribute": lambda p: (setattr(p, "extra", 1), put(p.tensors, 0, ONES)),
}
FAST = {"epochs": 3, "batch_size": 20, "progress": False, "learning_rate": 0.01}


def trained(change, engine, **options):
    with seeded(0):
        pair, x = Pair(), torch.randn(60, 6)

    def see(epoch):
        if epoch.epoch == 1:
            change(pair)

    history = pv.fit(pair, x, engine=engine, on_epoch=[see], **FAST | options)
    return pair, history


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_takes_effect_as_in_the_eager_engine(name):
    (eager, told), (traced, heard) = (trained(CHANGES[name], e) for e in ("eager", "traced"))
    _, unchanged = trained(lambda pair: None, "traced")
    assert heard["elbo"] == pytest.approx(told["elbo"], rel=1e-5)
    assert abs(heard["elbo"][1] - unchanged["elbo"][1]) > 1e-3
    for p, q in zip(eager.parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


WARMTH, SETTINGS, unused = 1.0, {"warmth": 1.0}, 0


def warmed(z):
    return z * WARMTH * SETTINGS["warmth"]


def with_variable():
    """A class whose model uses a variable of this function, and the function that changes it."""
    warmth = 1.0

    class Enclosed(Pair):
        own = 1.0

        def mean(self, z):
            self.unused = None  # an attribute, and not the global variable of the same name
            return super().mean(warmed(z)) * warmth * self.own

    def change(value):
        nonlocal warmth
        warmth = value

    return Enclosed, change


VARIABLES = {
    "a global variable": lambda patch, *_: patch.setitem(globals(), "WARMTH", 2.0),
    "a global dictionary": lambda patch, *_: patch.setitem(SETTINGS, "warmth", 2.0),
    "a variable of a function": lambda patch, kind, change: change(2.0),
    "an attribute of a class": lambda patch, kind, change: patch.setattr(kind, "own", 2.0),
}


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_outside_of_the_pair_takes_effect(name):
    ends = {}
    for engine in ("eager", "traced"):
        kind, change = with_variable()
        with seeded(0):
            pair, x = kind(), torch.randn(60, 6)
        with pytest.MonkeyPatch.context() as patch:

            def see(epoch, patch=patch, kind=kind, change=change):
                if epoch.epoch == 1:
                    VARIABLES[name](patch, kind, change)

            ends[engine] = pv.fit(pair, x, engine=engine, on_epoch=[see], **FAST)["elbo"]
    assert ends["traced"] == pytest.approx(ends["eager"], rel=1e-5)
    assert abs(ends["traced"][1] - ends["traced"][0]) > 0.3


def test_only_variables_that_the_programs_look_up_count(monkeypatch):
    kind, _ = with_variable()
    state = PlainState(kind())
    before = state.now()
    monkeypatch.setitem(globals(), "unused", 5)
    monkeypatch.setitem(globals(), "FAST", {})
    assert state.now() == before
    monkeypatch.setitem(globals(), "WARMTH", 5.0)
    assert state.now() != before


def test_a_change_takes_effect_in_a_compiled_graph():
    change = CHANGES["a number of an object"]
    (_, told), (_, heard) = (trained(change, engine) for engine in ("eager", "compiled"))
    assert heard["elbo"] == pytest.approx(told["elbo"], rel=1e-4)


def test_a_tensor_that_is_replaced_by_none_leads_to_the_eager_engine():
    with pytest.warns(UserWarning, match="a tensor of it was replaced by something else"):
        _, heard = trained(lambda pair: setattr(pair, "tensor", None), "traced")
    _, told = trained(lambda pair: setattr(pair, "tensor", None), "eager")
    assert heard["elbo"] == pytest.approx(told["elbo"], rel=1e-5)


def test_a_record_that_grows_needs_no_new_graph(monkeypatch):
    """A change without effect on the results is found by a comparison."""
    made = []
    trace = tracing.Graphs._trace

    def counted(self, values, inputs):
        made.append(len(inputs[-1]))
        return trace(self, values, inputs)

    monkeypatch.setattr(tracing.Graphs, "_trace", counted)
    with seeded(0):
        pair, x = Pair(), torch.randn(60, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = FAST | {"epochs": 40, "on_epoch": [lambda epoch: pair.seen.append(epoch.elbo)]}
        pv.fit(pair, x, engine="traced", **options)
    assert made == [20]
    assert len(pair.seen) == 40


def test_a_long_list_costs_no_time_in_each_step():
    """A vocabulary is not watched, but another one in its place is seen."""
    pair = Pair()
    pair.vocabulary = {str(i): i for i in range(100_000)}
    state = PlainState(pair)
    before = state.now()
    assert sum(map(len, state.contents())) < 200
    pair.vocabulary = {}
    assert state.now() != before


def test_a_trial_leaves_no_trace():
    pair = Pair()
    pair.last, pair.own = None, torch.Generator().manual_seed(0)
    state = PlainState(pair)
    before, drawn = state.now(), pair.own.get_state()
    with state.unchanged():
        pair.last = torch.zeros(3)
        pair.tensors[0] += 1.0
        pair.named["shift"] = torch.ones(6)
        torch.rand(2, generator=pair.own)
    assert state.now() == before
    assert pair.last is None
    assert not pair.tensors[0].any()
    assert not pair.named["shift"].any()
    assert torch.equal(pair.own.get_state(), drawn)
    assert state.changed == []
    assert not state.drew


@pytest.mark.parametrize("what", ["numbers", "named", "space", "seen"])
def test_a_trial_notes_counts_and_lists_that_grow(what):
    pair = Pair()
    state = PlainState(pair)
    before = state.now()
    with state.unchanged():
        if what == "seen":
            pair.seen.append(1)
        elif what == "space":
            pair.space.scale += 1
        else:
            held = getattr(pair, what)
            held["scale" if what == "named" else 0] += 1
    assert state.now() == before
    assert state.changed == ["of an object" if what == "space" else what]
