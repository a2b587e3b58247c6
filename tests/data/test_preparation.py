"""The preparation of minibatches."""

import numpy as np
import pytest
import torch
from data_helpers import LOOKING, Recorder, small

import pyro_vae as pv
from pyro_vae.data.preparation import Preparation, held_out, preparation
from pyro_vae.data.sources import Arrays, source

CPU = torch.device("cpu")


def test_intensities_get_the_type_of_the_pair():
    x = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        prepared = Preparation(CPU, dtype)((x, torch.ones(1, 2), torch.tensor([3])))
        expected = torch.tensor([[0, 0.2, 1]], dtype=dtype)
        torch.testing.assert_close(prepared[0], expected)
        assert prepared[1].dtype == dtype
        assert prepared[2].dtype == torch.int64
    (drawn,) = Preparation(CPU, torch.float32)((x > 100,))
    assert drawn.tolist() == [[0, 0, 1]]
    assert drawn.dtype == torch.float32


def test_dynamic_binarization_is_a_new_draw_with_the_intensity_as_mean():
    torch.manual_seed(0)
    x = torch.arange(256, dtype=torch.uint8).repeat(2000, 1)
    prepare = Preparation(CPU, torch.float32, binarize=True)
    (first,), (second,) = prepare((x,)), prepare((x,))
    assert first.unique().tolist() == [0, 1]
    assert not torch.equal(first, second)
    gray = torch.arange(256) / 255
    # With 256 columns of 2000 draws, five standard errors fail about once in 10^4 runs.
    error = (gray * (1 - gray) / 2000).sqrt()
    assert bool(((first.mean(0) - gray).abs() <= 5 * error).all())
    assert bool((first[:, 0] == 0).all() & (first[:, 255] == 1).all())


def test_held_out_data_are_binarized_once():
    x = torch.arange(256, dtype=torch.uint8).repeat(500, 1)
    prepare = Preparation(CPU, torch.float32, binarize=True)
    before = torch.get_rng_state()
    fixed, plain = held_out(Arrays([x, torch.ones(500)]), prepare)
    again, _ = held_out(Arrays([x]), prepare)
    assert torch.equal(torch.get_rng_state(), before)
    assert fixed.tensors[0].dtype == torch.bool
    assert torch.equal(fixed.tensors[0], again.tensors[0])
    assert len(fixed.tensors) == 2
    assert not plain.binarize
    one, two = (next(fixed.batches(500)) for _ in range(2))
    assert torch.equal(plain(one)[0], plain(two)[0])
    assert float(plain(one)[0].mean()) == pytest.approx(0.5, abs=0.01)
    rescaled, _ = held_out(Arrays([x / 255]), prepare)
    assert torch.equal(rescaled.tensors[0], fixed.tensors[0])


@pytest.mark.parametrize(
    ("x", "likelihood", "binarize", "drawn"),
    [
        (torch.rand(8, 4), pv.Bernoulli, "dynamic", True),
        (torch.rand(8, 4), pv.Bernoulli, "fixed", True),
        (torch.rand(8, 4), pv.Bernoulli, "none", False),
        (torch.rand(8, 4).mul(255).byte(), pv.Bernoulli, "dynamic", True),
        (torch.rand(8, 4).round(), pv.Bernoulli, "dynamic", False),
        (torch.rand(8, 4) > 0.5, pv.Bernoulli, "dynamic", False),
        (torch.rand(8, 4), pv.ContinuousBernoulli, "dynamic", False),
        (torch.rand(8, 4), pv.Gaussian, "dynamic", False),
        (torch.rand(8, 4).mul(255).byte(), pv.DiscretizedLogistic, "dynamic", False),
        (torch.rand(8, 4).mul(255).byte(), pv.Categorical, "dynamic", False),
    ],
)
def test_only_gray_data_under_a_binary_likelihood_are_binarized(x, likelihood, binarize, drawn):
    pair = small(likelihood=likelihood)
    assert preparation(pair, source(x), binarize).binarize is drawn


@pytest.mark.parametrize("binarize", ["dynamic", "fixed"])
def test_what_a_pair_sees_in_training(binarize):
    pair, x = Recorder(), torch.full((8, 50), 0.5)
    pv.fit(pair, x, torch.arange(8), epochs=2, batch_size=8, binarize=binarize, **LOOKING)
    first, second = pair.seen
    assert first.unique().tolist() == [0, 1]
    assert torch.equal(first, second) is (binarize == "fixed")


def test_gray_targets_need_an_option_and_give_a_warning():
    pair, x = Recorder(), torch.rand(8, 50)
    with pytest.warns(UserWarning, match="not log-likelihoods"):
        pv.fit(pair, x, torch.arange(8), epochs=1, batch_size=8, binarize="none", **LOOKING)
    assert torch.equal(pair.seen[0], x)


@pytest.mark.parametrize("kind", ["uint8", "float32", "float64", "bool"])
def test_a_pair_in_double_precision(kind):
    x = (np.random.default_rng(0).random((8, 4)) * (255 if kind == "uint8" else 1)).round()
    pair, context = small(context_shapes=[(2,)]).double(), torch.rand(8, 2)
    history = pv.fit(
        pair,
        x.astype(kind),
        context,
        validation=(x.astype(kind), context),
        epochs=2,
        batch_size=4,
        progress=False,
        engine="eager",
    )
    assert np.isfinite(history["validation_elbo"]).all()
    assert {parameter.dtype for parameter in pair.parameters()} == {torch.float64}
    assert pv.encode(pair, x.astype(kind), context)["z"].dtype == torch.float64
    assert pv.sample(pair, 3, torch.rand(3, 2)).dtype == torch.float64
