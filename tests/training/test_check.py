"""`check` explains each fault of a pair in one line."""

import pyro
import pytest
import torch
from bad_input_helpers import (
    FAST,
    NORMAL,
    SCALES,
    Pair,
    Parameterless,
    guide_without_site,
    plate,
    refused,
    snapshot,
    sound_model,
)
from torch import nn

import pyro_vae as pv


def guide_with_another_site(pair, x):
    with plate(x):
        pyro.sample("z", pair.posterior(x).to_event(1))
        pyro.sample("w", pair.posterior(x).to_event(1))


def guide_that_observes(pair, x):
    with plate(x):
        pyro.sample("z", pair.posterior(x).to_event(1), obs=torch.zeros(len(x), 2))


def guide_that_observes_beside(pair, x):
    with plate(x):
        pyro.sample("z", pair.posterior(x).to_event(1))
        pyro.sample("x", NORMAL(torch.zeros(4), 1.0).to_event(1), obs=x)


def guide_of_the_data(pair, x):
    with plate(x):
        pyro.sample("z", pair.posterior(x).to_event(1))
        pyro.sample("x", NORMAL(torch.zeros(4), 1.0).to_event(1))


def model_without_plate(pair, x):
    z = pyro.sample("z", NORMAL(torch.zeros(len(x), 2), 1.0).to_event(1))
    pyro.sample("x", NORMAL(pair.decoder(z), 1.0).to_event(1), obs=x)


def guide_without_plate(pair, x):
    pyro.sample("z", pair.posterior(x).to_event(1))


def model_without_event(pair, x):
    with plate(x):
        z = pyro.sample("z", NORMAL(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", NORMAL(pair.decoder(z), 1.0), obs=x)


def model_without_latent_event(pair, x):
    with plate(x):
        z = pyro.sample("z", NORMAL(torch.zeros(2), 1.0))
        pyro.sample("x", NORMAL(pair.decoder(z), 1.0).to_event(1), obs=x)


def guide_without_event(pair, x):
    with plate(x):
        pyro.sample("z", pair.posterior(x))


def model_with_plate_elsewhere(pair, x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", NORMAL(torch.zeros(2), 1.0))
        pyro.sample("x", NORMAL(pair.decoder(z), 1.0), obs=x)


def guide_with_plate_elsewhere(pair, x):
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", pair.posterior(x))


def guide_of_another_width(pair, x):
    with plate(x):
        pyro.sample("z", NORMAL(pair.encoder(x), 1.0).to_event(1))


def model_of_any_width(pair, x):
    with plate(x):
        z = pyro.sample("z", NORMAL(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", NORMAL(pair.decoder(z[..., :2]), 1.0).to_event(1), obs=x)


def model_of_ten(pair, x):
    with pyro.plate("data", 10, dim=-1):
        z = pyro.sample("z", NORMAL(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", NORMAL(pair.decoder(z), 1.0).to_event(1), obs=x)


def guide_of_ten(pair, x):
    with pyro.plate("data", 10, dim=-1):
        pyro.sample("z", pair.posterior(x).to_event(1))


def model_of_another_shape(pair, x):
    with plate(x):
        z = pyro.sample("z", NORMAL(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", NORMAL(pair.decoder(z), 1.0).to_event(1), obs=x[:, :2])


def model_that_observes_nothing(pair, x):
    with plate(x):
        z = pyro.sample("z", NORMAL(torch.zeros(2), 1.0).to_event(1))
        NORMAL(pair.decoder(z), 1.0)


def model_that_raises(pair, x):
    raise KeyError("a key\nthat nobody has")


def model_that_forgets(pair, x):
    with plate(x):
        z = pyro.sample("z", NORMAL(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", NORMAL(pair.networks[0](z), 1.0).to_event(1), obs=x)


class Listed(Pair):
    """A pair with its decoder in a plain list."""

    def __init__(self):
        super().__init__(model_that_forgets)
        self.networks = [nn.Linear(2, 4)]


class Guideless(nn.Module):
    """A model without a guide."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 4)

    def model(self, x):
        sound_model(self, x)


class Plain:
    """A model and a guide, but not a module."""

    model = guide = print


UNDER_PLATE = ["outside the data plate", 'pyro.plate("data", len(x), dim=-1)']

FAULTS = {
    "guide lacks a site": (
        lambda: Pair(guide=guide_without_site),
        ["'z'", "missing from the guide", 'add pyro.sample("z", ...)'],
    ),
    "guide has an extra site": (
        lambda: Pair(guide=guide_with_another_site),
        ["'w'", "guide is missing from the model"],
    ),
    "guide observes a latent": (
        lambda: Pair(guide=guide_that_observes),
        ["guide observes site 'z'", "remove obs="],
    ),
    "guide observes data": (
        lambda: Pair(guide=guide_that_observes_beside),
        ["guide observes site 'x'", "remove obs="],
    ),
    "guide samples data": (
        lambda: Pair(guide=guide_of_the_data),
        ["'x'", "samples site 'x' but the model observes it"],
    ),
    "no plate in the model": (lambda: Pair(model_without_plate), ["model", *UNDER_PLATE]),
    "no plate in the guide": (lambda: Pair(guide=guide_without_plate), ["guide", *UNDER_PLATE]),
    "no plate": (lambda: Pair(model_without_plate, guide_without_plate), UNDER_PLATE),
    "plate at another dimension": (
        lambda: Pair(model_with_plate_elsewhere, guide_with_plate_elsewhere),
        ["dim=-1"],
    ),
    "plate of another size in the model": (lambda: Pair(model_of_ten), ["10", "len(x)"]),
    "plate of another size": (lambda: Pair(model_of_ten, guide_of_ten), ["10", "len(x)"]),
    "no event at the data": (lambda: Pair(model_without_event), ["'x'", ".to_event(1)"]),
    "no event in the model": (lambda: Pair(model_without_latent_event), ["'z'", ".to_event(1)"]),
    "no event in the guide": (lambda: Pair(guide=guide_without_event), ["'z'", ".to_event(1)"]),
    "event shapes differ": (
        lambda: Pair(model_of_any_width, guide_of_another_width),
        ["'z'", "event shape (2,) in the model", "(4,) in the guide"],
    ),
    "event shapes differ and the model fails": (
        lambda: Pair(guide=guide_of_another_width),
        ["'z'", "event shape (2,) in the model", "(4,) in the guide"],
    ),
    "data of another shape": (lambda: Pair(model_of_another_shape), ["'x'", "shape"]),
    "nothing is observed": (
        lambda: Pair(model_that_observes_nothing),
        ["not observe data", "obs=x"],
    ),
    "networks in a plain list": (Listed, ["pair.parameters()", "nn.ModuleList", "plain list"]),
    "no parameters": (Parameterless, ["does not depend on a parameter", "nothing to train"]),
    "model raises": (
        lambda: Pair(model_that_raises),
        ["the model fails", "KeyError", "a key"],
    ),
    "no module": (Plain, ["nn.Module", "Plain"]),
    "no guide": (Guideless, ["Guideless", "guide"]),
}


@pytest.mark.parametrize(("make", "words"), FAULTS.values(), ids=FAULTS)
def test_check_explains_each_fault(make, words):
    report = pv.check(make(), (SCALES["real"],))
    assert report.errors
    assert "\n" not in report.errors[0]
    for word in words:
        assert word in report.errors[0], report.errors[0]


@pytest.mark.parametrize(("make", "words"), FAULTS.values(), ids=FAULTS)
def test_fit_raises_the_same_error_before_it_writes(make, words, tmp_path):
    refused(lambda: pv.fit(make(), SCALES["real"], out=tmp_path / "run", **FAST), *words)
    assert snapshot(tmp_path) == {}


def test_event_shapes_that_broadcast_by_chance_are_found():
    report = pv.check(Pair(model_without_event), (torch.randn(4, 4),))
    assert "'x'" in report.errors[0]
    assert ".to_event(1)" in report.errors[0]


def test_a_sound_pair_is_left_as_it_was():
    pair, x = Pair(), SCALES["real"]
    pair.train()
    before, generator = pair.state_dict(), torch.get_rng_state()
    report = pv.check(pair, (x,))
    assert report.errors == report.notes == ()
    assert str(report) == "the pair is sound"
    assert pair.training
    assert all(torch.equal(before[name], value) for name, value in pair.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert list(pyro.get_param_store()) == []


def test_a_parameter_without_effect_is_noted():
    pair = Pair()
    pair.idle = nn.Parameter(torch.zeros(3))
    report = pv.check(pair, (SCALES["real"],))
    assert report.errors == ()
    assert "'idle'" in report.notes[0]


@pytest.mark.parametrize("x", [torch.tensor(3.0), torch.zeros(0, 4), []], ids=str)
def test_data_without_rows_are_an_error_in_words(x):
    (error,) = pv.check(pv.VAE.mlp((4,)), x).errors
    assert "must have rows in dimension 0" in error
