"""Bad input: one line that names what was expected and what came, status 2, and nothing lost."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from PIL import Image
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.errors import UsageError

FAST = {"epochs": 1, "batch_size": 4, "progress": False}
GENERATOR = torch.Generator().manual_seed(0)
SCALES = {
    "real": 3.0 * torch.randn(8, 4, generator=GENERATOR),
    "unit": torch.rand(8, 4, generator=GENERATOR),
}
SCALES["whole"] = (255 * SCALES["unit"]).round()


def refused(call, *words):
    """The call raises one line that holds these words."""
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def snapshot(folder):
    """Every file beneath a folder, and what is in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def small(**options):
    return pv.VAE.mlp((4,), latent_dim=2, hidden=(8,), **options)


def binary(n=8):
    return torch.rand(n, 4, generator=torch.Generator().manual_seed(0)).round()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder, to be copied."""
    run = tmp_path_factory.mktemp("trained") / "run"
    pv.fit(small(), binary(), validation=binary(), out=run, **FAST)
    return run


@pytest.fixture
def run(trained, tmp_path):
    """A run folder of a test's own."""
    return shutil.copytree(trained, tmp_path / "run")


# Pairs, sound and faulty

NORMAL = dist.Normal


def plate(x):
    return pyro.plate("data", len(x), dim=-1)


def sound_model(pair, x):
    with plate(x):
        z = pyro.sample("z", NORMAL(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", NORMAL(pair.decoder(z), 1.0).to_event(1), obs=x)


def sound_guide(pair, x):
    with plate(x):
        pyro.sample("z", pair.posterior(x).to_event(1))


class Pair(nn.Module):
    """A sound pair over rows of four numbers, where no other model or guide is given."""

    def __init__(self, model=sound_model, guide=sound_guide):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)
        self.programs = model, guide

    def posterior(self, x):
        loc, scale = self.encoder(x).chunk(2, -1)
        return NORMAL(loc, scale.exp())

    def model(self, x):
        self.programs[0](self, x)

    def guide(self, x):
        self.programs[1](self, x)


def guide_without_site(pair, x):
    pass


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


def model_with_global_site(pair, x):
    pyro.sample("w", NORMAL(0.0, 1.0))
    sound_model(pair, x)


def guide_with_global_site(pair, x):
    pyro.sample("w", NORMAL(pair.encoder.bias[0], 1.0))
    sound_guide(pair, x)


def two_sites(order):
    def guide(pair, x):
        with plate(x):
            for name in order:
                pyro.sample(name, pair.posterior(x).to_event(1))

    def model(pair, x):
        with plate(x):
            a, b = (pyro.sample(n, NORMAL(torch.zeros(2), 1.0).to_event(1)) for n in "ab")
            pyro.sample("x", NORMAL(pair.decoder(a + b), 1.0).to_event(1), obs=x)

    return Pair(model, guide)


class Listed(Pair):
    """Its decoder is in a plain list."""

    def __init__(self):
        super().__init__(model_that_forgets)
        self.networks = [nn.Linear(2, 4)]


class Parameterless(nn.Module):
    """Nothing of it is learnt."""

    def model(self, x):
        with plate(x):
            pyro.sample("z", NORMAL(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", NORMAL(torch.zeros(4), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with plate(x):
            pyro.sample("z", NORMAL(torch.zeros(2), 1.0).to_event(1))


class Guideless(nn.Module):
    """A model alone."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 4)

    def model(self, x):
        sound_model(self, x)


class Plain:
    """A model and a guide, but no module."""

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
        ["guide observes site 'z'", "drop obs="],
    ),
    "guide observes data": (
        lambda: Pair(guide=guide_that_observes_beside),
        ["guide observes site 'x'", "drop obs="],
    ),
    "guide samples data": (
        lambda: Pair(guide=guide_of_the_data),
        ["'x'", "sampled by the guide and observed by the model"],
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
    "nothing is observed": (lambda: Pair(model_that_observes_nothing), ["observes", "obs=x"]),
    "networks in a plain list": (Listed, ["pair.parameters()", "nn.ModuleList", "plain list"]),
    "no parameters": (Parameterless, ["no parameter", "nothing to train"]),
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
def test_fit_says_the_same_before_it_writes(make, words, tmp_path):
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


# Data and settings that `fit` refuses


class Pictures(Dataset):
    """Gives what no tensor can be made of."""

    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.item


class Endless(IterableDataset):
    """Does not know how long it is."""

    def __iter__(self):
        return iter(binary())


def bad(value, row=5):
    x = torch.rand(8, 4)
    x[row, 2] = value
    return x


def likelihood(family, x):
    return lambda: ((small(likelihood=family), x), {})


def given(*data, pair=small, **options):
    return lambda: ((pair(), *data), options)


OUTSIDE = ["outside the support", "site 'x'"]
AS_BYTES, AS_REAL = [*OUTSIDE, "uint8", "8-bit"], [*OUTSIDE, "Gaussian likelihood would fit"]
AS_GREY = [*OUTSIDE, "ContinuousBernoulli"]

REFUSED = {
    "nan": (given(bad(torch.nan)), ["x", "not finite", "row 5"]),
    "infinity": (given(bad(torch.inf)), ["x", "not finite", "row 5"]),
    "nan in context": (given(binary(), bad(-torch.inf)), ["context 1", "not finite", "row 5"]),
    "nan in one column": (given(binary(), bad(torch.nan)[:, 2]), ["context 1", "row 5"]),
    "nan in validation": (
        given(binary(), validation=bad(torch.nan)),
        ["validation", "not finite", "row 5"],
    ),
    "no rows": (given(torch.rand(0, 4)), ["empty", "(0, 4)"]),
    "no columns": (given(torch.rand(8, 0)), ["empty", "(8, 0)"]),
    "one row": (given(binary(1)), ["1 row", "2 or more"]),
    "fewer rows than a batch": (given(binary(3)), ["batch_size is 4", "3 rows"]),
    "wrong rank": (given(binary().reshape(8, 2, 2)), ["(8, 2, 2)", "(..., 4)"]),
    "a number": (given(torch.tensor(1.0)), ["empty"]),
    "other width": (given(torch.rand(8, 3)), ["(8, 3)", "(..., 4)"]),
    "words": (given(np.array([["a"] * 4] * 8)), ["numbers", "<U1"]),
    "objects": (given(np.array([[None] * 4] * 8)), ["numbers", "object"]),
    "complex": (given(np.zeros((8, 4), complex)), ["real", "complex128"]),
    "the name of a data set": (given("digits"), ["array", "str"]),
    "context of other length": (given(binary(), binary(7)), ["7 rows", "8"]),
    "context that the pair lacks": (given(binary(), binary()), ["1 inputs, 2 came"]),
    "context is missing": (
        given(binary(), pair=lambda: small(context_shapes=[(2,)])),
        ["2 inputs, 1 came"],
    ),
    "floats to 255 as bernoulli": (likelihood(pv.Bernoulli, SCALES["whole"]), AS_BYTES),
    "integers as bernoulli": (likelihood(pv.Bernoulli, SCALES["whole"].long()), AS_BYTES),
    "short integers as bernoulli": (
        likelihood(pv.Bernoulli, SCALES["whole"].numpy().astype(np.uint16)),
        AS_BYTES,
    ),
    "reals as bernoulli": (likelihood(pv.Bernoulli, SCALES["real"]), AS_REAL),
    "floats to 255 as continuous": (likelihood(pv.ContinuousBernoulli, SCALES["whole"]), AS_BYTES),
    "reals as continuous": (likelihood(pv.ContinuousBernoulli, SCALES["real"]), AS_REAL),
    "floats to 255 as logistic": (likelihood(pv.DiscretizedLogistic, SCALES["whole"]), AS_BYTES),
    "reals as logistic": (likelihood(pv.DiscretizedLogistic, SCALES["real"]), AS_REAL),
    "grey as logistic": (likelihood(pv.DiscretizedLogistic, SCALES["unit"]), AS_GREY),
    "floats to 255 as categorical": (likelihood(pv.Categorical, SCALES["whole"]), AS_BYTES),
    "reals as categorical": (likelihood(pv.Categorical, SCALES["real"]), AS_REAL),
    "grey as categorical": (likelihood(pv.Categorical, SCALES["unit"]), AS_GREY),
    "validation outside": (
        given(binary(), validation=SCALES["real"]),
        ["validation", *OUTSIDE],
    ),
    "validation outside, grey": (
        given(SCALES["unit"], validation=SCALES["whole"]),
        ["validation", *OUTSIDE],
    ),
    "validation of other width": (
        given(binary(), validation=torch.rand(8, 5)),
        ["validation", "(8, 5)"],
    ),
    "validation without context": (
        given(
            binary(),
            torch.rand(8, 2),
            pair=lambda: small(context_shapes=[(2,)]),
            validation=binary(),
        ),
        ["validation", "context"],
    ),
    "data set of one row": (given(TensorDataset(binary(1))), ["1 row", "2 or more"]),
    "data set outside": (given(TensorDataset(SCALES["whole"])), OUTSIDE),
    "loader outside": (given(DataLoader(SCALES["real"], batch_size=4)), OUTSIDE),
    "data set of words": (given(Pictures("word")), ["tensor"]),
    "data set of images": (given(Pictures(Image.new("L", (2, 2)))), ["tensor", "Image"]),
    "data set of dictionaries": (given(Pictures({"x": torch.ones(4)})), ["tensor", "dict"]),
    "data set without length": (given(Endless()), ["Endless", "length"]),
    "unknown option": (given(binary(), epoch=3), ["'epoch'", "did you mean 'epochs'?"]),
    "no epochs": (given(binary(), epochs=0), ["epochs", "0 came"]),
    "epochs in words": (given(binary(), epochs="three"), ["epochs", "three"]),
    "half a row": (given(binary(), batch_size=2.5), ["batch_size", "2.5"]),
    "no learning rate": (given(binary(), learning_rate=0.0), ["learning_rate", "0.0 came"]),
    "nan learning rate": (given(binary(), learning_rate=torch.nan), ["learning_rate", "nan"]),
    "negative clip": (given(binary(), clip_norm=-1.0), ["clip_norm", "-1.0 came"]),
    "no patience": (given(binary(), validation=binary(), patience=0), ["patience", "0 came"]),
    "patience with what": (given(binary(), patience=3), ["patience", "validation"]),
    "seed too great": (given(binary(), seed=10**30), ["seed", "1000000"]),
    "unknown precision": (given(binary(), precision="float8"), ["precision", "'float8'"]),
    "unknown binarisation": (given(binary(), binarize="dynamc"), ["did you mean 'dynamic'?"]),
    "no such GPU": (given(binary(), device="cuda:99"), ["device 'cuda:99'", "'cpu'"]),
    "unknown device": (given(binary(), device="gpu"), ["device 'gpu'", "'cpu'"]),
    "scale of 0": (
        given(SCALES["real"], pair=lambda: small(likelihood=pv.Gaussian(scale=0.0))),
        ["scale", "positive", "0"],
    ),
    "negative scale": (
        given(SCALES["real"], pair=lambda: small(likelihood=pv.Gaussian(scale=-1.0))),
        ["scale", "positive", "-1"],
    ),
    "importance weights with a global site": (
        given(
            SCALES["real"],
            pair=lambda: Pair(model_with_global_site, guide_with_global_site),
            objective=pv.ImportanceWeightedELBO(2),
        ),
        ["'w'", "outside the data plate", "Trace_ELBO"],
    ),
    "closed KL in another order": (
        given(SCALES["real"], pair=lambda: two_sites("ba"), objective=TraceMeanField_ELBO()),
        ["closed-form KL", "b, a", "Trace_ELBO"],
    ),
    "faulty pair": (given(binary(), pair=lambda: Pair(guide=guide_without_site)), ["'z'"]),
}


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_fit_refuses_and_neither_writes_nor_clears(call, words, run, tmp_path):
    def fit(**where):
        arguments, options = call()
        pv.fit(*arguments, **FAST | options | where)

    before = snapshot(tmp_path)
    refused(lambda: fit(out=tmp_path / "new"), *words)
    assert snapshot(tmp_path) == before
    refused(lambda: fit(out=run, overwrite=True), *words)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("make", [pv.VAE.mlp, pv.HierarchicalVAE.mlp])
def test_names_of_parts_are_for_the_command_line(make):
    refused(lambda: make((4,), prior="vamp"), "GaussianMixture", "'vamp'", "VampPrior.of_data")
    refused(lambda: make((4,), likelihood="bernoulli"), "pyro_vae.Bernoulli", "'bernoulli'")
    refused(lambda: make((4,), activation="relu"), "torch.nn.ReLU", "'relu'")
    refused(lambda: pv.VAE.conv((1, 4, 4), activation="relu"), "torch.nn.ReLU", "'relu'")


def test_fewer_labels_than_classes_are_refused():
    labels = torch.arange(30) % 5
    refused(lambda: pv.hide_labels(labels, 4), "0, or 5 or more", "4 came")
    kept = pv.hide_labels(labels, 6)
    assert kept[kept >= 0].bincount().tolist() == [1, 1, 1, 1, 2]
    assert bool((pv.hide_labels(labels, 0) == -1).all())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path):
    refused(lambda: pv.fit(small(), binary(), device="cuda", **FAST), "device 'cuda'", "'cpu'")


def test_tensorboard_that_is_not_installed_costs_no_run(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    before = snapshot(run)
    options = {"out": run, "overwrite": True, "tensorboard": True}
    refused(lambda: pv.fit(small(), binary(), **FAST, **options), "pip install", "tensorboard")
    assert snapshot(run) == before


@pytest.mark.parametrize("option", ["resume", "overwrite", "tensorboard"])
def test_what_needs_a_folder_says_so(option):
    refused(lambda: pv.fit(small(), binary(), **FAST, **{option: True}), option, "out=")


USES = {
    "encode": pv.encode,
    "reconstruct": pv.reconstruct,
    "evaluate": lambda pair, x: pv.evaluate(pair, x, num_samples=2),
    "log_likelihood": lambda pair, x: pv.log_likelihood(pair, x, num_samples=2),
    "interpolate": lambda pair, x: pv.interpolate(pair, x, x),
    "traverse": lambda pair, x: pv.traverse(pair, x[:1]),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.rand(8, 3), ["3"]),
        (torch.rand(8, 2, 2), ["2, 2"]),
        (bad(torch.nan, row=0), ["not finite"]),
        (torch.rand(0, 4), ["empty"]),
        (SCALES["whole"] + 1, OUTSIDE),
    ],
    ids=["width", "rank", "nan", "empty", "support"],
)
def test_use_refuses_what_fit_would(use, x, words):
    refused(lambda: use(small(), x), *words)


def test_one_row_can_be_evaluated():
    assert pv.evaluate(small(), binary(1), num_samples=2).num_examples == 1


MISUSES = {
    "sample none": (lambda: pv.sample(small(), 0), ["n must be 1", "0 came"]),
    "sample without template": (lambda: pv.sample(Pair(), 3), ["Pair", "template(n)"]),
    "context too much": (
        lambda: pv.sample(small(), 3, [torch.rand(3, 2)]),
        ["0 context", "1 came"],
    ),
    "context too little": (
        lambda: pv.sample(small(context_shapes=[(2,)]), 3),
        ["1 context", "0 came"],
    ),
    "context too wide": (
        lambda: pv.sample(small(context_shapes=[(2,)]), 3, [torch.rand(3, 5)]),
        ["(2,)", "(3, 5)"],
    ),
    "context too long": (
        lambda: pv.sample(small(context_shapes=[(2,)]), 3, [torch.rand(4, 2)]),
        ["3 rows", "(4, 2)"],
    ),
    "unknown data site": (lambda: pv.sample(small(), 3, site="y"), ["'y'", "x"]),
    "decode nothing": (lambda: pv.decode(small(), {}), ["latent"]),
    "decode an unknown site": (
        lambda: pv.decode(small(), {"y": torch.rand(3, 2)}),
        ["no site 'y'"],
    ),
    "decode another width": (lambda: pv.decode(small(), {"z": torch.rand(3, 5)}), ["(3, 5)"]),
    "encode to what": (lambda: pv.encode(small(), binary(), what="median"), ["'median'", "mean"]),
    "interpolate in one step": (
        lambda: pv.interpolate(small(), binary(), binary(), steps=1),
        ["steps", "1 came"],
    ),
    "interpolate unequal ends": (
        lambda: pv.interpolate(small(), binary(), binary(7)),
        ["8 rows", "7"],
    ),
    "traverse from many": (lambda: pv.traverse(small(), binary()), ["one datum", "8 came"]),
    "traverse an unknown unit": (
        lambda: pv.traverse(small(), binary(1), units=[2]),
        ["0 to 1", "[2]"],
    ),
    "traverse an unknown site": (
        lambda: pv.traverse(small(), binary(1), latent="y"),
        ["'y'", "z"],
    ),
    "traverse no values": (lambda: pv.traverse(small(), binary(1), values=[]), ["values"]),
    "weigh no samples": (
        lambda: pv.log_likelihood(small(), binary(), num_samples=0),
        ["num_samples", "0 came"],
    ),
    "gaps with a global site": (
        lambda: pv.gaps(Pair(model_with_global_site, guide_with_global_site), SCALES["real"]),
        ["'w'", "outside the data plate"],
    ),
    "convolve rows": (lambda: pv.VAE.conv((6,)), ["(channels, height, width)", "(6,)"]),
}


@pytest.mark.parametrize(("call", "words"), MISUSES.values(), ids=MISUSES)
def test_use_names_the_argument(call, words):
    refused(call, *words)


# Training that stops being finite


def breaking(site):
    """A pair whose site, or gradient, is not finite from its sixth training step on."""

    def model(pair, x):
        if pair.training:
            pair.steps += 1
        broken = torch.tensor(torch.nan if pair.training and pair.steps > 5 else 1.0)
        loc = torch.zeros(2) * (broken if site == "z" else 1.0)
        with plate(x):
            z = pyro.sample("z", NORMAL(loc, 1.0, validate_args=False).to_event(1))
            mean = pair.decoder(z) * (broken if site == "x" else 1.0)
            if site == "gradient" and broken.isnan():
                # Zero times the root of zero: a finite value whose gradient is none.
                mean = mean + 0.0 * (pair.decoder.bias - pair.decoder.bias.detach()).abs().sqrt()
            pyro.sample("x", NORMAL(mean, 1.0, validate_args=False).to_event(1), obs=x)

    pair = Pair(model)
    pair.steps = 0
    return pair


def finite(run, pair):
    state = pv.load(run, pair).state_dict().values()
    return all(bool(torch.isfinite(value).all()) for value in state)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("site", ["x", "z", "gradient"])
def test_a_loss_that_is_not_finite_stops_training(site, held, tmp_path):
    # The pair counts its steps, which a graph would not.
    held_out = SCALES["real"] if held else None
    options = FAST | {"epochs": 20, "validation": held_out, "engine": "eager"}
    words = ["epoch 3, step 2", "not finite", "last good model", str(tmp_path / "run")]
    words.append("gradient" if site == "gradient" else f"site '{site}'")
    refused(lambda: pv.fit(breaking(site), SCALES["real"], out=tmp_path / "run", **options), *words)
    assert finite(tmp_path / "run", Pair())
    history = np.genfromtxt(tmp_path / "run" / "history.csv", delimiter=",", names=True)
    assert history["epoch"].tolist() == [1, 2]


def test_without_a_folder_no_folder_is_named():
    message = refused(
        lambda: pv.fit(breaking("x"), SCALES["real"], engine="eager", **FAST | {"epochs": 20}),
        "site 'x'",
    )
    assert "None" not in message


@pytest.mark.parametrize("validation", [None, binary()], ids=["alone", "validated"])
def test_parameters_that_overflow_do_not_reach_the_disk(validation, tmp_path):
    options = {"validation": validation, "learning_rate": 1e39, "out": tmp_path / "run"}
    refused(lambda: pv.fit(small(), binary(), **FAST | options), "not finite", "last good model")
    assert finite(tmp_path / "run", None)


def test_data_that_break_the_support_on_the_way_are_one_line(tmp_path):
    def model(pair, x):
        with plate(x):
            z = pyro.sample("z", NORMAL(torch.zeros(2), 1.0).to_event(1))
            logits = pair.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    x = torch.cat([binary(16), SCALES["real"]])
    loader = DataLoader(x, batch_size=4)
    refused(lambda: pv.fit(Pair(model), loader, out=tmp_path / "run", **FAST), "'x'", "support")


# Output folders


def test_another_run_is_refused_and_untouched(run):
    before = snapshot(run)
    words = [str(run), "holds another run", "--overwrite", "--resume"]
    refused(lambda: pv.fit(small(), binary(), out=run, **FAST), *words)
    assert snapshot(run) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "checkpoint.pt"])
def test_what_is_left_of_a_run_is_a_run(run, name):
    for path in run.iterdir():
        if path.name != name:
            path.unlink()
    before = snapshot(run)
    refused(lambda: pv.fit(small(), binary(), out=run, **FAST), "holds another run", name)
    assert snapshot(run) == before


def test_overwrite_removes_a_runs_own_files_only(run):
    figures = run / "figures"
    figures.mkdir()
    (figures / "samples.png").write_bytes(b"old")
    (run / "metrics.json").write_text("{}")
    (run / "report.html").write_text("old")
    mine = [run / "notes.txt", run / "data" / "x.csv", figures / "mine.svg"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    before = snapshot(run)
    pv.fit(small(), binary(), out=run, overwrite=True, **FAST | {"seed": 1})
    after = snapshot(run)
    for name in ("metrics.json", "report.html", os.path.join("figures", "samples.png")):
        assert name not in after
    for name in ("config.json", "model.safetensors", "checkpoint.pt"):
        assert after[name] != before[name]
    assert [path.read_text() for path in mine] == ["mine"] * 3


def test_a_folder_without_a_run_is_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    pv.fit(small(), binary(), out=tmp_path, **FAST)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    pv.load(tmp_path)


@pytest.mark.parametrize("where", ["file", "file/run", "x" * 300])
@pytest.mark.parametrize(
    "write",
    [
        lambda run: pv.fit(small(), binary(), out=run, **FAST),
        lambda run: pv.fit(small(), binary(), out=run, overwrite=True, **FAST),
        lambda run: pv.save(small(), run),
    ],
    ids=["fit", "overwrite", "save"],
)
def test_a_folder_that_cannot_be_written(write, where, tmp_path):
    (tmp_path / "file").write_text("mine")
    message = refused(lambda: write(tmp_path / where))
    assert str(tmp_path) in message
    assert snapshot(tmp_path) == {"file": b"mine"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(lambda: pv.fit(small(), binary(), out=tmp_path / "locked" / "run", **FAST), "locked")


def test_a_write_that_fails_leaves_the_old_file(run, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    before = snapshot(run)
    monkeypatch.setattr(os, "fsync", full)
    refused(lambda: pv.save(small(), run), str(run), "No space left on device")
    assert snapshot(run) == before


# Run folders that are broken


def resume(run, pair=small, x=None):
    options = FAST | {"epochs": 2, "out": run, "resume": True}
    return pv.fit(pair(), binary() if x is None else x, validation=binary(), **options)


READERS = {"config.json": pv.load, "model.safetensors": pv.load, "checkpoint.pt": resume}


@pytest.mark.parametrize(("name", "read"), READERS.items())
def test_a_missing_file_is_named(name, read, run):
    (run / name).unlink()
    message = refused(lambda: read(run), str(run / name), "missing")
    assert "cut short" not in message


def test_resume_does_not_go_on_without_the_configuration(run):
    (run / "config.json").unlink()
    before = snapshot(run)
    refused(lambda: resume(run), str(run / "config.json"), "missing")
    assert snapshot(run) == before


@pytest.mark.parametrize("share", [0, 1e-9, 0.01, 0.25, 0.5, 0.9, 0.995])
@pytest.mark.parametrize(("name", "read"), READERS.items())
def test_a_file_that_is_cut_short_is_named(name, read, share, run):
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: int(np.ceil(share * len(content)))])
    before = snapshot(run)
    refused(lambda: read(run), str(run / name), "cut short")
    assert snapshot(run) == before


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b"{}", b"\xff\xfe\x00", b"\x00" * 99])
@pytest.mark.parametrize(("name", "read"), READERS.items())
def test_a_file_of_something_else_is_named(name, read, content, run):
    (run / name).write_bytes(content)
    refused(lambda: read(run), str(run / name))


def edit_tensors(path, edit):
    tensors = safetensors.torch.load_file(path)
    edit(tensors)
    safetensors.torch.save_file(tensors, path)


NAME = "decoder.network.layers.0.weight"

TENSORS = {
    "other shape": (
        lambda state: state.update({NAME: torch.ones(3, 5)}),
        [f"'{NAME}'", "(3, 5)", "(8, 2)"],
    ),
    "extra": (lambda state: state.update(surplus=torch.ones(2)), ["'surplus'", "does not have"]),
    "missing": (lambda state: state.pop(NAME), [f"'{NAME}'", "lacks"]),
}


@pytest.mark.parametrize(("edit", "words"), TENSORS.values(), ids=TENSORS)
def test_a_tensor_that_does_not_fit_is_named_with_its_file(edit, words, run):
    path = run / "model.safetensors"
    edit_tensors(path, edit)
    refused(lambda: pv.load(run), str(path), *words)


@pytest.mark.parametrize(("edit", "words"), TENSORS.values(), ids=TENSORS)
@pytest.mark.parametrize("part", ["pair", "best"])
def test_a_checkpoint_tensor_that_does_not_fit_is_named_with_its_file(part, edit, words, run):
    path = run / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    edit(state[part])
    torch.save(state, path)
    before = snapshot(run)
    refused(lambda: resume(run), str(path), *words)
    assert snapshot(run) == before


@pytest.mark.parametrize("key", ["job", "pair", "best", "optimizer", "epochs", "generators"])
def test_a_checkpoint_that_lacks_a_part_is_refused(key, run):
    path = run / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state[key]
    torch.save(state, path)
    before = snapshot(run)
    refused(lambda: resume(run), str(path), f"'{key}'")
    assert snapshot(run) == before


@pytest.mark.parametrize("content", [torch.ones(3), {"weights": torch.ones(3)}, [1, 2]])
def test_another_programs_checkpoint_is_refused(content, run):
    path = run / "checkpoint.pt"
    torch.save(content, path)
    refused(lambda: resume(run), str(path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 0.1}, ["learning_rate = 0.001", "0.1 came"]),
        ({"batch_size": 8}, ["batch_size = 4", "8 came"]),
        ({"seed": 5}, ["seed = 0", "5 came"]),
        ({"objective": TraceMeanField_ELBO()}, ["objective"]),
        ({"binarize": "fixed"}, ["binarize"]),
    ],
)
def test_resume_goes_on_only_as_the_run_began(options, words, run):
    before = snapshot(run)
    options = FAST | {"epochs": 2, "out": run, "resume": True} | options
    refused(lambda: pv.fit(small(), binary(), **options), str(run / "checkpoint.pt"), *words)
    assert snapshot(run) == before


def test_resume_with_other_data_or_another_pair(run):
    before = snapshot(run)
    path = str(run / "checkpoint.pt")
    refused(lambda: resume(run, x=1 - binary()), path, "data")
    refused(lambda: resume(run, lambda: pv.VAE.mlp((4,), latent_dim=3, hidden=(8,))), path, "shape")
    assert snapshot(run) == before


def test_an_unknown_run_is_answered_with_the_nearest(run):
    (run.parent / "data").mkdir()
    refused(lambda: pv.load(run.parent / "rum"), "no run", "did you mean 'run'?")
    message = refused(lambda: pv.load(run.parent / "zzzzzz"), "no run", "run")
    assert "data" not in message  # it holds no run
    message = refused(lambda: pv.load(run / "none"), "no run")
    assert "known: " not in message  # there is nothing to name


def test_a_pair_of_ones_own_is_asked_for(tmp_path, run):
    pv.fit(Pair(), SCALES["real"], out=tmp_path / "own", **FAST)
    refused(lambda: pv.load(tmp_path / "own"), ":Pair", "load(run, MyPair)")
    refused(lambda: pv.load(tmp_path / "own", Pair), ":Pair", "instance")
    refused(lambda: pv.load(tmp_path / "own", Parameterless()), "model.safetensors", "tensor")
    refused(lambda: pv.load(run, Pair), "Pair", "encoder")


# Files that would execute something


class Marker:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


PICKLES = {
    "pickle": lambda evil, path: path.write_bytes(pickle.dumps(evil)),
    "old pickle": lambda evil, path: path.write_bytes(pickle.dumps(evil, protocol=2)),
    "nested pickle": lambda evil, path: path.write_bytes(pickle.dumps({"pair": [evil]})),
    "torch": lambda evil, path: torch.save({"pair": evil}, path),
    "old torch": lambda evil, path: torch.save(
        {"pair": evil}, path, _use_new_zipfile_serialization=False
    ),
}


@pytest.mark.parametrize("write", PICKLES.values(), ids=PICKLES)
@pytest.mark.parametrize(("name", "read"), READERS.items())
def test_a_pickle_is_refused_and_never_executed(name, read, write, run, tmp_path):
    write(Marker(tmp_path / "marker"), run / name)
    before = snapshot(run)
    refused(lambda: read(run), str(run / name))
    assert not (tmp_path / "marker").exists()
    assert snapshot(run) == before


def edit_config(run, edit):
    content = json.loads((run / "config.json").read_text())
    edit(content)
    (run / "config.json").write_text(json.dumps(content))


def arguments(config):
    return config["pair"]["arguments"]


PLACES = {
    "the pair": lambda config, name: config["pair"].update({"class": name}),
    "a part": lambda config, name: arguments(config)["decoder"]["arguments"]["family"].update(
        {"class": name}
    ),
    "a type": lambda config, name: arguments(config)["encoder"]["arguments"]["network"][
        "arguments"
    ].update(activation={"type": name}),
    "a call": lambda config, name: arguments(config).update(
        prior={"class": name, "arguments": {"command": "touch marker"}}
    ),
}


@pytest.mark.parametrize(
    ("place", "kind"),
    [*((place, None) for place in PLACES), *((p, pv.VAE) for p in PLACES if p != "the pair")],
)
@pytest.mark.parametrize(
    "name", ["os:system", "builtins:eval", "subprocess:Popen", "spy:Spy", "spy.sub:Spy"]
)
def test_a_foreign_class_is_refused_and_not_imported(name, place, kind, run, tmp_path, monkeypatch):
    (tmp_path / "spy").mkdir()
    for module in ("__init__", "sub"):
        path = tmp_path / "spy" / f"{module}.py"
        path.write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Spy: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    edit_config(run, lambda config: PLACES[place](config, name))
    refused(lambda: pv.load(run, kind), name)
    assert not (tmp_path / "marker").exists()
    assert "spy" not in sys.modules


CONFIGS = {
    "no pair": lambda config: config.pop("pair"),
    "a pair of nothing": lambda config: config.update(pair=None),
    "a class that is no text": lambda config: config["pair"].update({"class": 3}),
    "no arguments": lambda config: config["pair"].pop("arguments"),
    "an argument missing": lambda config: arguments(config).pop("prior"),
    "an argument too many": lambda config: arguments(config).update(more=1),
    "an argument that cannot be": lambda config: arguments(config)["prior"]["arguments"].update(
        latent_dim=-1
    ),
    "no such module": lambda config: config["pair"].update({"class": "pyro_vae.nothing:VAE"}),
    "no such class": lambda config: config["pair"].update({"class": "pyro_vae.models.vae:VEA"}),
    "no class": lambda config: config["pair"].update({"class": "pyro_vae.cli:main"}),
    "another format": lambda config: config.update(format=2),
    "an impossible batch": lambda config: config.update(adopted_batch=[[[4], "system"]]),
}


@pytest.mark.parametrize("edit", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_makes_no_sense_is_named(edit, run):
    edit_config(run, edit)
    refused(lambda: pv.load(run), "config.json")


# The command line

OWN = """
import pyro, torch
import pyro.distributions as dist
from torch import nn


class Sound(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            loc, scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


class Silent(Sound):
    def guide(self, x):
        pass


class Idle(Sound):
    def __init__(self):
        super().__init__()
        self.idle = nn.Parameter(torch.zeros(3))


class Failing(Sound):
    def __init__(self):
        raise KeyError("no key")


class Wanting(Sound):
    def __init__(self, vocabulary):
        super().__init__()


class Diverging(Sound):
    steps = 0

    def model(self, x):
        self.steps += self.training
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = self.decoder(z) * (float("nan") if self.steps > 5 else 1.0)
            likelihood = dist.Normal(mean, 1.0, validate_args=False)
            pyro.sample("x", likelihood.to_event(1), obs=x)


class Plain:
    model = guide = print
"""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A run trained by the command line, data files and modules, to be copied."""
    folder = tmp_path_factory.mktemp("shelf")
    generator = np.random.default_rng(0)
    np.save(folder / "table.npy", generator.normal(size=(60, 4)).astype(np.float32))
    np.save(folder / "wide.npy", generator.random((60, 6)))
    np.save(folder / "floats.npy", generator.integers(0, 256, (60, 4)).astype(np.float32))
    np.save(folder / "nan.npy", np.full((60, 4), np.nan))
    np.save(folder / "few.npy", np.zeros((9, 4)))
    np.save(folder / "one.npy", np.zeros((1, 8, 8), np.uint8))
    np.save(folder / "empty.npy", np.zeros((0, 8, 8), np.uint8))
    np.save(folder / "pickle.npy", np.array([Marker(folder / "marker")], dtype=object))
    (folder / "own.py").write_text(OWN)
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "raising.py").write_text("1 / 0\n")
    (folder / "wanting.py").write_text("import a_package_that_nobody_has\n")
    (folder / "list.json").write_text("[1]")
    (folder / "number.json").write_text('{"train": 3}')
    (folder / "cut.json").write_text("{")
    (folder / "option.json").write_text('{"epoch": 3}')
    (folder / "value.json").write_text('{"epochs": "many"}')
    (folder / "notes.txt").write_text("mine")
    (folder / "page.html").write_text("mine")
    (folder / "empty").mkdir()
    words = "--epochs 1 --num-eval-samples 2 --latent-dim 2 --hidden 8 --no-report"
    main(["train", "digits", "--out", str(folder / "run"), *words.split()])
    for name in ("cut", "evil"):
        shutil.copytree(folder / "run", folder / name)
    checkpoint = (folder / "cut" / "checkpoint.pt").read_bytes()
    (folder / "cut" / "checkpoint.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    model = (folder / "cut" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(model[: len(model) // 2])
    for name in ("checkpoint.pt", "model.safetensors"):
        (folder / "evil" / name).write_bytes(pickle.dumps(Marker(folder / "marker")))
    return folder


@pytest.fixture
def here(shelf, tmp_path, monkeypatch):
    """The current folder: a copy of the shelf, from which modules are imported."""
    folder = shutil.copytree(shelf, tmp_path / "here")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield folder
    for name in ("own", "broken", "raising", "wanting"):
        sys.modules.pop(name, None)


def complaint(words, capsys):
    """What the command line prints on standard error, checked to be one line, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert err.startswith("pyro-vae: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert out == ""
    return err


TABLE = "table.npy --batch-size 8 --epochs 2 --num-eval-samples 2"

COMMANDS = {
    "unknown command": ("trian digits", ["trian", "train"]),
    "unknown data set": ("train digts", ["'digts'", "did you mean 'digits'?"]),
    "unknown option": ("train digits --epoch 3", ["--epoch", "--epochs"]),
    "unknown likelihood": (
        "train digits --likelihood bernouli",
        ["bernouli", "bernoulli", "continuous-bernoulli"],
    ),
    "unknown network": ("train digits --network cnov", ["cnov", "conv"]),
    "unknown model": ("train digits --model vea", ["'vea'", "did you mean 'vae'?", "module:Class"]),
    "unknown module": ("train digits --model nowhere:Pair", ["'nowhere'"]),
    "unknown class": ("train digits --model own:Soun", ["'Soun'", "did you mean 'Sound'?"]),
    "unknown run": ("evaluate rum", ["'rum'", "did you mean 'run'?"]),
    "unknown run to resume": ("train digits --resume --out nowhere", ["nowhere"]),
    "unknown data to evaluate": ("evaluate run --data digts", ["did you mean 'digits'?"]),
    "unknown part": ("encode run --part tets", ["'tets'", "test"]),
    "no data": ("train", ["data"]),
    "epochs in words": ("train digits --epochs three", ["--epochs", "three"]),
    "negative epochs": ("train digits --epochs -1", ["epochs", "-1"]),
    "no latents": ("train digits --latent-dim 0", ["--latent-dim", "0"]),
    "no width": ("train digits --hidden 8 0", ["hidden", "0"]),
    "scale in words": ("train digits --likelihood gaussian --scale wide", ["scale", "'wide'"]),
    "scale of 0": ("train digits --likelihood gaussian --scale 0", ["scale", "0", "positive"]),
    "negative scale": ("train digits --likelihood gaussian --scale -1", ["scale", "-1"]),
    "seed too great": (f"train digits --seed {10**30}", ["seed", "10000"]),
    "no such GPU": ("train digits --device cuda:99", ["'cuda:99'", "'cpu'"]),
    "gradient of another objective": (
        "train digits --objective elbo --gradient doubly-reparametrized",
        ["doubly-reparametrized", "--objective elbo"],
    ),
    "samples of one draw": (
        "train digits --objective total-correlation --num-samples 2",
        ["total-correlation", "one sample", "2"],
    ),
    "negative weight": (
        "train digits --objective total-correlation --total-correlation -1",
        ["--total-correlation", "-1"],
    ),
    "total correlation of units that are not independent": (
        "train digits --objective total-correlation --posterior full-rank-normal",
        ["independent units", "posterior of 'z'", "use --objective elbo"],
    ),
    "no evaluation": ("train digits --epochs 1 --num-eval-samples 0", ["samples", "0"]),
    "no such file": ("train none.npy", ["none.npy", "no such file"]),
    "another kind of file": ("train page.html", ["page.html", ".npy"]),
    "a text too short to split": ("train notes.txt", ["notes has 1 rows", "10 or more"]),
    "a folder": ("train empty", ["'empty'", ".npy"]),
    "nan": ("train nan.npy", ["nan.npy", "not finite", "row 0"]),
    "few rows": ("train few.npy", ["few", "9 rows", "10 or more"]),
    "one image": ("train one.npy", ["one", "1 row", "10 or more"]),
    "no image": ("train empty.npy", ["empty.npy", "(0, 8, 8)"]),
    "pickle": ("train pickle.npy", ["pickle.npy"]),
    "floats to 255": ("train floats.npy --batch-size 8", ["outside the support", "uint8"]),
    "reals as bernoulli": ("train table.npy --batch-size 8", ["outside the support", "Gaussian"]),
    "batch of more than all": (
        "train table.npy --likelihood gaussian --batch-size 43",
        ["--batch-size", "43", "42 rows"],
    ),
    "convolutions of rows": ("train table.npy --network conv", ["(4,)", "height"]),
    "condition without labels": ("train table.npy --condition label", ["labels", "table"]),
    "context without context": ("train table.npy --condition context", ["'context'", "table"]),
    "conditional on nothing": ("train digits --prior conditional", ["--condition"]),
    "library size of pixels": (
        "train digits --library-size",
        ["--library-size", "--likelihood poisson", "bernoulli"],
    ),
    "levels of a vae": (
        "train digits --latent-dim 3 2",
        ["one number", "2 came", "hierarchical"],
    ),
    "levels of a mixture": (
        "train digits --model mixture --latent-dim 3 2",
        ["--model mixture", "2 came", "hierarchical"],
    ),
    "one level": ("train digits --model hierarchical --latent-dim 3", ["two levels", "3 came"]),
    "fewer labels than none": (
        "train digits --model semi-supervised --num-labels -5",
        ["--num-labels", "-5"],
    ),
    "a guide of a vae": ("train digits --guide bottom-up", ["--model hierarchical", "vae"]),
    "components of no mixture": (
        "train digits --components 3",
        ["--prior gaussian-mixture or vamp", "standard-normal"],
    ),
    "a vamp prior without q of the top": (
        "train digits --model hierarchical --latent-dim 3 2 --prior vamp --guide bottom-up",
        ["--guide top-down"],
    ),
    "another posterior of levels": (
        "train digits --model hierarchical --latent-dim 3 2 --posterior iaf",
        ["diagonal-normal", "iaf"],
    ),
    "a vamp prior with context": (
        "train digits --prior vamp --condition label",
        ["without context", "--condition"],
    ),
    "gated convolutions": (
        "train digits --network conv --activation glu",
        ["--activation glu", "--network mlp"],
    ),
    "blocks of no convolutions": ("train digits --blocks 2", ["--network conv", "auto"]),
    "no logistics": (
        "train digits --likelihood discretized-logistic-mixture --logistics 0",
        ["--logistics", "0"],
    ),
    "reals as counts": (
        "train table.npy --likelihood poisson --batch-size 8",
        ["outside the support", "Poisson"],
    ),
    "faulty pair": (f"train {TABLE} --model own:Silent", ["'z'", "missing from the guide"]),
    "no module in training": (f"train {TABLE} --model own:Plain", ["nn.Module", "Plain"]),
    "another run": ("train digits --out run", ["run", "holds another run", "--overwrite"]),
    "file for a folder": ("train digits --out notes.txt", ["notes.txt", "file"]),
    "folder in a file": ("train digits --out notes.txt/run", ["notes.txt"]),
    "configuration is a list": ("train digits --config list.json", ["list.json"]),
    "configuration is a number": ("train digits --config number.json", ["number.json"]),
    "configuration is cut": ("train digits --config cut.json", ["cut.json", "JSON"]),
    "configuration is missing": ("train digits --config none.json", ["none.json"]),
    "configuration of no name": ("train digits --config", ["--config", "file"]),
    "option of configuration": ("train digits --config option.json", ["'epoch'", "'epochs'"]),
    "value of configuration": ("train digits --config value.json", ["epochs", "many"]),
    "evaluate an empty folder": ("evaluate empty", ["config.json", "missing"]),
    "evaluate other data": ("evaluate run --data wide.npy", [", 6)", "1, 8, 8"]),
    "evaluate without samples": ("evaluate run --num-samples 0", ["--num-samples", "0"]),
    "evaluate as another pair": ("evaluate run --model own:Sound", ["--model vae", "own:Sound"]),
    "sample nothing": ("sample run --num 0", ["num", "0"]),
    "label of no condition": ("sample run --label 1", ["run", "--condition label"]),
    "reconstruct nothing": ("reconstruct run --num 0", ["num", "0"]),
    "interpolate nothing": ("interpolate run --num 0", ["num", "0"]),
    "interpolate in one step": ("interpolate run --steps 1", ["steps", "1"]),
    "traverse from nowhere": ("traverse run --index 9999", ["index", "9999"]),
    "traverse in no steps": ("traverse run --steps 0", ["steps", "0"]),
    "traverse in negative steps": ("traverse run --steps -1", ["steps", "-1"]),
    "run is cut": ("sample cut", ["model.safetensors", "cut short"]),
    "checkpoint is cut": (
        "train digits --resume --out cut --epochs 2",
        ["checkpoint.pt", "cut short"],
    ),
    "model is a pickle": ("sample evil", ["model.safetensors"]),
    "checkpoint is a pickle": (
        "train digits --resume --out evil --epochs 2",
        ["checkpoint.pt", "refused"],
    ),
    "check a faulty pair": ("check own:Silent --data table.npy", ["'z'", "missing from the guide"]),
    "check on other data": ("check own:Sound --data wide.npy", ["guide fails", "(16, 6)"]),
    "check no module": ("check own:Plain --data table.npy", ["nn.Module", "Plain"]),
    "check a failing class": ("check own:Failing --data table.npy", ["Failing", "KeyError"]),
    "check a wanting class": ("check own:Wanting --data table.npy", ["'vocabulary'"]),
    "check an unknown class": ("check own:Silnet", ["did you mean 'Silent'?"]),
    "check no class": ("check own:torch --data table.npy", ["own:torch", "class"]),
    "check a function": ("check json:dumps --data table.npy", ["json:dumps", "class"]),
    "check half a name": ("check own", ["module:Class", "'own'"]),
    "check the other half": ("check :Sound", ["module:Class", "':Sound'"]),
    "check a broken module": ("check broken:Pair", ["broken", "SyntaxError"]),
    "check a raising module": ("check raising:Pair", ["raising", "ZeroDivisionError"]),
    "check a wanting module": ("check wanting:Pair", ["wanting", "a_package_that_nobody_has"]),
}


@pytest.mark.parametrize(("line", "words"), COMMANDS.values(), ids=COMMANDS)
def test_a_command_refuses_in_one_line_and_changes_nothing(line, words, here, shelf, capsys):
    before = snapshot(here)
    message = complaint(line, capsys)
    for word in words:
        assert word in message, message
    assert snapshot(here) == before
    assert not (shelf / "marker").exists()


@pytest.mark.usefixtures("here")
def test_check_of_a_sound_pair(capsys):
    main(["check", "own:Sound", "--data", "table.npy"])
    assert capsys.readouterr() == ("the pair is sound\n", "")
    main(["check", "own:Idle", "--data", "table.npy"])
    assert "'idle' has no effect" in capsys.readouterr().out


def test_a_command_whose_training_is_not_finite(here, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(f"train {TABLE} --model own:Diverging --engine eager --out new".split())
    assert stopped.value.code == 2
    last = capsys.readouterr().err.rpartition("\r")[2]  # the progress bar ends in a return
    assert last.startswith("pyro-vae: ")
    assert last.count("\n") == 1
    assert "site 'x'" in last
    assert "last good model is in new" in last
    state = safetensors.torch.load_file(here / "new" / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


@pytest.mark.parametrize(
    "content", [b"epoch,elbo\n1,", b"epoch,elbo\n1", b"\xff\xfe\x00", b"epoch,elbo\n1,x\n"]
)
def test_a_report_of_a_history_that_is_cut_short(content, here, capsys):
    (here / "run" / "history.csv").write_bytes(content)
    before = snapshot(here)
    assert "history.csv" in complaint("report run", capsys)
    assert snapshot(here) == before


def test_figures_that_cannot_be_written(here, capsys):
    (here / "run" / "figures").write_text("mine")
    assert "figures" in complaint("sample run --num 2", capsys)
    assert (here / "run" / "figures").read_text() == "mine"


def test_a_process_ends_with_status_2_and_no_traceback(tmp_path):
    words = [sys.executable, "-m", "pyro_vae", "train", "digts"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("pyro-vae: 'digts'")
    assert done.stderr.count("\n") == 1
    assert snapshot(tmp_path) == {}


UNHEARD = {
    # Typed as they are by default, they would be passed over just as silently.
    "--free-bits 0.1": "--free-bits goes with --objective free-bits; no --objective came",
    "--objective elbo --free-bits 0.3": "with --objective free-bits; --objective elbo came",
    "--mutual-information 2": "goes with --objective total-correlation",
    "--total-correlation 6": "goes with --objective total-correlation",
    "--dimension-kl 2": "goes with --objective total-correlation",
    "--warm-up-epochs 3": "goes with --warm-up linear or cyclical; no --warm-up came",
    "--warm-up none --warm-up-epochs 3": "cyclical; --warm-up none came",
    "--embedding-dim 8 --network mlp": "goes with --network auto or recurrent; --network mlp came",
    "--embedding-dim 8": "digits is no text and takes no --embedding-dim: 8 came",
    "--word-dropout 0.2": "digits is no text and takes no --word-dropout: 0.2 came",
    "--channels 8": "--channels goes with --network conv; --network auto came",
    "--blocks 0": "--blocks goes with --network conv; --network auto came",
    "--guide top-down": "--guide goes with --model hierarchical; --model vae came",
    "--no-normalize": "--normalize goes with --model hierarchical; --model vae came",
    "--classification-weight 3": "goes with --model semi-supervised; --model vae came",
    "--components 3": (
        "--components goes with --prior gaussian-mixture or vamp, or with --model mixture; "
        "--prior standard-normal and --model vae came"
    ),
    "--scale 0.1": "--scale goes with --likelihood gaussian; --likelihood bernoulli came",
    "--logistics 3": "goes with --likelihood discretized-logistic-mixture",
    "--binarize fixed --likelihood gaussian": "goes with --likelihood bernoulli",
    "--length 30": "--length is for text, digits is none",
    "--data-dir runs": "--data-dir is for mnist,",
    "--prior flow --latent-dim 1": "--prior flow needs a --latent-dim of 2 or more, 1 came",
    "--model own:Sound --network mlp": "--network is not for a pair of your own, --model own:Sound",
    "--model own:Sound --hidden 8": "own:Sound takes no --hidden: (8,) came",
    "--model deep-markov --embedding-dim 3": "deep-markov takes no --embedding-dim: 3 came",
    "--model deep-markov --hidden 3 2": "deep-markov takes one width as --hidden, 2 came",
}


@pytest.mark.parametrize(("options", "words"), UNHEARD.items(), ids=UNHEARD)
def test_an_option_that_nothing_hears_is_refused(options, words, here, capsys):
    before = snapshot(here)
    assert words in complaint(f"train digits {options}", capsys)
    assert snapshot(here) == before


def test_every_option_of_a_part_is_heard_with_that_part(here):
    """What the table says goes together is taken."""
    from pyro_vae.config import Model, Objective

    Model(prior="vamp", components=3)
    Model(model="mixture", components=3)
    Model(model="own:Sound", library_size=True, latent_dim=(3, 2))
    Model(likelihood="negative-binomial", library_size=True)
    Objective(objective="total-correlation", dimension_kl=2.0)
    Objective(warm_up="cyclical", warm_up_epochs=3.0)


def test_what_a_file_of_options_holds_by_default_is_no_choice(here, capsys):
    """A run's config.json names every option, those that its parts do not hear too."""
    options = {"data": "digits", "objective": "elbo", "free_bits": 0.1, "epochs": 0}
    (here / "options.json").write_text(json.dumps(options))
    assert "--epochs must be" in complaint("train digits --config options.json", capsys)
    (here / "options.json").write_text(json.dumps(options | {"free_bits": 0.3}))
    words = "--free-bits goes with --objective free-bits"
    assert words in complaint("train digits --config options.json", capsys)


def test_an_error_names_options_and_leaves_other_words(here, capsys):
    assert "'epoch'; did you mean 'epochs'" in complaint(
        "train digits --config option.json", capsys
    )
    assert "there is no run 'num_samples'" in complaint("evaluate num_samples", capsys)
