"""Values that are not finite stop training. The error names the site, and the files stay good."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from bad_input_helpers import FAST, NORMAL, SCALES, Pair, binary, plate, refused, small
from torch.utils.data import DataLoader

import pyro_vae as pv

# Values that are not finite


def breaking(site):
    """A pair with a site or a gradient that is not finite from its sixth training step on."""

    def model(pair, x):
        if pair.training:
            pair.steps += 1
        broken = torch.tensor(torch.nan if pair.training and pair.steps > 5 else 1.0)
        loc = torch.zeros(2) * (broken if site == "z" else 1.0)
        with plate(x):
            z = pyro.sample("z", NORMAL(loc, 1.0, validate_args=False).to_event(1))
            mean = pair.decoder(z) * (broken if site == "x" else 1.0)
            if site == "gradient" and broken.isnan():
                # Zero times the root of zero has a finite value, but its gradient is NaN.
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
    # The pair counts its steps. A graph would not.
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
        lambda: pv.fit(breaking("x"), SCALES["real"], **FAST | {"epochs": 20}),
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
