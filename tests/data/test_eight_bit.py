"""The values of 8-bit training data decide what they are, and the pair keeps this decision."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.data.preparation import preparation
from pyro_vae.data.sources import source
from pyro_vae.errors import UsageError

FAST = {"epochs": 1, "batch_size": 20, "engine": "eager", "progress": False}
GENERATOR = torch.Generator().manual_seed(0)
BITS = (torch.rand(60, 6, generator=GENERATOR) < 0.5).to(torch.uint8)
GRAY = torch.randint(0, 256, (60, 6), generator=GENERATOR, dtype=torch.uint8)
GRAY[:20] = BITS[:20]  # rows with only the values 0 and 1
GRAY[0, 0] = 1


def small(likelihood=pv.Bernoulli, seed=0):
    torch.manual_seed(seed)
    return pv.VAE.mlp((6,), latent_dim=2, hidden=(8,), likelihood=likelihood)


def fitted(x, likelihood=pv.Bernoulli, **more):
    pair = small(likelihood)
    pv.fit(pair, x, **FAST, **more)
    return pair


def shown(pair, x):
    """The prepared rows of x, as the pair sees them."""
    rows = source(x, (), pair)
    return preparation(pair, rows, "none")(rows.first(len(x)))[0]


@pytest.mark.parametrize("kind", [torch.uint8, torch.bool, torch.int64, torch.float64])
def test_bits_of_every_type_are_the_same_data(kind):
    ends = [pv.log_likelihood(fitted(x), x, num_samples=20).value for x in (BITS.float(), BITS)]
    x = BITS.to(kind)
    assert pv.log_likelihood(fitted(x), x, num_samples=20).value == ends[0]
    # Before training p(x) is about 2 to the power of -6.
    assert pv.log_likelihood(small(), x, num_samples=20).value == pytest.approx(-4.16, abs=0.3)


def test_bits_in_a_loader_are_the_same_data():
    pair = small()
    pv.fit(pair, DataLoader(TensorDataset(BITS), 20), **FAST)
    torch.testing.assert_close(shown(pair, BITS), BITS.float())
    later = torch.cat([BITS] * 6)
    later[-1, 0] = 200
    loader = DataLoader(TensorDataset(later), 20)
    with pytest.raises(UsageError, match="values up to 200, but earlier uint8 data had only"):
        pv.fit(small(), loader, **FAST)


@pytest.mark.parametrize("likelihood", [pv.Gaussian, pv.ContinuousBernoulli, pv.Categorical])
def test_bits_under_a_likelihood_of_intensities_give_a_warning(likelihood):
    with pytest.warns(UserWarning, match="only the values 0 and 1: they are used as they are"):
        pair = fitted(BITS, likelihood)
    torch.testing.assert_close(shown(pair, BITS), BITS.float())


@pytest.mark.parametrize("likelihood", [pv.Poisson, pv.NegativeBinomial])
@pytest.mark.parametrize("greatest", [1, 15, 255])
def test_counts_stay_counts(likelihood, greatest):
    x = (torch.rand(60, 6, generator=torch.Generator().manual_seed(1)) * greatest).round()
    x = x.to(torch.uint8)
    pair = fitted(x, likelihood)
    torch.testing.assert_close(shown(pair, x), x.float())
    torch.testing.assert_close(shown(pair, GRAY), GRAY.float())


@pytest.mark.parametrize("likelihood", [pv.Bernoulli, pv.Gaussian, pv.Categorical])
@pytest.mark.parametrize("greatest", [2, 15, 63])
def test_levels_that_are_not_8_bit_are_rejected(likelihood, greatest):
    x = BITS * greatest
    with pytest.raises(UsageError, match=f"values up to {greatest}, .*x / {greatest} for levels"):
        pv.fit(small(likelihood), x, **FAST)
    with pytest.raises(UsageError, match=f"values up to {greatest}, but 8-bit intensities"):
        pv.encode(small(likelihood), x)


def test_a_few_rows_of_gray_data_are_treated_as_in_training(tmp_path):
    """The pair keeps the decision, in memory and in its folder, for any rows."""
    pair = fitted(GRAY, pv.Gaussian, out=tmp_path / "run")
    every = pv.encode(pair, GRAY)["z"]
    with pytest.warns(UserWarning, match="treated as 8-bit intensities k/255, as in training"):
        few = pv.encode(pair, GRAY[:20])["z"]
    torch.testing.assert_close(few, every[:20])
    again = pv.load(tmp_path / "run")
    with pytest.warns(UserWarning, match="as in training"):
        torch.testing.assert_close(pv.encode(again, GRAY[:20])["z"], every[:20])
    with pytest.warns(UserWarning, match="as in training"):
        assert pv.log_likelihood(again, GRAY[:20], num_samples=5).per_datum.tolist() == (
            pytest.approx(
                pv.log_likelihood(again, GRAY[:20].float() / 255, num_samples=5).per_datum.tolist()
            )
        )


def test_validation_data_are_treated_like_training_data(tmp_path):
    pair = small(pv.Gaussian)
    with pytest.warns(UserWarning, match="as in training"):
        pv.fit(pair, GRAY, validation=BITS, **FAST)
    with pytest.raises(UsageError, match="validation: x is uint8 with values up to 255"):
        pv.fit(small(), BITS, validation=GRAY | 255, **FAST)


def test_rows_of_zeros_decide_nothing():
    pair = fitted(torch.zeros_like(BITS))
    torch.testing.assert_close(shown(pair, BITS), BITS.float())
    pair = fitted(torch.zeros_like(BITS))
    torch.testing.assert_close(shown(pair, GRAY | 128), (GRAY | 128) / 255)


def test_bits_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("bits.npy", BITS.numpy())
    options = "--epochs 1 --batch-size 20 --num-eval-samples 5 --no-report"
    main(["train", "bits.npy", *options.split()])
    pair = pv.load("runs/bits")
    torch.testing.assert_close(shown(pair, BITS), BITS.float())
    assert shown(pair, BITS[:1]).max() == BITS[:1].max()


def test_context_of_a_file_that_is_0_and_1_stays_so(tmp_path):
    x, path = np.zeros((20, 3), np.float32), tmp_path / "data.npz"
    np.savez(path, x=x, context=np.eye(4, dtype=np.uint8)[np.arange(20) % 4])
    data = pv.load_data(path)
    assert all(part.context.sum(1).eq(1).all() for part in (data.train, data.test))
    # All parts of one file are treated alike.
    np.savez(
        path, x_train=x, x_test=x, context_train=GRAY[20:40].numpy(), context_test=BITS[:20].numpy()
    )
    torch.testing.assert_close(pv.load_data(path).test.context, BITS[:20] / 255)


def test_pseudo_inputs_start_at_the_prepared_data():
    pair = small()
    for x, want in ((BITS, BITS.float()), (GRAY, GRAY / 255)):
        prior = pv.VampPrior.of_data(pair.encoder, x, components=60)
        torch.testing.assert_close(
            prior.pseudo_inputs[0].detach().sum(), want.sum(), rtol=1e-5, atol=1e-5
        )
