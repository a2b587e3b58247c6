"""`fit` rejects words in place of objects, and 16-bit pairs, in one line before training."""

import pyro
import pytest
import torch

import pyro_vae as pv
from pyro_vae.errors import UsageError

X = torch.zeros(8, 4)


def small():
    return pv.VAE.mlp((4,), latent_dim=2, hidden=(8,))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"optimizer": "adam"}, "optimizer must make a torch optimizer .* got 'adam'"),
        ({"optimizer": torch.optim.Adam([torch.ones(1)])}, "optimizer must make a torch optimizer"),
        ({"optimizer": pyro.optim.Adam({"lr": 1e-3})}, "optimizer must make a torch optimizer"),
        (
            {"objective": "elbo"},
            r"must be a Pyro ELBO, such as Trace_ELBO\(\), got 'elbo'",
        ),
        ({"objective": pv.FreeBitsELBO}, "objective must be a Pyro ELBO"),
        ({"beta": "linear"}, "beta must be a number or a function of the epoch, got 'linear'"),
        ({"on_epoch": print}, r"on_epoch must be a list of functions, such as on_epoch=\[print\]"),
        ({"on_epoch": "tensorboard"}, "on_epoch must be a list of functions"),
        ({"learning_rate_schedule": "cosine"}, "learning_rate_schedule must be a function"),
        ({"learning_rate_schedule": 0.5}, "learning_rate_schedule must be a function"),
    ],
)
def test_words_in_the_place_of_objects(given, words, tmp_path):
    with pytest.raises(UsageError, match=words) as caught:
        pv.fit(small(), X, epochs=1, progress=False, out=tmp_path / "run", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("convert", [lambda pair: pair.half(), lambda pair: pair.bfloat16()])
@pytest.mark.parametrize(
    "tool",
    [
        lambda pair: pv.fit(pair, X, epochs=1, progress=False, engine="eager"),
        lambda pair: pv.encode(pair, X),
        lambda pair: pv.evaluate(pair, X, num_samples=2),
        lambda pair: pv.sample(pair, 3),
        lambda pair: pv.decode(pair, {"z": torch.zeros(3, 2)}),
        lambda pair: pv.check(pair, X),
    ],
    ids=["fit", "encode", "evaluate", "sample", "decode", "check"],
)
def test_a_pair_of_16_bits(convert, tool):
    with pytest.raises(UsageError, match=r"precise enough for log densities: call pair.float\(\)"):
        tool(convert(small()))
