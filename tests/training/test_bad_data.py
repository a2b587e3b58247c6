"""Bad data for `fit`: one line that names what was given."""

import sys

import numpy as np
import pyro
import pytest
import torch
from bad_input_helpers import (
    FAST,
    NORMAL,
    OUTSIDE,
    SCALES,
    Pair,
    bad,
    binary,
    guide_with_global_site,
    guide_without_site,
    model_with_global_site,
    plate,
    refused,
    small,
    snapshot,
)
from PIL import Image
from pyro.infer import TraceMeanField_ELBO
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyro_vae as pv


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


# Data and settings that `fit` rejects


class Pictures(Dataset):
    """Gives items that torch cannot convert to a tensor."""

    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.item


class Endless(IterableDataset):
    """Has no length."""

    def __iter__(self):
        return iter(binary())


def likelihood(family, x):
    return lambda: ((small(likelihood=family), x), {})


def given(*data, pair=small, **options):
    return lambda: ((pair(), *data), options)


AS_BYTES, AS_REAL = [*OUTSIDE, "uint8", "8-bit"], [*OUTSIDE, "use a Gaussian likelihood"]

AS_GRAY = [*OUTSIDE, "ContinuousBernoulli"]

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
    "one row": (given(binary(1)), ["at least 2 rows", "got 1"]),
    "fewer rows than a batch": (given(binary(3)), ["batch_size must be at most 3", "got 4"]),
    "wrong rank": (given(binary().reshape(8, 2, 2)), ["(8, 2, 2)", "(..., 4)"]),
    "a number": (given(torch.tensor(1.0)), ["a row for each datum", "the number 1"]),
    "other width": (given(torch.rand(8, 3)), ["(8, 3)", "(..., 4)"]),
    "words": (given(np.array([["a"] * 4] * 8)), ["numbers", "<U1"]),
    "objects": (given(np.array([[None] * 4] * 8)), ["numbers", "object"]),
    "complex": (given(np.zeros((8, 4), complex)), ["real", "complex128"]),
    "the name of a data set": (given("digits"), ["array", "str"]),
    "context of other length": (given(binary(), binary(7)), ["7 rows", "8"]),
    "context that the pair lacks": (given(binary(), binary()), ["1 inputs, got 2"]),
    "context is missing": (
        given(binary(), pair=lambda: small(context_shapes=[(2,)])),
        ["2 inputs, got 1"],
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
    "gray as logistic": (likelihood(pv.DiscretizedLogistic, SCALES["unit"]), AS_GRAY),
    "floats to 255 as categorical": (likelihood(pv.Categorical, SCALES["whole"]), AS_BYTES),
    "reals as categorical": (likelihood(pv.Categorical, SCALES["real"]), AS_REAL),
    "gray as categorical": (likelihood(pv.Categorical, SCALES["unit"]), AS_GRAY),
    "validation outside": (
        given(binary(), validation=SCALES["real"]),
        ["validation", *OUTSIDE],
    ),
    "validation outside, gray": (
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
    "data set of one row": (given(TensorDataset(binary(1))), ["at least 2 rows", "got 1"]),
    "data set outside": (given(TensorDataset(SCALES["whole"])), OUTSIDE),
    "loader outside": (given(DataLoader(SCALES["real"], batch_size=4)), OUTSIDE),
    "data set of words": (given(Pictures("word")), ["tensor"]),
    "data set of images": (given(Pictures(Image.new("L", (2, 2)))), ["tensor", "Image"]),
    "data set of dictionaries": (
        given(Pictures({"image": torch.ones(4)})),
        ["dictionary", "VAE.model (x, context)", "got image"],
    ),
    "data set without length": (given(Endless()), ["Endless", "length"]),
    "unknown option": (given(binary(), epoch=3), ["'epoch'", "did you mean 'epochs'?"]),
    "no epochs": (
        given(binary(), epochs=0),
        ["epochs must be a whole number of at least 1", "got 0"],
    ),
    "epochs in words": (given(binary(), epochs="three"), ["epochs", "three"]),
    "half a row": (given(binary(), batch_size=2.5), ["batch_size", "2.5"]),
    "no learning rate": (given(binary(), learning_rate=0.0), ["learning_rate", "got 0.0"]),
    "nan learning rate": (given(binary(), learning_rate=torch.nan), ["learning_rate", "nan"]),
    "negative clip": (given(binary(), clip_norm=-1.0), ["clip_norm", "got -1.0"]),
    "no patience": (given(binary(), validation=binary(), patience=0), ["patience", "got 0"]),
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
        ["'w'", "not a local latent", "Trace_ELBO"],
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
    refused(lambda: pv.hide_labels(labels, 4), "0 or at least 5", "got 4")
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
def test_options_that_need_a_folder_are_rejected_without_one(option):
    refused(lambda: pv.fit(small(), binary(), **FAST, **{option: True}), option, "pass out")
